//! Cells of a kv head's query rows, summed up: how many lie above a row, and at which row a sum is reached.

use outboard_attention::{BandSlice, MAX_TOKENS, Span};

/// The cells of query rows as a function of the row.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rows<'a> {
    /// Of a causal document. Most are, and there may be many.
    Causal(Causal),
    /// Of any other mask.
    Ramps(&'a Ramps),
}

/// `len` rows of a causal document that see keys of a range: row `n` those up to its own position.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Causal {
    keys: Span,
    len: usize,
}

/// `len` rows as arithmetic ramps, one after the other.
#[derive(Clone, Debug)]
pub(crate) struct Ramps {
    ramps: Vec<Ramp>,
    len: usize,
}

/// Row `start + n` holds `first + n * slope` cells, until the next ramp starts.
#[derive(Clone, Copy, Debug)]
struct Ramp {
    start: usize,
    /// Cells of all rows before `start`.
    before: u64,
    first: i64,
    slope: i64,
}

impl Ramp {
    fn upto(&self, row: usize) -> u64 {
        let n = (row - self.start) as i128;
        let cells = n * i128::from(self.first) + i128::from(self.slope) * (n * (n - 1) / 2);
        self.before + cells as u64
    }
}

impl Ramps {
    /// The rows `[0, len)` of disjoint `slices`, which lie within them.
    pub(crate) fn new(slices: &[BandSlice], len: usize) -> Ramps {
        // Changes of the level and of the slope, at the row from which they hold. A level is taken at row 0.
        let mut changes = vec![(0, 0, 0)];
        for slice in slices {
            for (from, to, first, slope) in ramps_of(slice) {
                let at_zero = first - slope * from as i64;
                changes.push((from, at_zero, slope));
                changes.push((to, -at_zero, -slope));
            }
        }
        changes.sort_unstable();
        let mut ramps: Vec<Ramp> = Vec::new();
        let (mut level, mut slope) = (0i64, 0i64);
        for (start, more_level, more_slope) in changes {
            level += more_level;
            slope += more_slope;
            let before = ramps.last().map_or(0, |ramp| ramp.upto(start));
            if ramps.last().is_some_and(|ramp| ramp.start == start) {
                ramps.pop();
            }
            ramps.push(Ramp { start, before, first: level + slope * start as i64, slope });
        }
        Ramps { ramps, len }
    }

    fn upto(&self, row: usize) -> u64 {
        let row = row.min(self.len);
        let after = self.ramps.partition_point(|ramp| ramp.start <= row);
        after.checked_sub(1).and_then(|n| self.ramps.get(n)).map_or(0, |ramp| ramp.upto(row))
    }

    fn heaviest(&self, from: usize, to: usize) -> u64 {
        let first = self.ramps.partition_point(|ramp| ramp.start <= from).saturating_sub(1);
        let after = self.ramps.partition_point(|ramp| ramp.start < to);
        let ends = self.ramps.iter().skip(1 + first).map(|ramp| ramp.start).chain([self.len]);
        let ramps = self.ramps.iter().take(after).skip(first).zip(ends);
        let heaviest = |(ramp, end): (&Ramp, usize)| {
            let row = |row: usize| ramp.first + (row - ramp.start) as i64 * ramp.slope;
            let (from, to) = (from.max(ramp.start), to.min(end));
            if from < to { row(from).max(row(to - 1)) } else { 0 }
        };
        ramps.map(heaviest).max().map_or(0, |cells| cells as u64)
    }

    fn reach(&self, cells: u64) -> usize {
        let after = self.ramps.partition_point(|ramp| ramp.before < cells);
        let Some(ramp) = after.checked_sub(1).and_then(|n| self.ramps.get(n)) else { return 0 };
        let (mut short, mut enough) = (ramp.start, self.ramps.get(after).map_or(self.len, |next| next.start));
        while short + 1 < enough {
            let middle = short + (enough - short) / 2;
            if ramp.upto(middle) < cells { short = middle } else { enough = middle }
        }
        enough
    }
}

impl Causal {
    fn upto(self, row: usize) -> u64 {
        let row = row.min(self.len);
        let rising = row.min(self.keys.end()).saturating_sub(self.keys.start());
        let level = row.saturating_sub(self.keys.end());
        causal_cells(rising) + level as u64 * self.keys.len() as u64
    }

    fn heaviest(self, from: usize, to: usize) -> u64 {
        let last = if from < to { to.min(self.len) } else { 0 };
        last.saturating_sub(self.keys.start()).min(self.keys.len()) as u64
    }

    fn reach(self, cells: u64) -> usize {
        if cells == 0 {
            return 0;
        }
        if cells > self.upto(self.len) {
            return self.len;
        }
        let rising = causal_cells(self.keys.len());
        match cells.checked_sub(rising) {
            Some(level) if level > 0 => self.keys.end() + level.div_ceil(self.keys.len() as u64) as usize,
            _ => self.keys.start() + causal_rows(cells),
        }
    }
}

