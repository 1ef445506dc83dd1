//! The fewest bytes for each cell that leaves its home, by how many leave together.

use outboard_attention::{Document, HeadGeometry};

use crate::judge::price::{Fare, Price};

/// Bounds are found to this part of themselves.
const EXACT: f64 = 1e-4;
/// Intervals are halved so many times at most.
const HALVINGS: usize = 400;

/// What a row and a key cost at least, in bytes of one kv head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prices {
    /// A row whose keys all lie on one slot.
    row: f64,
    /// A row of which other slots compute parts: its results travel in f32.
    part_of_row: f64,
    key: f64,
}

/// Which bytes are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// To slots.
    There,
    /// From slots.
    Back,
    /// Both.
    Both,
}

impl Prices {
    /// `pass` picks the forward or the backward pass.
    pub(super) fn new(geometry: &HeadGeometry, pass: fn(&Fare) -> Price, way: Way) -> Prices {
        let bytes = |fare: Fare| {
            let Price { there, back } = pass(&fare);
            let bytes = match way {
                Way::There => there,
                Way::Back => back,
                Way::Both => there + back,
            };
            bytes as f64
        };
        Prices {
            row: bytes(Fare::of_row(geometry, false)),
            part_of_row: bytes(Fare::of_row(geometry, true)),
            key: bytes(Fare::of_key(geometry, false)),
        }
    }

    /// The smaller of what rows and keys cost that must meet: cells of all `rows` with all `keys` that live elsewhere.
    pub(super) fn meeting(&self, rows: f64, keys: f64) -> f64 {
        (self.row * rows).min(self.key * keys)
    }
}

/// Documents that cells may come from, as far as it matters for what they cost.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Source {
    /// Tokens of the longest causal one.
    causal: f64,
    /// Of those with other masks: the most keys of a row, and the most rows of a key.
    band: [f64; 2],
}

impl Source {
    pub(super) fn add(&mut self, document: &Document, geometry: &HeadGeometry) {
        let tokens = document.tokens() as f64;
        if document.is_causal() {
            self.causal = self.causal.max(tokens);
            return;
        }
        let mask = document.mask(geometry.kv_heads());
        let mut most = [0.0f64; 2];
        for part in mask.parts() {
            let width = part.slice.lo().zip(part.slice.hi()).map_or(f64::INFINITY, |(lo, hi)| {
                // As floats, since ends may be any integers.
                hi as f64 - lo as f64 + 1.0
            });
            most[0] += width.min(part.slice.kv().len() as f64);
            most[1] += width.min(part.slice.q().len() as f64);
        }
        self.band = [0, 1].map(|n| self.band[n].max(most[n].min(tokens)));
    }

    pub(super) fn merged(self, other: Source) -> Source {
        let band = [0, 1].map(|n| self.band[n].max(other.band[n]));
        Source { causal: self.causal.max(other.causal), band }
    }

    /// What cells from here cost at these prices.
    pub(super) fn priced(&self, prices: Prices) -> Priced {
        let cheapest = if self.causal > 0.0 { cheapest(&prices, self.causal) } else { (0.0, f64::INFINITY) };
        Priced { source: *self, prices, cheapest }
    }
}

/// Documents that cells may come from, and what these cost.
#[derive(Clone, Copy, Debug)]
pub(super) struct Priced {
    source: Source,
    prices: Prices,
    /// Cells of the slice of a causal document that costs the fewest bytes a cell, and these.
    cheapest: (f64, f64),
}

impl Priced {
    /// The fewest bytes a cell when at most `cells` cells go to one slot. Falls as `cells` grows. Of a causal document it does
    /// until a slice has the shape of the fewest bytes a cell; then more slices are cheaper than larger ones.
    pub(super) fn per_cell(&self, cells: f64) -> f64 {
        let w = cells.max(1.0);
        let Priced { source: Source { causal, band: ends }, prices, cheapest } = self;
        let mut least = cheapest.1;
        if w < cheapest.0 {
            least = slice(prices, *causal, w) / w;
        }
        if ends[0] > 0.0 {
            least = least.min(band(prices, *ends, w));
        }
        if least.is_finite() { least } else { 0.0 }
    }
}

