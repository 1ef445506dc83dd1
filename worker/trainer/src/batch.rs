//! One rank's tokens of one step.

use std::collections::BTreeSet;
use std::sync::Arc;

use outboard_attention::DocumentId;
use outboard_worker::PackedDocument;

use crate::TrainerError;
use crate::ops::NO_TARGET;

/// What a rank holds of one step: whole documents, or ranges of documents whose other tokens other ranks hold.
#[derive(Clone, Debug)]
pub struct PackedBatch {
    /// Training step.
    pub step: u64,
    /// The documents, or ranges of them, in row order, covering all rows. There may be several ranges of a document.
    pub documents: Arc<[PackedDocument]>,
    /// One byte a row.
    pub tokens: Vec<u8>,
    /// For each of `documents` the token after its last one here, which that one predicts; `None` where the document ends.
    pub following: Vec<Option<u8>>,
}

impl PackedBatch {
    /// A batch of whole documents.
    pub fn whole(step: u64, documents: Vec<PackedDocument>, tokens: Vec<u8>) -> PackedBatch {
        let following = vec![None; documents.len()];
        PackedBatch { step, documents: documents.into(), tokens, following }
    }

    /// Tokens that this rank predicts: one after each of its own, but for the last ones of documents.
    pub fn targets(&self) -> u64 {
        let ends = self.following.iter().filter(|following| following.is_none());
        (self.tokens.len() as u64).saturating_sub(ends.count() as u64)
    }

    /// Checks that the documents lie one after another and cover the tokens, that each token is there once, and that
    /// what follows a range is there where its document goes on.
    ///
    /// # Errors
    /// [`TrainerError::BadBatch`] with what does not fit.
    pub fn check(&self) -> Result<(), TrainerError> {
        let mut at = 0;
        for document in self.documents.iter() {
            if document.rows.start() != at || document.rows.is_empty() {
                let expected = format!("document {} must start at row {at} and hold a token", document.id);
                return Err(self.bad("rows", document.rows, expected));
            }
            at = document.rows.end();
        }
        if at != self.tokens.len() {
            let expected = format!("the documents end at row {at} and must cover all tokens");
            return Err(self.bad("number of tokens", self.tokens.len(), expected));
        }
        self.check_ranges()?;
        self.check_following()
    }

    fn check_ranges(&self) -> Result<(), TrainerError> {
        let mut ranges: Vec<&PackedDocument> = self.documents.iter().collect();
        ranges.sort_unstable_by_key(|range| (range.id, range.first_token));
        for range in &ranges {
            if range.first_token > range.length || range.rows.len() > range.length - range.first_token {
                let expected = format!("document {} has {} tokens", range.id, range.length);
                let held = format!("{} from {}", range.rows.len(), range.first_token);
                return Err(self.bad("tokens of a range", held, expected));
            }
        }
        for pair in ranges.windows(2).filter(|pair| pair[0].id == pair[1].id) {
            let [before, after] = [pair[0], pair[1]];
            if before.length != after.length {
                let expected = format!("another range of document {} says {}", after.id, before.length);
                return Err(self.bad("document length", after.length, expected));
            }
            if after.first_token < before.tokens().end() {
                let expected =
                    format!("tokens {} of document {} are there already", before.tokens(), after.id);
                return Err(self.bad("tokens of a range", after.tokens(), expected));
            }
        }
        Ok(())
    }

    fn check_following(&self) -> Result<(), TrainerError> {
        if self.following.len() != self.documents.len() {
            let expected = format!("there is one for each of {} documents", self.documents.len());
            return Err(self.bad("number of following tokens", self.following.len(), expected));
        }
        for (document, following) in self.documents.iter().zip(&self.following) {
            let (tokens, length) = (document.tokens(), document.length);
            if following.is_some() != (tokens.end() < length) {
                let expected =
                    format!("tokens {tokens} are held of the {length} of document {}", document.id);
                return Err(self.bad("following token", format!("{following:?}"), expected));
            }
        }
        Ok(())
    }

    fn bad(&self, field: &'static str, value: impl ToString, expected: String) -> TrainerError {
        TrainerError::BadBatch { step: self.step, field, value: value.to_string(), expected }
    }

    /// How many documents it has tokens of.
    pub(crate) fn distinct_documents(&self) -> usize {
        self.documents.iter().map(|document| document.id).collect::<BTreeSet<DocumentId>>().len()
    }

    /// Each row's position in its document.
    pub(crate) fn positions(&self) -> Arc<[u32]> {
        self.documents
            .iter()
            .flat_map(|document| document.tokens().iter())
            .map(|token| token as u32)
            .collect()
    }

    /// What each row predicts: the next token of its document, nothing at the document's end.
    pub(crate) fn next_tokens(&self) -> Arc<[u32]> {
        let of_range = |(document, following): (&PackedDocument, &Option<u8>)| {
            let inner = self.tokens.get(document.rows.range()).and_then(|tokens| tokens.get(1..));
            let inner = inner.unwrap_or_default().iter().map(|&token| u32::from(token));
            inner.chain([following.map_or(NO_TARGET, u32::from)])
        };
        self.documents.iter().zip(&self.following).flat_map(of_range).collect()
    }
}
