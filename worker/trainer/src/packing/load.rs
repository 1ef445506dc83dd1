//! The bytes of what a rank holds.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use outboard_attention::{DocumentId, Span};
use outboard_worker::{Holding, PackedDocument};

use super::{PackedFile, Packer, StepPacking};
use crate::{CorpusFile, PackedBatch, TrainerError};

/// Why a rank cannot load a range.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RangeError {
    /// A document that the step does not have.
    #[error("the step has {documents} documents, whose ids count from 0.0")]
    NoDocument {
        /// How many it has.
        documents: usize,
    },
    /// A length that is not the document's.
    #[error("{} is packed as a document of {packed} tokens, not of {length}", path.display())]
    OtherLength {
        /// The document's file.
        path: PathBuf,
        /// Its length in the packing.
        packed: usize,
        /// Its length in the range.
        length: usize,
    },
    /// No tokens, or tokens beyond the document's end.
    #[error("a range holds at least one of the {length} tokens of {} and no others", path.display())]
    Outside {
        /// The document's file.
        path: PathBuf,
        /// Its length.
        length: usize,
    },
    /// A file that cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file that shrank after the run began.
    #[error("{} held at least {expected} bytes when the run began and no longer does; keep the data unchanged while training", path.display())]
    FileChanged {
        /// The file.
        path: PathBuf,
        /// Where the bytes that are needed end.
        expected: usize,
    },
}

impl Packer {
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
            let path = &self.corpus_file(file)?.path;
            let rows = Span::at(tokens.len(), file.tokens);
            let found = read(path, 0, file.tokens, &mut tokens)
                .map_err(|source| TrainerError::Unreadable { path: path.clone(), source })?;
            if found < file.tokens {
                return Err(TrainerError::FileChanged { path: path.clone(), expected: file.tokens, found });
            }
            documents.push(PackedDocument::whole(DocumentId { rank, index: index as u32 }, rows));
        }
        Ok(PackedBatch::whole(packing.step, documents, tokens))
    }

    /// Reads what `rank` holds of the global batch, in the order of `ranges`, and no bytes besides but the one after a
    /// range, where its document goes on: it is what the range's last token predicts.
    ///
    /// # Errors
    /// [`TrainerError::Range`] with rank, document, tokens and file, and [`TrainerError::InvalidConfig`] for a packing
    /// of another corpus.
    pub fn load_ranges(
        &self,
        packing: &StepPacking,
        rank: u32,
        ranges: &[Holding],
    ) -> Result<PackedBatch, TrainerError> {
        let global: Vec<PackedFile> = packing.global_batch().map(|(_, file)| file).collect();
        let mut batch = PackedBatch {
            step: packing.step,
            documents: [].into(),
            tokens: Vec::new(),
            following: Vec::new(),
        };
        let mut documents = Vec::with_capacity(ranges.len());
        for range in ranges {
            let failed = |source| TrainerError::Range {
                step: packing.step,
                rank,
                document: range.document,
                tokens: range.tokens,
                source,
            };
            let file = find(&global, range.document).map_err(failed)?;
            let path = &self.corpus_file(file)?.path;
            let rows = Span::at(batch.tokens.len(), range.tokens.len());
            let following = load_range(path, file, range, &mut batch.tokens).map_err(failed)?;
            batch.following.push(following);
            documents.push(PackedDocument {
                id: range.document,
                rows,
                first_token: range.tokens.start(),
                length: range.length,
            });
        }
        batch.documents = documents.into();
        Ok(batch)
    }

    fn corpus_file(&self, file: &PackedFile) -> Result<&CorpusFile, TrainerError> {
        self.corpus.files().get(file.file).ok_or_else(|| TrainerError::InvalidConfig {
            field: "file",
            value: file.file.to_string(),
            expected: format!("the corpus has {} files", self.corpus.files().len()),
        })
    }
}

fn find(global: &[PackedFile], document: DocumentId) -> Result<&PackedFile, RangeError> {
    let file = global.get(document.index as usize).filter(|_| document.rank == 0);
    file.ok_or(RangeError::NoDocument { documents: global.len() })
}

/// Appends the bytes of a range, and gives the one after it where the document goes on.
fn load_range(
    path: &Path,
    file: &PackedFile,
    range: &Holding,
    into: &mut Vec<u8>,
) -> Result<Option<u8>, RangeError> {
    let path_buf = || path.to_path_buf();
    let Holding { tokens, length, .. } = *range;
    if length != file.tokens {
        return Err(RangeError::OtherLength { path: path_buf(), packed: file.tokens, length });
    }
    if tokens.is_empty() || tokens.end() > length {
        return Err(RangeError::Outside { path: path_buf(), length });
    }
    let goes_on = tokens.end() < length;
    let count = tokens.len() + usize::from(goes_on);
    let found = read(path, tokens.start(), count, into)
        .map_err(|source| RangeError::Unreadable { path: path_buf(), source })?;
    if found < count {
        return Err(RangeError::FileChanged { path: path_buf(), expected: tokens.start() + count });
    }
    Ok(if goes_on { into.pop() } else { None })
}

/// Appends `count` bytes of a file from `start`, or as many as there are, and says how many.
fn read(path: &Path, start: usize, count: usize, into: &mut Vec<u8>) -> io::Result<usize> {
    let mut file = File::open(path)?;
    if start > 0 {
        file.seek(SeekFrom::Start(start as u64))?;
    }
    file.take(count as u64).read_to_end(into)
}