/// `w` cells of rows with at most `m` keys and keys with at most `c` rows: `x` rows and `k` keys hold `x min(k, m)` cells at
/// most, and `k c`.
fn band(prices: &Prices, [m, c]: [f64; 2], cells: f64) -> f64 {
    let Prices { row, key, .. } = *prices;
    let w = cells.min(m * c);
    // A row for each `k` cells, and `k` keys: least where both cost the same.
    let k = (row * w / key.max(1e-9)).sqrt();
    if k < m { 2.0 * (row * key / w).sqrt() } else { row / m + key * (m / w).max(1.0 / c) }
}

/// Of a causal document of `tokens` tokens: the cells of the slice of one kv head that costs the fewest bytes a cell, and
/// these bytes.
fn cheapest(prices: &Prices, tokens: f64) -> (f64, f64) {
    let of_keys = |a: f64, b: f64| fewest_a_cell(prices, tokens, [a, b]);
    least_over_keys(tokens, |a, b| of_keys(a, b).1, of_keys)
}

/// The fewest bytes of `w` cells of one kv head on one slot.
fn slice(prices: &Prices, tokens: f64, w: f64) -> f64 {
    let bytes = |a: f64, b: f64| prices.key * a + rows(prices, tokens, b, w);
    least_over_keys(tokens, bytes, bytes)
}

/// The result for the number of keys at which `bound` is least. A slice with `a` to `b` keys costs no less than the keys of `a`
/// and the rows of `b`, which is what `bound(a, b)` says: the interval where that is lowest is halved until it is narrow.
fn least_over_keys<T>(tokens: f64, bound: impl Fn(f64, f64) -> f64, result: impl Fn(f64, f64) -> T) -> T {
    let mut open = vec![(bound(1.0, tokens), 1.0, tokens)];
    let (mut from, mut to) = (1.0, tokens);
    for _ in 0..HALVINGS {
        let Some(n) = (0..open.len()).min_by(|&a, &b| open[a].0.total_cmp(&open[b].0)) else { break };
        let (_, a, b) = open.swap_remove(n);
        (from, to) = (a, b);
        if b - a <= EXACT * b {
            break;
        }
        let middle = (a + b) / 2.0;
        open.extend([(bound(a, middle), a, middle), (bound(middle, b), middle, b)]);
    }
    result(from, to)
}

/// Cells, and bytes for each, of the slice with the fewest bytes a cell whose keys cost what `a` do and are of as much use as
/// `b`.
fn fewest_a_cell(prices: &Prices, tokens: f64, [a, b]: [f64; 2]) -> (f64, f64) {
    let Prices { row, part_of_row, key } = *prices;
    let (worth, beyond) = (whole_rows(prices, b), (tokens - b).max(0.0));
    let (keys, parts) = (key * a, [beyond * b, part_of_row * beyond]);
    let mut least = (1.0, f64::INFINITY);
    let mut consider = |x: f64, [cells, bytes]: [f64; 2]| {
        let cells = area(x, b) + cells;
        let per_cell = (keys + row * x + bytes) / cells;
        if cells > 0.0 && per_cell < least.1 {
            least = (cells, per_cell);
        }
    };
    // With whole rows alone, and with all parts besides. Between these bytes a cell only rise or only fall. Each is least
    // where one more row has as many bytes a cell as all before it.
    for (parts, from, to) in
        [([0.0; 2], 1.0, if beyond > 0.0 { worth } else { b.max(1.0) }), (parts, worth, b.max(worth))]
    {
        let before = (keys + parts[1]) / row.max(1e-9);
        let square = before * before + 2.0 * before * (b + 0.5) - 2.0 * parts[0];
        for x in [square.max(0.0).sqrt() - before, from, to] {
            consider(x.clamp(from, to), parts);
        }
    }
    least
}

/// Cells of the last `x` of the first `k` rows.
fn area(x: f64, k: f64) -> f64 {
    x * k - x * (x - 1.0).max(0.0) / 2.0
}

/// How many whole rows hold more cells a byte than parts of rows do. Rows up to the k-th see fewer and fewer of the first `k`
/// keys, but all that they see, so they are whole; those after it see all of these keys and others, so they are parts, and
/// dearer.
fn whole_rows(prices: &Prices, k: f64) -> f64 {
    // One more than `x` rows hold `k - x + 1/2` more cells, as real numbers have it, and the first holds `k`.
    (k * (1.0 - prices.row / prices.part_of_row.max(prices.row)) + 0.5).clamp(1.0, k.max(1.0))
}

