//! Tiles: what a kernel computes of a task, which is more than its cells.

use outboard_attention::{BandSlice, MAX_TOKENS, MaskPart, Span};

use crate::sheet::extent;

/// Rows and keys of a tile.
pub const TILE: usize = 128;

/// Tiles of `side` rows and keys that hold a cell, over all kv heads. They are laid from the first row and the first key
/// that some cell uses.
pub(super) fn tiles(parts: &[MaskPart], side: usize) -> u64 {
    let side = side.max(1);
    let mut borders: Vec<usize> = parts.iter().flat_map(|p| [p.kv_heads.start(), p.kv_heads.end()]).collect();
    borders.sort_unstable();
    borders.dedup();
    let class = |pair: &[usize]| {
        let here = parts.iter().filter(|part| part.kv_heads.contains(pair[0]));
        let used = here.filter_map(|part| {
            let (rows, keys) = extent(&part.slice, part.slice.q())?;
            Some(Used { rows, keys, slice: part.slice })
        });
        of_head(used.collect(), side) * (pair[1] - pair[0]) as u64
    };
    borders.windows(2).map(class).sum()
}

/// A slice with the rows and keys that it uses.
struct Used {
    rows: Span,
    keys: Span,
    slice: BandSlice,
}

/// The same for one kv head.
fn of_head(mut slices: Vec<Used>, side: usize) -> u64 {
    if let [lone] = slices.as_slice() {
        return of_lone(lone, side);
    }
    slices.sort_unstable_by_key(|used| used.rows);
    let Some(rows) = slices.iter().map(|used| used.rows).reduce(Span::hull) else { return 0 };
    let Some(keys) = slices.iter().map(|used| used.keys).reduce(Span::hull) else { return 0 };
    let mut coming = slices.iter().peekable();
    let mut active: Vec<&Used> = Vec::new();
    let mut touched: Vec<Span> = Vec::new();
    let (mut count, mut at) = (0, rows.start());
    while at < rows.end() {
        let band = Span::at(at, side);
        active.retain(|used| used.rows.end() > at);
        while let Some(used) = coming.next_if(|used| used.rows.start() < band.end()) {
            active.push(used);
        }
        if active.is_empty() {
            // No cell in these rows: on to the tiles of the next that have one.
            let Some(next) = coming.peek() else { break };
            at += (next.rows.start() - at) / side * side;
            continue;
        }
        touched.clear();
        touched.extend(active.iter().filter_map(|used| columns(used, band, keys.start(), side)));
        touched.sort_unstable();
        let mut upto = 0;
        for columns in &touched {
            count += columns.end().saturating_sub(columns.start().max(upto)) as u64;
            upto = columns.end().max(upto);
        }
        at = band.end();
    }
    count
}

/// The same for one slice, in closed form: from one row of tiles to the next the band moves by one column.
fn of_lone(used: &Used, side: usize) -> u64 {
    let (step, rows, first_key) = (side as i64, used.rows, used.keys.start());
    let full = rows.len() / side;
    let last = Span::at(rows.start() + full * side, rows.len() % side);
    let last = columns(used, last, first_key, side).map_or(0, Span::len);
    // Positions fit 31 bits, so a band end beyond them is as good as open.
    let open = 2 * MAX_TOKENS as i64;
    let lo = used.slice.lo().unwrap_or(-open).clamp(-open, open);
    let hi = used.slice.hi().unwrap_or(open).clamp(-open, open);
    // From the first key, and in tiles: where the first band's columns start and end, and where all keys do.
    let at = rows.start() as i64 - first_key as i64;
    let starts = (at + lo).div_euclid(step);
    let ends = -(-(at + step + hi)).div_euclid(step);
    let most = (used.slice.kv().end() - first_key).div_ceil(side) as i64;
    let count = full as i64;
    let unbounded = count * starts + count * (count - 1) / 2;
    let before = unbounded - bounded(starts, count, 0);
    (bounded(ends, count, most) - before) as u64 + last as u64
}

/// The sum of `first`, `first + 1` and so on, `count` numbers, each taken as `most` where it is more.
fn bounded(first: i64, count: i64, most: i64) -> i64 {
    let below = (most - first).clamp(0, count);
    below * first + below * (below - 1) / 2 + (count - below) * most
}

/// The columns of tiles in which a slice has cells of the rows `band`.
fn columns(used: &Used, band: Span, first_key: usize, side: usize) -> Option<Span> {
    let rows = used.rows.intersect(band);
    // From row to row the keys move by one at most, so there is no gap between those of the first and of the last.
    let last = rows.end().checked_sub(1).filter(|_| !rows.is_empty())?;
    let keys = used.slice.keys_of(rows.start()).hull(used.slice.keys_of(last));
    Span::new((keys.start() - first_key) / side, (keys.end() - first_key).div_ceil(side))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn parts() -> impl Strategy<Value = Vec<MaskPart>> {
        let end = || prop_oneof![Just(None), (-30i64..30).prop_map(Some)];
        let span = |below: usize| (0..below, 1..40usize).prop_map(|(start, len)| Span::at(start, len));
        let part = (span(90), span(60), end(), end(), 0..3usize, 1..3usize);
        let part = part.prop_filter_map("an empty band", |(q, kv, lo, hi, head, heads)| {
            let slice = BandSlice::new(q, kv, lo, hi).ok()?;
            Some(MaskPart { kv_heads: Span::at(head, heads), slice })
        });
        prop::collection::vec(part, 0..5)
    }

    proptest! {
        #[test]
        fn they_are_those_that_hold_a_cell(parts in parts(), side in 1..9usize) {
            let mut expected = 0;
            for head in 0..5 {
                let here = parts.iter().filter(|part| part.kv_heads.contains(head));
                let cells: Vec<(usize, usize)> = here
                    .flat_map(|p| p.slice.q().iter().flat_map(|i| p.slice.keys_of(i).iter().map(move |j| (i, j))))
                    .collect();
                let row = cells.iter().map(|cell| cell.0).min().unwrap_or(0);
                let key = cells.iter().map(|cell| cell.1).min().unwrap_or(0);
                let tile = |&(i, j): &(usize, usize)| ((i - row) / side, (j - key) / side);
                expected += cells.iter().map(tile).collect::<BTreeSet<_>>().len() as u64;
            }
            prop_assert_eq!(tiles(&parts, side), expected);
        }
    }

    #[test]
    fn a_causal_document_has_the_tiles_of_its_triangle() {
        let slice = BandSlice::new(Span::to(300), Span::to(300), None, Some(0)).unwrap();
        assert_eq!(tiles(&[MaskPart { kv_heads: Span::to(2), slice }], TILE), 2 * (1 + 2 + 3));
    }
}
