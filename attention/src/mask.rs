//! Masks as lists of disjoint band slices.

use crate::{InvalidAttention, Span};

/// A rectangle of queries x keys with a diagonal band: cell `(i, j)` counts iff `lo <= j - i <= hi`, with absolute
/// positions in the document. An open end is `None`. Causal is `hi = 0`; a sliding window of `w` is `lo = -w, hi = 0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BandSlice {
    q: Span,
    kv: Span,
    lo: Option<i64>,
    hi: Option<i64>,
}

impl BandSlice {
    /// A slice of the given rectangle and band. It may turn out to hold no cell.
    ///
    /// # Errors
    /// [`InvalidAttention::EmptySpan`] for an empty side, [`InvalidAttention::EmptyBand`] when `lo > hi`.
    pub fn new(q: Span, kv: Span, lo: Option<i64>, hi: Option<i64>) -> Result<Self, InvalidAttention> {
        for (field, span) in [("slice.q", q), ("slice.kv", kv)] {
            if span.is_empty() {
                return Err(InvalidAttention::EmptySpan { field, span });
            }
        }
        if let (Some(lo), Some(hi)) = (lo, hi)
            && lo > hi
        {
            return Err(InvalidAttention::EmptyBand { lo, hi });
        }
        Ok(BandSlice { q, kv, lo, hi })
    }

    /// Query positions of the rectangle.
    pub fn q(&self) -> Span {
        self.q
    }

    /// Key positions of the rectangle.
    pub fn kv(&self) -> Span {
        self.kv
    }

    /// Lower end of `key - query`, `None` when open.
    pub fn lo(&self) -> Option<i64> {
        self.lo
    }

    /// Upper end of `key - query`, `None` when open.
    pub fn hi(&self) -> Option<i64> {
        self.hi
    }

    /// The keys that query position `i` counts in this slice; empty when `i` is outside or the band misses.
    pub fn keys_of(&self, i: usize) -> Span {
        if !self.q.contains(i) {
            return Span::default();
        }
        let at = |offset: i64| usize::try_from((i as i64).saturating_add(offset)).unwrap_or(0);
        let start = self.lo.map_or(self.kv.start(), |lo| at(lo).max(self.kv.start()));
        let end = match self.hi {
            None => self.kv.end(),
            Some(hi) if (i as i64).saturating_add(hi) < 0 => self.kv.start(),
            Some(hi) => at(hi.saturating_add(1)).min(self.kv.end()),
        };
        Span::new(start, end).unwrap_or_default()
    }

    /// Number of cells, in closed form.
    pub fn cells(&self) -> u64 {
        // Cells with key - query <= x, minus those below the lower end.
        let upto = |x: Option<i64>| -> u64 {
            let (rows, keys) = (self.q.len() as i128, self.kv.len() as i128);
            let Some(x) = x else { return (rows * keys) as u64 };
            // Row i counts clamp(i + x + 1 - kv.start, 0, keys) keys: an arithmetic ramp between two plateaus.
            let first = self.q.start() as i128 + x as i128 + 1 - self.kv.start() as i128;
            let ramp_rows = |level: i128| (level - first).clamp(0, rows);
            let (below, above) = (ramp_rows(0), ramp_rows(keys));
            let on_ramp = above - below;
            let ramp = on_ramp * (first + below) + on_ramp * (on_ramp - 1) / 2;
            (ramp + (rows - above) * keys) as u64
        };
        let below = self.lo.map_or(0, |lo| upto(Some(lo.saturating_sub(1))));
        upto(self.hi).saturating_sub(below)
    }

    /// The part inside the rectangle `q` x `kv`, `None` when it holds no cell.
    pub fn clip(&self, q: Span, kv: Span) -> Option<BandSlice> {
        let (q, kv) = (self.q.intersect(q), self.kv.intersect(kv));
        if q.is_empty() || kv.is_empty() {
            return None;
        }
        let slice = BandSlice { q, kv, lo: self.lo, hi: self.hi };
        (slice.cells() > 0).then_some(slice)
    }

    /// True when some cell counts in both.
    pub fn overlaps(&self, other: &BandSlice) -> bool {
        let narrower = |a: Option<i64>, b: Option<i64>, pick: fn(i64, i64) -> i64| match (a, b) {
            (Some(a), Some(b)) => Some(pick(a, b)),
            (a, b) => a.or(b),
        };
        let both = BandSlice {
            q: self.q.intersect(other.q),
            kv: self.kv.intersect(other.kv),
            lo: narrower(self.lo, other.lo, i64::max),
            hi: narrower(self.hi, other.hi, i64::min),
        };
        let band_empty = matches!((both.lo, both.hi), (Some(lo), Some(hi)) if lo > hi);
        !band_empty && !both.q.is_empty() && !both.kv.is_empty() && both.cells() > 0
    }
}

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
    /// cell twice.
    pub fn new(parts: Vec<MaskPart>) -> Result<Self, InvalidAttention> {
        for (second, part) in parts.iter().enumerate() {
            if part.kv_heads.is_empty() {
                return Err(InvalidAttention::EmptySpan { field: "mask.kv_heads", span: part.kv_heads });
            }
            for (first, other) in parts[..second].iter().enumerate() {
                if part.kv_heads.meets(other.kv_heads) && part.slice.overlaps(&other.slice) {
                    return Err(InvalidAttention::Overlap { first, second });
                }
            }
        }
        Ok(Mask(parts))
    }

    /// The causal mask of a document of `tokens` tokens, for `kv_heads` heads. Empty for zero of either.
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

    /// Cells of one query row, summed over kv heads.
    pub fn cells_of_row(&self, i: usize) -> u64 {
        self.0.iter().map(|p| (p.slice.keys_of(i).len() * p.kv_heads.len()) as u64).sum()
    }
}
