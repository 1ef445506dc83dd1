//! Which documents each rank trains on in each step, and their bytes.
//!
//! Documents come in a seeded random order, a new one each epoch, and fill the ranks of a step first come, first
//! served. A document that does not fit is truncated at the rank's remaining budget; the rest of it is dropped and
//! counted. Every rank computes the same packing from the list of files, without a word to the others, and reads only
//! the bytes that it holds: those of the documents dealt to it, or any ranges of the documents of all ranks ([`load`]).

mod load;

use std::sync::Arc;

use outboard_attention::DocumentId;

use crate::rng::Rng;
use crate::{Corpus, TrainConfig, TrainerError};

pub use load::RangeError;

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

impl StepPacking {
    /// The documents of all ranks, one rank's after another's, with the ids they have when rank 0 submits all of them.
    pub fn global_batch(&self) -> impl Iterator<Item = (DocumentId, PackedFile)> {
        (0..).zip(self.ranks.iter().flatten()).map(|(index, file)| (DocumentId { rank: 0, index }, *file))
    }

    /// The lengths of one rank's documents in tokens, in row order; empty for a rank that does not exist.
    pub fn lengths(&self, rank: u32) -> Vec<usize> {
        self.ranks.get(rank as usize).into_iter().flatten().map(|document| document.tokens).collect()
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
