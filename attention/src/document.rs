//! Documents: the sequences that attention never leaves.

use std::fmt;

use crate::geometry::MAX_TOKENS;
use crate::{InvalidAttention, Mask, Span};

/// Names a document within a step. Documents are planned in the order of their ids, so the order in which ranks
/// speak never matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DocumentId {
    /// The rank that submitted the document.
    pub rank: u32,
    /// Its index among that rank's documents of the step.
    pub index: u32,
}

impl fmt::Display for DocumentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.rank, self.index)
    }
}

/// A range of a document's tokens and the rank that owns their activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HomeRange {
    /// The home rank.
    pub rank: u32,
    /// Its tokens.
    pub tokens: Span,
}

/// One sequence of tokens with its homes and mask.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    id: DocumentId,
    tokens: usize,
    homes: Vec<HomeRange>,
    tick: u32,
    mask: Option<Mask>,
}

impl Document {
    /// A causal document of `tokens` tokens in tick 0, whose `homes` partition `[0, tokens)` in order.
    ///
    /// # Errors
    /// [`InvalidAttention::OutOfRange`] for a length of zero or above [`MAX_TOKENS`], [`InvalidAttention::BadHomes`]
    /// when the homes leave a gap or overlap.
    pub fn new(id: DocumentId, tokens: usize, homes: Vec<HomeRange>) -> Result<Self, InvalidAttention> {
        check_tokens(tokens)?;
        Document { id, tokens, homes: Vec::new(), tick: 0, mask: None }.with_homes(homes)
    }

    /// The same as [`Document::new`], whose homes are still to be chosen.
    ///
    /// # Errors
    /// [`InvalidAttention::OutOfRange`] for a length of zero or above [`MAX_TOKENS`].
    pub fn unplaced(id: DocumentId, tokens: usize) -> Result<Self, InvalidAttention> {
        check_tokens(tokens)?;
        Ok(Document { id, tokens, homes: Vec::new(), tick: 0, mask: None })
    }

    /// The same document with other homes.
    ///
    /// # Errors
    /// [`InvalidAttention::BadHomes`] when the homes do not partition its tokens in order.
    pub fn with_homes(mut self, homes: Vec<HomeRange>) -> Result<Self, InvalidAttention> {
        let (id, tokens) = (self.id, self.tokens);
        let bad = |detail: String| InvalidAttention::BadHomes { document: id, tokens, detail };
        let mut at = 0;
        for home in &homes {
            if home.tokens.start() != at || home.tokens.is_empty() {
                return Err(bad(format!(
                    "expected a range from {at}, found {} on rank {}",
                    home.tokens, home.rank
                )));
            }
            at = home.tokens.end();
        }
        if at != tokens {
            return Err(bad(format!("they end at {at}")));
        }
        self.homes = homes;
        Ok(self)
    }

    /// The same document in another tick.
    pub fn with_tick(mut self, tick: u32) -> Self {
        self.tick = tick;
        self
    }

    /// The same document with a mask of its own instead of the causal one.
    ///
    /// # Errors
    /// [`InvalidAttention::OutsideSpan`] when a slice reaches beyond the document.
    pub fn with_mask(mut self, mask: Mask) -> Result<Self, InvalidAttention> {
        let bound = Span::to(self.tokens);
        for part in mask.parts() {
            for (field, span) in [("mask.q", part.slice.q()), ("mask.kv", part.slice.kv())] {
                if !bound.covers(span) {
                    return Err(InvalidAttention::OutsideSpan { field, span, bound_name: "document", bound });
                }
            }
        }
        self.mask = Some(mask);
        Ok(self)
    }

    /// Its name in the step.
    pub fn id(&self) -> DocumentId {
        self.id
    }

    /// Its length.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// True when its homes are known.
    pub fn is_placed(&self) -> bool {
        !self.homes.is_empty()
    }

    /// Which rank holds which tokens, in token order. None where they are still to be chosen.
    pub fn homes(&self) -> &[HomeRange] {
        &self.homes
    }

    /// Documents of one tick are computed together.
    pub fn tick(&self) -> u32 {
        self.tick
    }

    /// True when no mask of its own was given.
    pub fn is_causal(&self) -> bool {
        self.mask.is_none()
    }

    /// The cells that count, for a layer of `kv_heads` kv heads.
    pub fn mask(&self, kv_heads: usize) -> Mask {
        match &self.mask {
            Some(mask) => mask.clip(Span::to(self.tokens), Span::to(self.tokens), Span::to(kv_heads)),
            None => Mask::causal(self.tokens, kv_heads),
        }
    }

    /// The rank that holds every token, or `None` when the document spans ranks.
    pub fn sole_home(&self) -> Option<u32> {
        match self.homes.as_slice() {
            [first, rest @ ..] if rest.iter().all(|h| h.rank == first.rank) => Some(first.rank),
            _ => None,
        }
    }
}

fn check_tokens(tokens: usize) -> Result<(), InvalidAttention> {
    if (1..=MAX_TOKENS).contains(&tokens) {
        return Ok(());
    }
    let (value, max) = (tokens as u64, MAX_TOKENS as u64);
    Err(InvalidAttention::OutOfRange { field: "document.tokens", value, min: 1, max })
}
