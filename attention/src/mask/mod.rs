//! Masks as lists of disjoint band slices, and ready-made masks of the usual shapes.

mod disjoint;
mod prefix;
mod shapes;
mod slice;
mod sparse;

use crate::{InvalidAttention, MAX_HEADS, MAX_TOKENS, Span};

pub use prefix::PrefixSegment;
pub use shapes::query_chunks;
pub use slice::BandSlice;

/// Largest number of slices of a ready-made mask.
pub const MAX_MASK_SLICES: usize = 1 << 20;

/// A band slice and the kv heads it holds for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MaskPart {
    /// The kv heads, all their query heads with them.
    pub kv_heads: Span,
    /// The cells.
    pub slice: BandSlice,
}

/// Which cells count: a list of pairwise disjoint band slices, each for a range of kv heads.
///
/// The ready-made shapes are for one range of kv heads, and count positions from the document's first token. Where
/// heads differ, the mask is [`Mask::new`] of the parts of several of them:
///
/// ```
/// use outboard_attention::{Mask, Span};
///
/// let near = Mask::sliding_window(4096, 511, Span::to(6))?;
/// let far = Mask::full(4096, Span::at(6, 2))?;
/// let mask = Mask::new([near.parts(), far.parts()].concat())?;
/// assert_eq!(mask.slices_of(7).count(), 1);
/// # Ok::<(), outboard_attention::InvalidAttention>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Mask(Vec<MaskPart>);

impl Mask {
    /// A mask of the given parts, in this order.
    ///
    /// # Errors
    /// [`InvalidAttention::EmptySpan`] for a part without heads, [`InvalidAttention::Overlap`] when two parts count a
    /// cell twice. The first part that does either is named, and in an overlap the first of those that it overlaps.
    pub fn new(parts: Vec<MaskPart>) -> Result<Self, InvalidAttention> {
        let headless = parts.iter().position(|part| part.kv_heads.is_empty());
        let sound = headless.unwrap_or(parts.len());
        if let Some((first, second)) = disjoint::first_overlap(&parts[..sound]) {
            return Err(InvalidAttention::Overlap { first, second });
        }
        match headless {
            Some(index) => {
                let span = parts[index].kv_heads;
                Err(InvalidAttention::EmptySpan { field: "mask.kv_heads", span })
            }
            None => Ok(Mask(parts)),
        }
    }

    /// The parts, in order.
    pub fn parts(&self) -> &[MaskPart] {
        &self.0
    }

    /// Number of cells, each counted once per kv head. Saturates.
    pub fn cells(&self) -> u64 {
        let cells = |p: &MaskPart| p.slice.cells().saturating_mul(p.kv_heads.len() as u64);
        self.0.iter().map(cells).fold(0, u64::saturating_add)
    }

    /// The part inside a rectangle of queries x keys x kv heads. Empty parts are dropped.
    pub fn clip(&self, q: Span, kv: Span, kv_heads: Span) -> Mask {
        let clip = |p: &MaskPart| {
            let kv_heads = p.kv_heads.intersect(kv_heads);
            let slice = p.slice.clip(q, kv)?;
            (!kv_heads.is_empty()).then_some(MaskPart { kv_heads, slice })
        };
        Mask(self.0.iter().filter_map(clip).collect())
    }

    /// The slices of one kv head, in order.
    pub fn slices_of(&self, kv_head: usize) -> impl Iterator<Item = &BandSlice> {
        self.0.iter().filter(move |p| p.kv_heads.contains(kv_head)).map(|p| &p.slice)
    }

    /// Cells of one query row, summed over kv heads. Saturates.
    pub fn cells_of_row(&self, i: usize) -> u64 {
        let cells = |p: &MaskPart| (p.slice.keys_of(i).len() as u64).saturating_mul(p.kv_heads.len() as u64);
        self.0.iter().map(cells).fold(0, u64::saturating_add)
    }

    /// A mask of slices that are disjoint by construction, for checked heads.
    fn of(slices: impl IntoIterator<Item = BandSlice>, kv_heads: Span) -> Mask {
        Mask(slices.into_iter().map(|slice| MaskPart { kv_heads, slice }).collect())
    }
}

fn check_range(field: &'static str, value: usize, min: usize, max: usize) -> Result<(), InvalidAttention> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    let (value, min, max) = (value as u64, min as u64, max as u64);
    Err(InvalidAttention::OutOfRange { field, value, min, max })
}

fn check_tokens(tokens: usize) -> Result<(), InvalidAttention> {
    check_range("mask.tokens", tokens, 1, MAX_TOKENS)
}

fn check_heads(kv_heads: Span) -> Result<(), InvalidAttention> {
    if kv_heads.is_empty() {
        return Err(InvalidAttention::EmptySpan { field: "mask.kv_heads", span: kv_heads });
    }
    let bound = Span::to(MAX_HEADS);
    if bound.covers(kv_heads) {
        return Ok(());
    }
    Err(InvalidAttention::OutsideSpan {
        field: "mask.kv_heads",
        span: kv_heads,
        bound_name: "all heads",
        bound,
    })
}

fn check_slices(slices: usize) -> Result<(), InvalidAttention> {
    check_range("number of mask slices", slices, 0, MAX_MASK_SLICES)
}
