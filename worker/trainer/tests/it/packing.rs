//! How documents are dealt to ranks.

use std::collections::HashSet;
use std::sync::Arc;

use outboard_trainer::{Corpus, Packer, TrainConfig, TrainerError};
use proptest::prelude::*;

use crate::support::Folder;

/// A corpus of files of the given lengths, each filled with its own byte.
fn corpus(folder: &Folder, lengths: &[usize]) -> Arc<Corpus> {
    for (index, &length) in lengths.iter().enumerate() {
        folder.write(&format!("{index:04}"), &vec![index as u8; length]);
    }
    Arc::new(Corpus::from_folder(folder.path()).unwrap())
}

fn packer(corpus: &Arc<Corpus>, seed: u64, ranks: u32, tokens: usize) -> Packer {
    Packer::new(corpus.clone(), &TrainConfig { seed, ranks, tokens, ..TrainConfig::default() }).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn every_rank_gets_its_budget_and_nothing_is_lost_uncounted(
        lengths in prop::collection::vec(1_usize..40, 1..30),
        seed in any::<u64>(),
        ranks in 1_u32..5,
        tokens in 2_usize..60,
    ) {
        let folder = Folder::new();
        let corpus = corpus(&folder, &lengths);
        let mut packer = packer(&corpus, seed, ranks, tokens);
        let (mut dealt, mut epoch_left) = (Vec::new(), HashSet::new());
        for step in 0..6 {
            let packing = packer.packing(step);
            prop_assert_eq!(packing.step, step);
            prop_assert_eq!(packing.ranks.len(), ranks as usize);
            let (mut truncated, mut dropped) = (0, 0);
            for (rank, documents) in packing.ranks.iter().enumerate() {
                prop_assert_eq!(packing.lengths(rank as u32).iter().sum::<usize>(), tokens);
                for (index, document) in documents.iter().enumerate() {
                    if epoch_left.is_empty() {
                        epoch_left = (0..lengths.len()).collect();
                    }
                    prop_assert!(epoch_left.remove(&document.file), "a file was dealt twice in an epoch");
                    let whole = lengths[document.file];
                    prop_assert!(document.tokens == whole || index + 1 == documents.len());
                    truncated += u64::from(document.tokens < whole);
                    dropped += (whole - document.tokens) as u64;
                }
                let batch = packer.load(&packing, rank as u32).unwrap();
                batch.check().unwrap();
                prop_assert_eq!(batch.tokens.len(), tokens);
                prop_assert_eq!(batch.targets() as usize, tokens - documents.len());
                for (packed, document) in batch.documents.iter().zip(documents) {
                    prop_assert_eq!(packed.id.rank as usize, rank);
                    prop_assert!(batch.tokens[packed.rows.range()].iter().all(|&b| b as usize == document.file));
                }
            }
            prop_assert_eq!((truncated, dropped), (packing.truncated_documents, packing.dropped_tokens));
            dealt.push(packing);
        }
        let mut another = self::packer(&corpus, seed, ranks, tokens);
        prop_assert_eq!(&another.packing(4), &dealt[4]);
        prop_assert_eq!(&another.packing(1), &dealt[1]);
    }
}

#[test]
fn the_seed_decides_the_order() {
    let folder = Folder::new();
    let corpus = corpus(&folder, &[7; 40]);
    let order = |seed| {
        packer(&corpus, seed, 1, 7 * 40).packing(0).ranks[0].iter().map(|d| d.file).collect::<Vec<_>>()
    };
    assert_eq!(order(1), order(1));
    assert_ne!(order(1), order(2));
    assert_ne!(order(1), (0..40).collect::<Vec<_>>());
}

#[test]
fn targets_stay_inside_their_document() {
    let folder = Folder::new();
    let corpus = corpus(&folder, &[1, 2, 5]);
    let mut packer = packer(&corpus, 0, 1, 8);
    let packing = packer.packing(0);
    let batch = packer.load(&packing, 0).unwrap();
    assert_eq!(batch.targets(), 1 + 4);
}

#[test]
fn a_file_that_shrank_is_named() {
    let folder = Folder::new();
    let corpus = corpus(&folder, &[30]);
    let mut packer = packer(&corpus, 0, 1, 30);
    let packing = packer.packing(0);
    let path = folder.write("0000", b"short");
    let error = packer.load(&packing, 0).unwrap_err();
    assert!(
        matches!(&error, TrainerError::FileChanged { path: p, expected: 30, found: 5 } if *p == path),
        "{error}"
    );
    std::fs::remove_file(&path).unwrap();
    let error = packer.load(&packing, 0).unwrap_err();
    assert!(error.to_string().contains("0000"), "{error}");
    assert!(packer.load(&packing, 1).unwrap_err().to_string().contains("rank is 1"));
}
