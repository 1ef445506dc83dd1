//! The training loop.

use std::sync::Arc;
use std::time::Duration;

use outboard_trainer::{
    Corpus, Exchange, ModelConfig, PackedBatch, Packer, StepOutcome, TrainConfig, Trainer, TrainerError,
};
use outboard_worker::{Attended, CoreAttention, LayerCall, OutputGradient, Qkv, QkvGradient, WorkerError};

use crate::support::{Folder, NaiveAttention, as_ranks, batch, naive, small_model};

const TEXT: &str = "fn main() {\n    let mut sum = 0;\n    for i in 0..10 {\n        sum += i;\n    }\n}\n";

fn corpus() -> (Folder, Arc<Corpus>) {
    let folder = Folder::new();
    for length in [11, 20, 37, 54, 78, 80] {
        folder.write(&format!("{length}.rs"), &TEXT.as_bytes()[..length.min(TEXT.len())]);
    }
    let corpus = Arc::new(Corpus::from_folder(folder.path()).unwrap());
    (folder, corpus)
}

fn config(ranks: u32, steps: u64) -> TrainConfig {
    TrainConfig { seed: 42, steps, tokens: 96, ranks, ..TrainConfig::default() }
}

/// Trains as every rank; the outcomes of each.
fn train(ranks: u32, steps: u64) -> Vec<Vec<StepOutcome>> {
    let (_folder, corpus) = corpus();
    as_ranks(ranks, Duration::from_secs(60), |mut exchange| {
        let rank = exchange.rank() as u32;
        let config = TrainConfig { rank, ..config(ranks, steps) };
        let mut packer = Packer::new(corpus.clone(), &config).unwrap();
        let mut trainer = Trainer::new(&small_model(), &config, naive()).unwrap();
        let mut outcomes = Vec::new();
        for step in 0..steps {
            let packing = packer.packing(step);
            let batch = packer.load(&packing, rank).unwrap();
            outcomes.push(trainer.step(&batch, &mut exchange).unwrap());
        }
        outcomes
    })
}

#[test]
fn two_runs_have_the_same_loss_bits_on_every_rank() {
    let bits = |outcomes: &[StepOutcome]| -> Vec<(u64, u64)> {
        outcomes.iter().map(|o| (o.loss.to_bits(), o.gradient_norm.to_bits())).collect()
    };
    let (first, second) = (train(2, 4), train(2, 4));
    assert_eq!(bits(&first[0]), bits(&first[1]));
    assert_eq!(bits(&first[0]), bits(&second[0]));
    let outcome = &first[0][3];
    assert_eq!((outcome.step, outcome.tokens), (3, 96));
    assert!(outcome.attention_seconds > 0.0 && outcome.rest_seconds() > 0.0);
    let parts =
        outcome.attention_seconds + outcome.wait_seconds + outcome.exchange_seconds + outcome.rest_seconds();
    assert!((parts - outcome.seconds).abs() < 1e-9);
}

#[test]
fn the_loss_falls() {
    let outcomes = train(1, 25).remove(0);
    let (first, last) = (outcomes[0].loss, outcomes[24].loss);
    assert!((first - 256.0_f64.ln()).abs() < 0.2, "an untrained model predicts nothing: {first}");
    assert!(first - last > 1.5, "{first} to {last}");
}

#[test]
fn two_trainers_share_an_exchange() {
    let (_folder, corpus) = corpus();
    let config = config(1, 3);
    let mut packer = Packer::new(corpus, &config).unwrap();
    let mut trainers = [(); 2].map(|()| Trainer::new(&small_model(), &config, naive()).unwrap());
    let mut exchange = Exchange::alone();
    for step in 0..3 {
        let packing = packer.packing(step);
        let batch = packer.load(&packing, 0).unwrap();
        let [a, b] = trainers.each_mut().map(|trainer| trainer.step(&batch, &mut exchange).unwrap().loss);
        assert_eq!(a.to_bits(), b.to_bits());
    }
}

/// Naive attention that fails in one layer, or gives back too little.
struct Broken {
    forward: bool,
    backward: bool,
    short: bool,
}

const TRIED: &str = "127.0.0.1:7001: no memory for 3 GiB";

impl Broken {
    fn fails(call: &LayerCall, fails: bool) -> Result<(), WorkerError> {
        if fails && call.layer == 1 {
            let task = format!("step {}, layer 1", call.step);
            return Err(WorkerError::NoServerLeft { rank: 0, task, tried: TRIED.into() });
        }
        Ok(())
    }
}

impl CoreAttention for Broken {
    fn forward(&self, call: &LayerCall, qkv: &Qkv) -> Result<Attended, WorkerError> {
        Broken::fails(call, self.forward)?;
        NaiveAttention.forward(call, qkv)
    }

    fn backward(
        &self,
        call: &LayerCall,
        qkv: &Qkv,
        grad: &OutputGradient,
    ) -> Result<QkvGradient, WorkerError> {
        Broken::fails(call, self.backward)?;
        let mut given = NaiveAttention.backward(call, qkv, grad)?;
        if self.short {
            given.dk.pop();
        }
        Ok(given)
    }
}

