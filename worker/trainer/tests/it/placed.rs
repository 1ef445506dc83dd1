//! Documents whose tokens any ranks hold have the loss and the gradient of undivided ones.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use outboard_attention::Span;
use outboard_trainer::{
    Corpus, Exchange, Model, PackedBatch, Packer, Parameters, StepPacking, TrainConfig, Trainer,
};
use outboard_worker::{CoreAttention, Holding};
use proptest::prelude::*;

use crate::shared::SharedAttention;
use crate::support::{Folder, as_ranks, assert_close, naive, part, small_model};

/// Files of those lengths, and a packer that deals them to `ranks` ranks.
fn packer(folder: &Folder, lengths: &[usize], ranks: u32, tokens: usize) -> Packer {
    for (index, &length) in lengths.iter().enumerate() {
        let bytes: Vec<u8> = (0..length).map(|i| ((i * i * 31 + i * 7 + 11 * index) % 251) as u8).collect();
        folder.write(&format!("{index:04}"), &bytes);
    }
    let corpus = Arc::new(Corpus::from_folder(folder.path()).unwrap());
    Packer::new(corpus, &TrainConfig { seed: 3, ranks, tokens, ..TrainConfig::default() }).unwrap()
}

/// All documents, each whole.
fn whole(packing: &StepPacking) -> Vec<Holding> {
    let range = |(document, file): (_, outboard_trainer::PackedFile)| Holding {
        document,
        tokens: Span::to(file.tokens),
        length: file.tokens,
        tick: 0,
    };
    packing.global_batch().map(range).collect()
}

/// Cuts every document anywhere, and deals the ranges to the first `owners` of `ranks` ranks.
fn cut(packing: &StepPacking, ranks: usize, owners: usize, seed: u64) -> Vec<Vec<Holding>> {
    let mut state = seed;
    let mut below = |bound: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % bound
    };
    let mut held = vec![Vec::new(); ranks];
    for range in whole(packing) {
        let mut at = 0;
        while at < range.length {
            let left = range.length - at;
            let taken = if below(3) == 0 { 1 } else { 1 + below(left) };
            held[below(owners)].push(Holding { tokens: Span::at(at, taken), ..range });
            at += taken;
        }
    }
    held
}

