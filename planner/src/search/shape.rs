//! What slices of causal strips cost, in closed form: fast enough to price millions of them.
//!
//! Rows `[p - x, p)` of a causal document with their keys `[0, p)` hold `x p - x (x - 1) / 2` cells of each kv head and
//! cost `row x + key p` bytes. Sizes are real numbers here; [`carve`](crate::cut::carve) puts the cuts on blocks.

use super::Edge;
use crate::judge::price::Price;

/// Rows `[lo, hi)` of `heads` kv heads of a causal document.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rect {
    heads: f64,
    lo: f64,
    hi: f64,
    /// Cells of one kv head.
    unit: f64,
}

impl Rect {
    pub(crate) fn new(heads: f64, lo: f64, hi: f64) -> Rect {
        Rect { heads, lo, hi, unit: cells(hi - lo, hi) }
    }

    /// A strip that no slice of any of `strips` is cheaper on: as many heads, as late an end.
    pub(crate) fn hull(strips: &[Rect]) -> Rect {
        let most = |of: fn(&Rect) -> f64| strips.iter().map(of).fold(1.0, f64::max);
        Rect::new(most(|strip| strip.heads), 0.0, most(|strip| strip.hi))
    }
}

/// Cells of the last `x` of `p` rows.
fn cells(x: f64, p: f64) -> f64 {
    x * p - x * (x - 1.0) / 2.0
}

/// How many of the last rows of `p` hold `w` cells.
fn rows(w: f64, p: f64) -> f64 {
    let b = 2.0 * p + 1.0;
    (b - (b * b - 8.0 * w).max(0.0).sqrt()) / 2.0
}

/// What a row and a key cost, and the cheapest shapes that follow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Bytes that all links carry for a row of one kv head.
    row: f64,
    key: f64,
    /// Bytes to the server, forward.
    sent: [f64; 2],
    /// The cheapest slice of `w` cells ends at row `spread * sqrt(w)`.
    spread: f64,
    /// The rows of that slice, as a part of where it ends.
    middle: f64,
    /// The cheapest bytes per cell are those of a tail of `tail_area * hi * hi` cells.
    tail_area: f64,
}

/// A slice: rows `[p - x, p)` of some heads of a strip.
#[derive(Clone, Copy, Debug)]
struct Slice {
    heads: f64,
    p: f64,
    x: f64,
}

impl Shape {
    /// `row` and `key` are the bytes of a row and a key in all; `sent` those to the server in the forward pass.
    pub(crate) fn new(row: f64, key: f64, sent: [Price; 2]) -> Shape {
        let r = row / key;
        // The rows of a slice as a part of where it ends: fewest bytes for a number of cells, and for each cell.
        let (middle, tail) = (1.0 / (1.0 + r), ((1.0 + 2.0 * r).sqrt() - 1.0) / r);
        let area = |x: f64| x - x * x / 2.0;
        let sent = sent.map(|price| price.there as f64);
        Shape { row, key, sent, spread: 1.0 / area(middle).sqrt(), middle, tail_area: area(tail) }
    }

    /// The cheapest slice of about `need` cells of some strip; its bytes as if it held them all.
    #[inline]
    fn cheapest(&self, strip: &Rect, need: f64) -> (f64, Slice) {
        // Cut off rather than rounded down by a call to libm.
        let few = ((need / (self.tail_area * strip.hi * strip.hi)) as u32 as f64).clamp(1.0, strip.heads);
        let mut best = self.slice(strip, few, need);
        if few < strip.heads {
            let more = self.slice(strip, few + 1.0, need);
            if more.0 < best.0 {
                best = more;
            }
        }
        best
    }

    #[inline]
    fn slice(&self, strip: &Rect, heads: f64, need: f64) -> (f64, Slice) {
        let w = need / heads;
        let height = strip.hi - strip.lo;
        if w >= strip.unit {
            let bytes = heads * (self.row * height + self.key * strip.hi) * (w / strip.unit);
            return (bytes, Slice { heads, p: strip.hi, x: height });
        }
        let ideal = self.spread * w.sqrt();
        let (p, x) = match ideal < strip.hi {
            true => (ideal, self.middle * ideal),
            false => (strip.hi, rows(w, strip.hi).min(height)),
        };
        let (p, x) = if p - x >= strip.lo {
            (p, x)
        } else {
            // The strip's first rows.
            let below = strip.lo * (strip.lo + 1.0);
            let p = (((1.0 + 4.0 * (2.0 * w + below)).sqrt() - 1.0) / 2.0).min(strip.hi);
            (p, p - strip.lo)
        };
        (heads * (self.row * x + self.key * p), Slice { heads, p, x })
    }

    /// Bytes of a row and of a key of one kv head.
    pub(crate) fn prices(&self) -> (f64, f64) {
        (self.row, self.key)
    }

    /// No way to take `need` cells from strips costs less, if `hull` is their hull.
    pub(crate) fn least(&self, hull: &Rect, need: f64) -> f64 {
        self.cheapest(hull, need).0
    }

    /// Serves edges in their order, each with the cheapest slices that are left, and notes what is sent to each. Returns
    /// the bytes of all; `None` when strips run out, or as soon as they are more than `limit`. `left` is working memory.
    pub(super) fn serve(
        &self,
        strips: &[Rect],
        edges: &mut [Edge],
        grain: f64,
        limit: f64,
        left: &mut Vec<Rect>,
    ) -> Option<f64> {
        left.clear();
        left.extend_from_slice(strips);
        let mut bytes = 0.0;
        for edge in edges {
            let mut need = edge.cells;
            edge.sent = 0.0;
            while need > grain.max(1.0) {
                let mut best = (f64::INFINITY, 0, Slice { heads: 0.0, p: 0.0, x: 0.0 });
                for (n, strip) in left.iter().enumerate() {
                    let (bytes, slice) = self.cheapest(strip, need);
                    if bytes < best.0 {
                        best = (bytes, n, slice);
                    }
                }
                let (_, n, Slice { heads, p, x }) = best;
                let strip = if best.0.is_finite() { left.swap_remove(n) } else { return None };
                let taken = heads * cells(x, p);
                // Strips of a few rows cannot be cut as real numbers are.
                if taken.is_nan() || taken < 1.0 {
                    return None;
                }
                need -= taken;
                edge.sent += heads * (self.sent[0] * x + self.sent[1] * p);
                bytes += heads * (self.row * x + self.key * p);
                if bytes > limit {
                    return None;
                }
                // Less than a row is no strip.
                if p - x >= strip.lo + 1.0 {
                    left.push(Rect::new(heads, strip.lo, p - x));
                }
                if p + 1.0 <= strip.hi {
                    left.push(Rect::new(heads, p, strip.hi));
                }
                if heads < strip.heads {
                    left.push(Rect { heads: strip.heads - heads, ..strip });
                }
            }
        }
        Some(bytes)
    }
}