#[test]
fn errors_of_attention_reach_the_caller_whole() {
    let config = config(1, 1);
    let weights = |trainer: &Trainer| -> Vec<Vec<f32>> {
        trainer.parameters().iter().map(|p| p.var().flatten_all().unwrap().to_vec1().unwrap()).collect()
    };
    for (forward, backward, short) in [(true, false, false), (false, true, false), (false, false, true)] {
        let attention = Arc::new(Broken { forward, backward, short });
        let mut trainer = Trainer::new(&small_model(), &config, attention).unwrap();
        let before = weights(&trainer);
        let error = trainer.step(&batch(0, 0, &[30, 40]), &mut Exchange::alone()).unwrap_err();
        match &error {
            TrainerError::Attention { step: 0, source: WorkerError::NoServerLeft { tried, .. } }
                if !short =>
            {
                assert_eq!(tried, TRIED);
                assert!(error.to_string().ends_with(TRIED), "{error}");
            }
            TrainerError::Attention { step: 0, source: WorkerError::Invalid { layer: 1, .. } } if short => {
                assert!(error.to_string().contains("dk holds"), "{error}");
            }
            _ => panic!("{error}"),
        }
        assert_eq!(before, weights(&trainer));
    }
}

#[test]
fn bad_batches_and_settings_are_named() {
    let train = |batch: &PackedBatch| {
        let mut trainer = Trainer::new(&small_model(), &config(1, 1), naive()).unwrap();
        trainer.step(batch, &mut Exchange::alone()).unwrap_err()
    };
    let good = batch(3, 0, &[10, 20]);
    let short = PackedBatch { tokens: good.tokens[..29].to_vec(), ..good.clone() };
    assert!(matches!(train(&short), TrainerError::BadBatch { step: 3, field: "number of tokens", .. }));
    let gap = PackedBatch::whole(3, good.documents[1..].to_vec(), good.tokens[10..].to_vec());
    assert!(matches!(train(&gap), TrainerError::BadBatch { step: 3, field: "rows", .. }));
    assert!(matches!(train(&batch(3, 0, &[97])), TrainerError::BadBatch { field: "document length", .. }));
    let crowd = train(&batch(3, 0, &[50, 47]));
    assert!(matches!(crowd, TrainerError::BadBatch { field: "number of tokens", .. }));
    assert!(matches!(train(&batch(3, 0, &[])), TrainerError::NoTargets { step: 3 }));
    assert!(matches!(train(&batch(3, 0, &[1, 1])), TrainerError::NoTargets { step: 3 }));

    let mut trainer = Trainer::new(&small_model(), &config(2, 1), naive()).unwrap();
    let error = trainer.step(&good, &mut Exchange::alone()).unwrap_err();
    assert!(error.to_string().contains("rank 0 of 2"), "{error}");

    let named = |model: ModelConfig, train: TrainConfig, name: &str| {
        let error = Trainer::new(&model, &train, naive()).err().unwrap().to_string();
        assert!(error.starts_with(name), "{name}: {error}");
    };
    let (m, t) = (small_model(), config(1, 1));
    named(ModelConfig { layers: 0, ..m }, t, "layers is 0");
    named(ModelConfig { dim: usize::MAX, ..m }, t, "dim is");
    named(ModelConfig { dim: 1 << 16, vocab: 1 << 20, ..m }, t, "number of matrix elements is");
    named(ModelConfig { head_dim: 7, ..m }, t, "head_dim is 7");
    named(ModelConfig { head_dim: 0, ..m }, t, "head_dim is 0");
    named(ModelConfig { kv_heads: 3, ..m }, t, "q_heads is 4");
    named(ModelConfig { vocab: 255, ..m }, t, "vocab is 255");
    named(ModelConfig { rope_base: f32::NAN, ..m }, t, "rope_base is NaN");
    named(ModelConfig { norm_epsilon: 0.0, ..m }, t, "norm_epsilon is 0");
    named(m, TrainConfig { tokens: 1, ..t }, "tokens is 1");
    named(m, TrainConfig { ranks: 0, ..t }, "ranks is 0");
    named(m, TrainConfig { rank: 1, ..t }, "rank is 1");
    named(m, TrainConfig { beta1: 1.0, ..t }, "beta1 is 1");
    named(m, TrainConfig { learning_rate: f64::INFINITY, ..t }, "learning_rate is inf");
    named(m, TrainConfig { clip_norm: -1.0, ..t }, "clip_norm is -1");
}

#[test]
fn divergence_is_an_error() {
    let config = TrainConfig { learning_rate: 1e30, ..config(1, 5) };
    let mut trainer = Trainer::new(&small_model(), &config, naive()).unwrap();
    let mut exchange = Exchange::alone();
    let error = (0..5).find_map(|step| trainer.step(&batch(step, 0, &[40]), &mut exchange).err()).unwrap();
    assert!(matches!(error, TrainerError::NotFinite { .. }), "{error}");
}