impl<'a> Rows<'a> {
    /// The `len` rows of a causal document, with those of the `keys` that they see.
    pub(crate) fn causal(len: usize, keys: Span) -> Rows<'a> {
        Rows::Causal(Causal { keys, len })
    }

    /// Cells of the rows `[0, row)`.
    pub(crate) fn upto(self, row: usize) -> u64 {
        match self {
            Rows::Causal(rows) => rows.upto(row),
            Rows::Ramps(rows) => rows.upto(row),
        }
    }

    /// The most cells that a row of `[from, to)` holds.
    pub(crate) fn heaviest(self, from: usize, to: usize) -> u64 {
        match self {
            Rows::Causal(rows) => rows.heaviest(from, to),
            Rows::Ramps(rows) => rows.heaviest(from, to),
        }
    }

    /// The first row at which [`Rows::upto`] has reached `cells`; the number of rows when it never does.
    pub(crate) fn reach(self, cells: u64) -> usize {
        match self {
            Rows::Causal(rows) => rows.reach(cells),
            Rows::Ramps(rows) => rows.reach(cells),
        }
    }
}

/// Cells of the first `rows` rows of a causal document.
fn causal_cells(rows: usize) -> u64 {
    rows as u64 * (rows as u64 + 1) / 2
}

/// The first row at which [`causal_cells`] has reached `cells`, which are below 2^62.
fn causal_rows(cells: u64) -> usize {
    let mut rows = (((8.0 * cells as f64 + 1.0).sqrt() - 1.0) / 2.0) as usize;
    // The root is off by a row at most where doubles do not hold every integer.
    while rows > 0 && causal_cells(rows - 1) >= cells {
        rows -= 1;
    }
    while causal_cells(rows) < cells {
        rows += 1;
    }
    rows
}

/// The rows of a slice as ramps `(from, to, cells of row from, slope)`.
fn ramps_of(slice: &BandSlice) -> Vec<(usize, usize, i64, i64)> {
    // Positions fit 31 bits, so a band end beyond them is as good as open.
    let open = 2 * MAX_TOKENS as i64;
    let lo = slice.lo().unwrap_or(-open).clamp(-open, open);
    let hi = slice.hi().unwrap_or(open).clamp(-open, open);
    let (start, end) = (slice.kv().start() as i64, slice.kv().end() as i64);
    let cells = |i: i64| (end.min(i + hi + 1) - start.max(i + lo)).max(0);
    let (first, last) = (slice.q().start() as i64, slice.q().end() as i64);
    // Where the band meets the ends of the key range, the count changes its slope.
    let mut kinks = vec![first, last];
    kinks.extend(
        [start - hi - 1, end - hi - 1, start - lo, end - lo]
            .into_iter()
            .filter(|k| (first..last).contains(k)),
    );
    kinks.sort_unstable();
    kinks.dedup();
    let ramp = |pair: &[i64]| {
        (pair[0] as usize, pair[1] as usize, cells(pair[0]), cells(pair[0] + 1) - cells(pair[0]))
    };
    kinks.windows(2).map(ramp).filter(|&(_, _, first, slope)| (first, slope) != (0, 0)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn slices() -> impl Strategy<Value = Vec<BandSlice>> {
        let end =
            prop_oneof![Just(None), (-50i64..50).prop_map(Some), Just(Some(i64::MIN)), Just(Some(i64::MAX))];
        let slice = (0usize..40, 1usize..30, 0usize..40, 1usize..30, end.clone(), end);
        let slice = slice.prop_filter_map("lo above hi", |(q, rows, kv, keys, lo, hi)| {
            BandSlice::new(Span::at(q, rows), Span::at(kv, keys), lo, hi).ok()
        });
        prop::collection::vec(slice, 0..5)
    }

    proptest! {
        #[test]
        fn sums_agree_with_counting(slices in slices()) {
            let ramps = Ramps::new(&slices, 70);
            let rows = Rows::Ramps(&ramps);
            let row = |i: usize| slices.iter().map(|s| s.keys_of(i).len() as u64).sum::<u64>();
            let mut sum = 0;
            for i in 0..=70 {
                prop_assert_eq!(rows.upto(i), sum, "row {}", i);
                let first = (0..=i).find(|&x| rows.upto(x) >= sum).unwrap_or(i);
                prop_assert_eq!(rows.reach(sum), first);
                sum += row(i);
                let heaviest = (i.saturating_sub(7)..i).map(row).max().unwrap_or(0);
                prop_assert_eq!(rows.heaviest(i.saturating_sub(7), i), heaviest);
            }
            prop_assert_eq!(rows.reach(sum + 1), 70);
        }

        #[test]
        fn causal_rows_are_what_their_slice_says(
            len in prop_oneof![1usize..50, 1usize..1 << 31], a in any::<u32>(), b in any::<u32>(), keys in any::<(u32, u32)>(),
        ) {
            let (from, to) = (keys.0 as usize % len, 1 + keys.1 as usize % len);
            let keys = if from < to { Span::at(from, to - from) } else { Span::to(len) };
            let causal = BandSlice::new(Span::to(len), keys, None, Some(0)).expect("a causal slice");
            let ramps = Ramps::new(&[causal], len);
            let (fast, slow) = (Rows::causal(len, keys), Rows::Ramps(&ramps));
            let (a, b) = (a as usize % (len + 1), b as usize % (len + 1));
            let (a, b) = (a.min(b), a.max(b));
            prop_assert_eq!(fast.upto(a), slow.upto(a));
            prop_assert_eq!(fast.heaviest(a, b), slow.heaviest(a, b));
            for cells in [slow.upto(a).saturating_sub(1), slow.upto(a), slow.upto(a) + 1, slow.upto(len) + 1] {
                prop_assert_eq!(fast.reach(cells), slow.reach(cells));
            }
        }
    }
}
