//! Band slices: rectangles of queries x keys with a diagonal band.

use crate::{InvalidAttention, Span};

/// A rectangle of queries x keys with a diagonal band: cell `(i, j)` counts iff `lo <= j - i <= hi`, with absolute
/// positions in the document. An open end is `None`. Causal is `hi = 0`; a sliding window of `w` is `lo = -w, hi = 0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BandSlice {
    pub(super) q: Span,
    pub(super) kv: Span,
    pub(super) lo: Option<i64>,
    pub(super) hi: Option<i64>,
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
        let at = |offset: i128| usize::try_from((i as i128 + offset).max(0)).unwrap_or(usize::MAX);
        let start = self.lo.map_or(self.kv.start(), |lo| at(lo.into()).max(self.kv.start()));
        let end = self.hi.map_or(self.kv.end(), |hi| at(i128::from(hi) + 1).min(self.kv.end()));
        Span::new(start, end).unwrap_or_default()
    }

    /// Number of cells, in closed form. Saturates.
    pub fn cells(&self) -> u64 {
        // Cells with key - query <= x. Positions fit i128 and counts u128, whatever the spans.
        let upto = |x: i128| -> u128 {
            let (rows, keys) = (self.q.len() as i128, self.kv.len() as i128);
            // Row i counts clamp(i + x + 1 - kv.start, 0, keys) keys: an arithmetic ramp between two plateaus.
            let first = self.q.start() as i128 + x + 1 - self.kv.start() as i128;
            let ramp_rows = |level: i128| (level - first).clamp(0, rows) as u128;
            let (below, above) = (ramp_rows(0), ramp_rows(keys));
            let on_ramp = above - below;
            let ramp = match on_ramp {
                0 => 0,
                n => n * first.max(0) as u128 + n * (n - 1) / 2,
            };
            ramp + (rows as u128 - above) * keys as u128
        };
        let all = || self.q.len() as u128 * self.kv.len() as u128;
        let upper = self.hi.map_or_else(all, |hi| upto(hi.into()));
        let lower = self.lo.map_or(0, |lo| upto(i128::from(lo) - 1));
        u64::try_from(upper.saturating_sub(lower)).unwrap_or(u64::MAX)
    }

    /// The part inside the rectangle `q` x `kv`, `None` when it holds no cell.
    pub fn clip(&self, q: Span, kv: Span) -> Option<BandSlice> {
        let (q, kv) = (self.q.intersect(q), self.kv.intersect(kv));
        let slice = BandSlice { q, kv, lo: self.lo, hi: self.hi };
        slice.overlaps(&slice).then_some(slice)
    }

    /// True when some cell counts in both.
    pub fn overlaps(&self, other: &BandSlice) -> bool {
        let (q, kv) = (self.q.intersect(other.q), self.kv.intersect(other.kv));
        if q.is_empty() || kv.is_empty() {
            return false;
        }
        // A rectangle has a cell at every offset between those of its two corners.
        let lowest = kv.start() as i128 - (q.end() - 1) as i128;
        let highest = (kv.end() - 1) as i128 - q.start() as i128;
        let lo = [self.lo, other.lo].into_iter().flatten().map(i128::from).fold(lowest, i128::max);
        let hi = [self.hi, other.hi].into_iter().flatten().map(i128::from).fold(highest, i128::min);
        lo <= hi
    }
}
