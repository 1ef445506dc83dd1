//! Masks as lists of disjoint band slices.

mod disjoint;
mod slice;

use crate::{InvalidAttention, Span};

pub use slice::BandSlice;

/// A band slice and the kv heads it holds for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MaskPart {
    /// The kv heads, all their query heads with them.
    pub kv_heads: Span,
    /// The cells.
    pub slice: BandSlice,
}

/// Which cells count: a list of pairwise disjoint band slices, each for a range of kv heads.
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

    /// The causal mask of a document of `tokens` tokens, for `kv_heads` heads. Empty for zero of either. One slice.
    pub fn causal(tokens: usize, kv_heads: usize) -> Mask {
        let all = Span::to(tokens);
        if tokens == 0 || kv_heads == 0 {
            return Mask::default();
        }
        let slice = BandSlice { q: all, kv: all, lo: None, hi: Some(0) };
        Mask(vec![MaskPart { kv_heads: Span::to(kv_heads), slice }])
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
}