/// The fewest bytes of rows that hold `w` cells with the first `k` keys.
fn rows(prices: &Prices, tokens: f64, k: f64, w: f64) -> f64 {
    let Prices { row, part_of_row, .. } = *prices;
    let worth = whole_rows(prices, k);
    let (cheap, parts) = (area(worth, k), (tokens - k).max(0.0) * k);
    let whole = |cells: f64| {
        let b = 2.0 * k + 1.0;
        ((b - (b * b - 8.0 * cells).max(0.0).sqrt()) / 2.0).min(k)
    };
    if w <= cheap {
        return row * whole(w);
    }
    if w <= cheap + parts {
        return row * worth + part_of_row * (w - cheap) / k;
    }
    let rest = w - parts;
    if rest > area(k, k) * (1.0 + 1e-9) + 1.0 {
        return f64::INFINITY;
    }
    row * whole(rest) + part_of_row * (tokens - k).max(0.0)
}

#[cfg(test)]
mod tests {
    use outboard_attention::{DType, HeadShape};

    use super::*;

    fn geometry(group: usize, dtype: DType) -> HeadGeometry {
        let shape = HeadGeometry::standard(group, 1, 128).unwrap().shape();
        HeadShape { dtype, ..shape }.try_into().unwrap()
    }

    fn prices(group: usize, dtype: DType) -> Prices {
        Prices::new(&geometry(group, dtype), |fare| fare.forward, Way::Both)
    }

    /// Every slice of whole rows, and every rectangle that cuts rows, of a short document.
    fn check_slices(prices: Prices) {
        let tokens = 20;
        let priced = Source { causal: tokens as f64, band: [0.0; 2] }.priced(prices);
        let check = |cells: usize, bytes: f64| {
            let least = priced.per_cell(cells as f64) * cells as f64;
            assert!(bytes >= least * (1.0 - 1e-9), "{prices:?}: {cells} cells for {bytes}, not {least}");
        };
        for end in 1..=tokens {
            for start in 0..end {
                let rows = end - start;
                let cells: usize = (start..end).map(|row| row + 1).sum();
                check(cells, prices.row * rows as f64 + prices.key * end as f64);
                for keys in 1..end {
                    // Rows before the last of these keys are whole.
                    let whole = (start..end).filter(|row| row < &keys).count();
                    let cells: usize = (start..end).map(|row| (row + 1).min(keys)).sum();
                    let rows = prices.row * whole as f64 + prices.part_of_row * (rows - whole) as f64;
                    check(cells, rows + prices.key * keys as f64);
                }
            }
        }
    }

    /// Also of passes in which keys, or rows, cost nothing one way.
    #[test]
    fn no_slice_costs_less() {
        let passes: [fn(&Fare) -> Price; 2] = [|fare| fare.forward, |fare| fare.backward];
        for (group, dtype) in [(1, DType::Bf16), (4, DType::F32), (128, DType::Bf16)] {
            for pass in passes {
                for way in [Way::There, Way::Back, Way::Both] {
                    check_slices(Prices::new(&geometry(group, dtype), pass, way));
                }
            }
        }
    }

    #[test]
    fn the_bound_of_a_slice_is_nearly_reached() {
        // Where a row costs about four keys, the cheapest slice of whole rows ends at 2.36 sqrt(w).
        let prices = prices(4, DType::Bf16);
        for w in [1e4, 1e6, 1e8] {
            let p = 2.36 * f64::sqrt(w);
            let x = p - (p * p - 2.0 * w).sqrt();
            let bytes = prices.row * x + prices.key * p;
            let least = slice(&prices, 1e6, w);
            assert!(least <= bytes && least > 0.995 * bytes, "{w}: {least} {bytes}");
        }
    }

    #[test]
    fn more_cells_cost_less_each() {
        let prices = prices(4, DType::Bf16);
        for source in [
            Source { causal: 1e5, band: [0.0; 2] },
            Source { causal: 0.0, band: [1000.0, 1000.0] },
            Source { causal: 5000.0, band: [100.0, 70.0] },
        ] {
            let mut last = f64::INFINITY;
            let mut cells = 1.0;
            while cells < 1e10 {
                let per_cell = source.priced(prices).per_cell(cells);
                assert!(per_cell > 0.0 && per_cell <= last * (1.0 + 1e-3), "{source:?} {cells}");
                (last, cells) = (per_cell, cells * 1.7);
            }
        }
    }
}
