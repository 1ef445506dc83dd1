//! Reading what a rank holds of the global batch.

use std::fs;
use std::sync::Arc;

use outboard_attention::{DocumentId, Span};
use outboard_trainer::{Corpus, PackedBatch, Packer, RangeError, StepPacking, TrainConfig, TrainerError};
use outboard_worker::Holding;

use crate::support::Folder;

/// One file of 20 bytes that count from zero, of which a document has the first `tokens`.
fn one_file(folder: &Folder, tokens: usize) -> (Packer, StepPacking) {
    folder.write("0000", &(0..20).collect::<Vec<u8>>());
    let corpus = Arc::new(Corpus::from_folder(folder.path()).unwrap());
    let config = TrainConfig { ranks: 1, tokens, ..TrainConfig::default() };
    let mut packer = Packer::new(corpus, &config).unwrap();
    let packing = packer.packing(0);
    (packer, packing)
}

fn range(start: usize, end: usize, length: usize) -> Holding {
    let document = DocumentId { rank: 0, index: 0 };
    Holding { document, tokens: Span::new(start, end).unwrap(), length, tick: 0 }
}

#[test]
fn every_range_has_its_bytes_and_the_one_after_it() {
    // The second document goes on in the file, and predicts nothing of that.
    for length in [20, 13] {
        let folder = Folder::new();
        let (packer, packing) = one_file(&folder, length);
        for start in 0..length {
            for end in start + 1..=length {
                let batch = packer.load_ranges(&packing, 0, &[range(start, end, length)]).unwrap();
                batch.check().unwrap();
                assert_eq!(batch.tokens, (start as u8..end as u8).collect::<Vec<_>>());
                let following = (end < length).then_some(end as u8);
                assert_eq!(batch.following, [following]);
                let targets = end - start - usize::from(end == length);
                assert_eq!(batch.targets(), targets as u64);
                let [document] = &*batch.documents else { panic!("{batch:?}") };
                assert_eq!((document.first_token, document.length), (start, length));
            }
        }
    }
}

#[test]
fn several_ranges_lie_in_the_order_given() {
    let folder = Folder::new();
    let (packer, packing) = one_file(&folder, 20);
    let ranges = [range(17, 20, 20), range(3, 4, 20), range(0, 3, 20)];
    let batch = packer.load_ranges(&packing, 0, &ranges).unwrap();
    batch.check().unwrap();
    assert_eq!(batch.tokens, [17, 18, 19, 3, 0, 1, 2]);
    assert_eq!(batch.following, [None, Some(4), Some(3)]);
    assert_eq!(batch.targets(), 6);
    let nothing = packer.load_ranges(&packing, 0, &[]).unwrap();
    nothing.check().unwrap();
    assert_eq!((nothing.tokens.len(), nothing.targets()), (0, 0));
}

/// A rank reads no more than it needs: a file that lacks everything else serves it.
#[test]
fn only_the_range_and_one_byte_more_are_read() {
    let folder = Folder::new();
    let (packer, packing) = one_file(&folder, 20);
    let load = |bytes| {
        folder.write("0000", &vec![9; bytes]);
        packer.load_ranges(&packing, 3, &[range(4, 9, 20)])
    };
    assert_eq!(load(10).unwrap().targets(), 5);
    for short in [9, 4, 1] {
        let error = load(short).unwrap_err();
        let TrainerError::Range { rank: 3, source: RangeError::FileChanged { expected: 10, .. }, .. } =
            &error
        else {
            panic!("{error}")
        };
        let said = error.to_string();
        for part in ["step 0: rank 3", "tokens [4, 9)", "document 0.0", "0000 held at least 10 bytes"] {
            assert!(said.contains(part), "{part} is missing in: {said}");
        }
    }
}

#[test]
fn a_range_that_cannot_be_loaded_is_named() {
    let folder = Folder::new();
    let (packer, packing) = one_file(&folder, 13);
    let fails = |range: Holding, parts: &[&str]| {
        let error = packer.load_ranges(&packing, 2, &[range]).unwrap_err();
        assert!(matches!(error, TrainerError::Range { step: 0, rank: 2, .. }), "{error:?}");
        let said = error.to_string();
        let place = ["rank 2", &format!("tokens {}", range.tokens), &format!("document {}", range.document)]
            .map(str::to_owned);
        for part in place.iter().map(String::as_str).chain(parts.iter().copied()) {
            assert!(said.contains(part), "{part} is missing in: {said}");
        }
    };
    let whole = range(0, 13, 13);
    for document in [DocumentId { rank: 0, index: 1 }, DocumentId { rank: 1, index: 0 }] {
        fails(Holding { document, ..whole }, &["the step has 1 documents"]);
    }
    fails(range(0, 13, 20), &["0000", "13 tokens, not of 20"]);
    fails(range(5, 14, 13), &["0000", "the 13 tokens"]);
    fails(range(5, 5, 13), &["0000", "at least one"]);
    fs::remove_file(folder.path().join("0000")).unwrap();
    fails(whole, &["cannot read", "0000", "No such file"]);
}

#[test]
fn batches_whose_ranges_do_not_fit_together_are_refused() {
    let folder = Folder::new();
    let (packer, packing) = one_file(&folder, 20);
    let loaded = |ranges: &[Holding]| packer.load_ranges(&packing, 0, ranges).unwrap();
    let fails = |batch: &PackedBatch, field: &str, part: &str| {
        let error = batch.check().unwrap_err();
        let TrainerError::BadBatch { field: found, .. } = &error else { panic!("{error}") };
        assert_eq!(*found, field);
        assert!(error.to_string().contains(part), "{part} is missing in: {error}");
    };
    fails(&loaded(&[range(0, 8, 20), range(7, 9, 20)]), "tokens of a range", "tokens [0, 8) of document 0.0");
    let good = loaded(&[range(0, 8, 20), range(12, 20, 20)]);
    good.check().unwrap();
    let with = |following: &[Option<u8>]| PackedBatch { following: following.to_vec(), ..good.clone() };
    fails(&with(&[Some(8)]), "number of following tokens", "each of 2");
    fails(&with(&[None, None]), "following token", "tokens [0, 8) are held of the 20 of document 0.0");
    fails(&with(&[Some(8), Some(1)]), "following token", "tokens [12, 20)");
    let document = |change: fn(&mut outboard_worker::PackedDocument)| {
        let mut documents = good.documents.to_vec();
        change(&mut documents[1]);
        PackedBatch { documents: documents.into(), ..good.clone() }
    };
    fails(&document(|d| d.length = 21), "document length", "document 0.0 says 20");
    fails(&document(|d| d.first_token = 13), "tokens of a range", "document 0.0 has 20 tokens");
    fails(&document(|d| d.first_token = usize::MAX), "tokens of a range", "document 0.0 has 20 tokens");
}
