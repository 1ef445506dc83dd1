//! Which documents each rank trains on in each step, and their bytes.
//!
//! Documents come in a seeded random order, a new one each epoch, and fill the ranks of a step first come, first
//! served. A document that does not fit is truncated at the rank's remaining budget; the rest of it is dropped and
//! counted. Every rank computes the same packing from the list of files, without a word to the others, and reads only
//! the bytes of its own documents.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use outboard_attention::{DocumentId, Span};
use outboard_worker::PackedDocument;

use crate::rng::Rng;
use crate::{Corpus, TrainConfig, TrainerError};

/// A document of a packing: the first `tokens` bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedFile {
    /// Index in [`Corpus::files`].
    pub file: usize,
    /// Tokens taken.
    pub tokens: usize,
}

/// What all ranks train on in one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepPacking {
    /// Training step.
    pub step: u64,
    /// The documents of each rank, in row order. Every rank has exactly the budgeted number of tokens.
    pub ranks: Vec<Vec<PackedFile>>,
    /// Documents of this step that were truncated.
    pub truncated_documents: u64,
    /// Tokens those truncations dropped.
    pub dropped_tokens: u64,
}

/// Deals the documents of a corpus to ranks, step by step.
#[derive(Clone, Debug)]
pub struct Packer {
    corpus: Arc<Corpus>,
    seed: u64,
    ranks: usize,
    tokens: usize,
    next_step: u64,
    epoch: u64,
    order: Vec<usize>,
    at: usize,
}

/// One rank's tokens of one step.
#[derive(Clone, Debug)]
pub struct PackedBatch {
    /// Training step.
    pub step: u64,
    /// The documents, in row order, covering all rows. Their ids are (rank, index).
    pub documents: Arc<[PackedDocument]>,
    /// One byte a row.
    pub tokens: Vec<u8>,
}

impl StepPacking {
    /// The lengths of one rank's documents in tokens, in row order; empty for a rank that does not exist.
    pub fn lengths(&self, rank: u32) -> Vec<usize> {
        self.ranks.get(rank as usize).into_iter().flatten().map(|document| document.tokens).collect()
    }
}

impl PackedBatch {
    /// Tokens that this rank predicts: all but the first of each document.
    pub fn targets(&self) -> u64 {
        self.documents.iter().map(|document| document.rows.len().saturating_sub(1) as u64).sum()
    }

    /// Checks that the documents lie one after another and cover the tokens.
    ///
    /// # Errors
    /// [`TrainerError::BadBatch`] with what does not fit.
    pub fn check(&self) -> Result<(), TrainerError> {
        let bad = |field, value: String, expected: String| TrainerError::BadBatch {
            step: self.step,
            field,
            value,
            expected,
        };
        let mut at = 0;
        for document in self.documents.iter() {
            if document.rows.start() != at || document.rows.is_empty() {
                let expected = format!("document {} must start at row {at} and hold a token", document.id);
                return Err(bad("rows", document.rows.to_string(), expected));
            }
            at = document.rows.end();
        }
        if at == 0 || at != self.tokens.len() {
            let expected = format!("the documents end at row {at} and must cover all tokens");
            return Err(bad("number of tokens", self.tokens.len().to_string(), expected));
        }
        Ok(())
    }
}

impl Packer {
    /// A packer at step 0.
    ///
    /// # Errors
    /// [`TrainerError::InvalidConfig`] for a bad configuration.
    pub fn new(corpus: Arc<Corpus>, config: &TrainConfig) -> Result<Self, TrainerError> {
        config.validate()?;
        let (ranks, tokens) = (config.ranks as usize, config.tokens);
        let mut packer = Packer {
            corpus,
            seed: config.seed,
            ranks,
            tokens,
            next_step: 0,
            epoch: 0,
            order: Vec::new(),
            at: 0,
        };
        packer.start_epoch(0);
        Ok(packer)
    }

    /// The packing of `step`. Cheap in step order; a step further on or back is reached by dealing all steps before it.
    pub fn packing(&mut self, step: u64) -> StepPacking {
        if step < self.next_step {
            self.next_step = 0;
            self.start_epoch(0);
        }
        while self.next_step < step {
            self.deal();
        }
        self.deal()
    }

    /// Reads the documents that `packing` gives to `rank`.
    ///
    /// # Errors
    /// [`TrainerError::Unreadable`] or [`TrainerError::FileChanged`] with the file at fault, and
    /// [`TrainerError::InvalidConfig`] for a rank that the packing does not have.
    pub fn load(&self, packing: &StepPacking, rank: u32) -> Result<PackedBatch, TrainerError> {
        let files = packing.ranks.get(rank as usize).ok_or_else(|| TrainerError::InvalidConfig {
            field: "rank",
            value: rank.to_string(),
            expected: format!("the packing has {} ranks", packing.ranks.len()),
        })?;
        let mut tokens = Vec::with_capacity(self.tokens);
        let mut documents = Vec::with_capacity(files.len());
        for (index, file) in files.iter().enumerate() {
            let path = match self.corpus.files().get(file.file) {
                Some(entry) => &entry.path,
                None => {
                    return Err(TrainerError::InvalidConfig {
                        field: "file",
                        value: file.file.to_string(),
                        expected: format!("the corpus has {} files", self.corpus.files().len()),
                    });
                }
            };
            let rows = Span::at(tokens.len(), file.tokens);
            read_prefix(path, file.tokens, &mut tokens)?;
            documents.push(PackedDocument::whole(DocumentId { rank, index: index as u32 }, rows));
        }
        Ok(PackedBatch { step: packing.step, documents: documents.into(), tokens })
    }

    fn start_epoch(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.at = 0;
        self.order = (0..self.corpus.files().len()).collect();
        Rng::new(self.seed, &format!("documents of epoch {epoch}")).shuffle(&mut self.order);
    }

    fn deal(&mut self) -> StepPacking {
        let mut packing = StepPacking {
            step: self.next_step,
            ranks: Vec::with_capacity(self.ranks),
            truncated_documents: 0,
            dropped_tokens: 0,
        };
        for _ in 0..self.ranks {
            let mut documents = Vec::new();
            let mut room = self.tokens;
            while room > 0 {
                let file = self.next_file();
                let bytes = self.corpus.files()[file].bytes;
                let taken = usize::try_from(bytes).map_or(room, |bytes| bytes.min(room));
                let dropped = bytes - taken as u64;
                packing.truncated_documents += u64::from(dropped > 0);
                packing.dropped_tokens += dropped;
                documents.push(PackedFile { file, tokens: taken });
                room -= taken;
            }
            packing.ranks.push(documents);
        }
        self.next_step += 1;
        packing
    }

    fn next_file(&mut self) -> usize {
        if self.at == self.order.len() {
            self.start_epoch(self.epoch + 1);
        }
        self.at += 1;
        self.order[self.at - 1]
    }
}

/// Appends the first `count` bytes of a file.
fn read_prefix(path: &Path, count: usize, into: &mut Vec<u8>) -> Result<(), TrainerError> {
    let unreadable = |source| TrainerError::Unreadable { path: path.to_path_buf(), source };
    let file = File::open(path).map_err(unreadable)?;
    let found = file.take(count as u64).read_to_end(into).map_err(unreadable)?;
    if found < count {
        return Err(TrainerError::FileChanged { path: path.to_path_buf(), expected: count, found });
    }
    Ok(())
}