/// The sum of the ranks' losses and their gradients, in rank order.
fn loss_and_gradient(batches: &[PackedBatch]) -> (f64, Vec<f32>) {
    let targets = batches.iter().map(PackedBatch::targets).sum();
    let longest = batches.iter().flat_map(|batch| batch.documents.iter()).map(|d| d.length).max().unwrap();
    // Ranks without tokens ask for no attention.
    let mut ends = SharedAttention::of(batches.iter().filter(|batch| !batch.tokens.is_empty()).count());
    let attentions: Vec<Arc<dyn CoreAttention>> = batches
        .iter()
        .map(|batch| match batch.tokens.len() {
            0 => naive(),
            _ => Arc::new(ends.pop().unwrap()),
        })
        .collect();
    let one_rank = |batch: &PackedBatch, attention: &Arc<dyn CoreAttention>| {
        let parameters = Parameters::new(&small_model(), 7).unwrap();
        let model = Model::new(&small_model(), &parameters, longest).unwrap();
        let forward = model.forward(batch, attention, targets).unwrap();
        (forward.loss_sum(), forward.backward(&parameters).unwrap())
    };
    let parts: Vec<_> = thread::scope(|scope| {
        let ranks = batches.iter().zip(&attentions);
        let running: Vec<_> =
            ranks.map(|(batch, attention)| scope.spawn(move || one_rank(batch, attention))).collect();
        running.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    let loss = parts.iter().map(|(sum, _)| sum).sum::<f64>() / targets as f64;
    let gradients = parts.into_iter().map(|(_, gradient)| gradient);
    let sum = gradients.reduce(|sum, next| sum.iter().zip(&next).map(|(a, b)| a + b).collect());
    (loss, sum.unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn ranks_that_hold_any_ranges_have_the_gradient_of_one_that_holds_all(
        lengths in prop::collection::vec(1_usize..70, 1..8),
        (ranks, owners) in (1_usize..5).prop_flat_map(|ranks| (Just(ranks), 1..=ranks)),
        tokens in 2_usize..50,
        seed in any::<u64>(),
    ) {
        let folder = Folder::new();
        let mut packer = packer(&folder, &lengths, ranks as u32, tokens);
        let packing = packer.packing(1);
        let load = |(rank, ranges): (u32, &Vec<_>)| packer.load_ranges(&packing, rank, ranges).unwrap();
        let undivided = [load((0, &whole(&packing)))];
        prop_assume!(undivided[0].targets() > 0);
        let placed: Vec<_> = (0..).zip(&cut(&packing, ranks, owners, seed)).map(load).collect();
        prop_assert_eq!(placed.iter().map(PackedBatch::targets).sum::<u64>(), undivided[0].targets());

        let (expected_loss, expected) = loss_and_gradient(&undivided);
        let (loss, gradient) = loss_and_gradient(&placed);
        prop_assert!((loss / expected_loss - 1.0).abs() < 1e-6, "{loss} {expected_loss}");
        let parameters = Parameters::new(&small_model(), 7).unwrap();
        for parameter in &parameters {
            let [found, expected] = [&gradient, &expected].map(|flat| part(flat, parameter));
            // Of one-token documents no score has a gradient.
            if expected.iter().any(|g| g.abs() > 1e-6) {
                assert_close(parameter.name(), found, expected, 1e-5);
            }
        }
    }
}

/// The packer's own batches are the same as the global batch's whole documents, rank by rank.
#[test]
fn documents_dealt_to_ranks_are_those_of_the_global_batch() {
    let folder = Folder::new();
    let mut packer = packer(&folder, &[5, 30, 17, 9], 2, 24);
    let packing = packer.packing(2);
    let all = packer.load_ranges(&packing, 0, &whole(&packing)).unwrap();
    let dealt = [0, 1].map(|rank| packer.load(&packing, rank).unwrap());
    assert_eq!(all.tokens, [&dealt[0].tokens[..], &dealt[1].tokens].concat());
    assert_eq!(all.targets(), dealt[0].targets() + dealt[1].targets());
    let lengths = |batch: &PackedBatch| batch.documents.iter().map(|d| d.length).collect::<Vec<_>>();
    assert_eq!(lengths(&all), [lengths(&dealt[0]), lengths(&dealt[1])].concat());
    assert_eq!(
        all.documents.iter().map(|d| d.id.index).collect::<Vec<_>>(),
        (0..).take(all.documents.len()).collect::<Vec<_>>()
    );
}

/// Three ranks of which one holds nothing, and one alone with everything, make the same updates.
#[test]
fn placed_ranks_train_as_one_that_holds_all() {
    const STEPS: u64 = 3;
    let folder = Folder::new();
    let packer = packer(&folder, &[40, 33, 8, 21, 60], 3, 32);
    let train = |rank: u32, ranks: u32, tokens, attention, exchange: &mut Exchange| {
        let config = TrainConfig { seed: 5, rank, ranks, tokens, ..TrainConfig::default() };
        let mut trainer = Trainer::new(&small_model(), &config, attention).unwrap();
        let mut packer = packer.clone();
        let step = |step| {
            let packing = packer.packing(step);
            let ranges = match ranks {
                1 => whole(&packing),
                _ => cut(&packing, 3, 2, step).swap_remove(rank as usize),
            };
            let batch = packer.load_ranges(&packing, rank, &ranges).unwrap();
            trainer.step(&batch, exchange).unwrap()
        };
        (0..STEPS).map(step).collect::<Vec<_>>()
    };
    let alone = train(0, 1, 96, naive(), &mut Exchange::alone());
    let ends = std::sync::Mutex::new(SharedAttention::of(2));
    let outcomes = as_ranks(3, Duration::from_secs(20), |mut exchange| {
        let rank = exchange.rank();
        let attention: Arc<dyn CoreAttention> = match rank {
            2 => naive(),
            _ => Arc::new(ends.lock().unwrap().pop().unwrap()),
        };
        train(rank as u32, 3, 32, attention, &mut exchange)
    });
    for step in 0..STEPS as usize {
        let (alone, ranks) = (&alone[step], [0, 1, 2].map(|rank| &outcomes[rank][step]));
        for outcome in ranks {
            assert_eq!(outcome.loss.to_bits(), ranks[0].loss.to_bits());
            assert_eq!(outcome.targets, alone.targets);
            assert!((outcome.loss / alone.loss - 1.0).abs() < 1e-6, "step {step}: {outcome:?} {alone:?}");
            assert!((outcome.gradient_norm / alone.gradient_norm - 1.0).abs() < 1e-5);
        }
        assert_eq!(ranks.map(|outcome| outcome.tokens).iter().sum::<usize>(), 96);
        assert_eq!((ranks[2].tokens, ranks[2].documents), (0, 0));
    }
}
