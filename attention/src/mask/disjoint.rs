//! The search for slices of a mask that count a cell twice.
//!
//! At any one row, disjoint slices hold disjoint runs of keys, and from row to row a run's ends never move left and
//! move right by at most one key. So two disjoint slices never change sides, and slices that overlap are neighbours in
//! the row before the first cell they share. It is therefore enough to go down the rows with the slices of the row in
//! order, and to compare each with its neighbours when it comes in, and those that become neighbours when one leaves.

use super::{BandSlice, MaskPart};

/// How many comparisons of all pairs cost as much as one step of the sweep.
const PAIRS_PER_STEP: u128 = 32;

/// A part that counts some cell, with the rows where it does.
#[derive(Clone, Copy, Debug)]
struct Strip {
    index: usize,
    part: MaskPart,
    first_row: i128,
    last_row: i128,
}

impl Strip {
    fn new(index: usize, part: MaskPart) -> Option<Strip> {
        let BandSlice { q, kv, lo, hi } = part.slice;
        let (start, last) = (q.start() as i128, q.end() as i128 - 1);
        let first_row = hi.map_or(start, |hi| start.max(kv.start() as i128 - i128::from(hi)));
        let last_row = lo.map_or(last, |lo| last.min(kv.end() as i128 - 1 - i128::from(lo)));
        (first_row <= last_row).then_some(Strip { index, part, first_row, last_row })
    }

    /// The first key of a row where the strip has some.
    fn first_key(&self, row: i128) -> i128 {
        let start = self.part.slice.kv.start() as i128;
        self.part.slice.lo.map_or(start, |lo| start.max(row + i128::from(lo)))
    }
}

/// The overlapping pair with the smallest second part, and of those with the smallest first: `(first, second)`.
pub(super) fn first_overlap(parts: &[MaskPart]) -> Option<(usize, usize)> {
    let edges = head_edges(parts);
    let place = |head: usize| edges.partition_point(|edge| *edge < head);
    let steps =
        parts.iter().map(|p| (place(p.kv_heads.end()) - place(p.kv_heads.start())) as u128).sum::<u128>();
    let pairs = parts.len() as u128 * parts.len().saturating_sub(1) as u128 / 2;
    if steps * PAIRS_PER_STEP < pairs { by_sweep(parts) } else { by_pairs(parts) }
}

fn by_pairs(parts: &[MaskPart]) -> Option<(usize, usize)> {
    (1..parts.len()).find_map(|second| Some((first_before(parts, second)?, second)))
}

fn by_sweep(parts: &[MaskPart]) -> Option<(usize, usize)> {
    // The sweep finds any pair. More parts never overlap less, so halving finds the shortest list that has one.
    let mut second = overlap(parts)?;
    let mut disjoint = 1;
    while disjoint < second {
        let middle = disjoint + (second - disjoint) / 2;
        match overlap(&parts[..=middle]) {
            Some(later) => second = later,
            None => disjoint = middle + 1,
        }
    }
    Some((first_before(parts, second)?, second))
}

/// The first part that the part `second` overlaps.
fn first_before(parts: &[MaskPart], second: usize) -> Option<usize> {
    let part = &parts[second];
    parts[..second].iter().position(|p| p.kv_heads.meets(part.kv_heads) && p.slice.overlaps(&part.slice))
}

/// The later part of some overlapping pair.
fn overlap(parts: &[MaskPart]) -> Option<usize> {
    let mut strips: Vec<Strip> =
        parts.iter().enumerate().filter_map(|(index, part)| Strip::new(index, *part)).collect();
    strips.sort_by_key(|s| s.part.kv_heads.start());
    let mut coming = strips.into_iter().peekable();
    let mut present: Vec<Strip> = Vec::new();
    for edge in head_edges(parts) {
        present.retain(|s| s.part.kv_heads.end() > edge);
        let before = present.len();
        while let Some(strip) = coming.next_if(|s| s.part.kv_heads.start() == edge) {
            present.push(strip);
        }
        if present.len() > before {
            present.sort_by_key(|s| (s.first_row, s.first_key(s.first_row)));
            if let Some(later) = overlap_of_head(&present) {
                return Some(later);
            }
        }
    }
    None
}

/// The same for strips that share a head, sorted by first row and then by first key there.
fn overlap_of_head(strips: &[Strip]) -> Option<usize> {
    let mut leaving: Vec<&Strip> = strips.iter().collect();
    leaving.sort_by_key(|s| s.last_row);
    let mut leaving = leaving.into_iter().peekable();
    let mut active: Vec<&Strip> = Vec::new();
    let neighbours = |active: &[&Strip], right: usize| {
        let (a, b) = (active.get(right.checked_sub(1)?)?, active.get(right)?);
        a.part.slice.overlaps(&b.part.slice).then_some(a.index.max(b.index))
    };
    // At the end the last strips leave too, since those around them may meet further down.
    for strip in strips.iter().map(Some).chain([None]) {
        while let Some(gone) = leaving.next_if(|s| strip.is_none_or(|strip| s.last_row < strip.first_row)) {
            let key = gone.first_key(gone.last_row);
            let at = active.partition_point(|s| s.first_key(gone.last_row) < key);
            active.remove(at);
            if let Some(later) = neighbours(&active, at) {
                return Some(later);
            }
        }
        let Some(strip) = strip else { break };
        let key = strip.first_key(strip.first_row);
        let at = active.partition_point(|s| s.first_key(strip.first_row) < key);
        active.insert(at, strip);
        if let Some(later) = neighbours(&active, at).or_else(|| neighbours(&active, at + 1)) {
            return Some(later);
        }
    }
    None
}

/// Where head ranges start or end, ascending.
fn head_edges(parts: &[MaskPart]) -> Vec<usize> {
    let mut edges: Vec<usize> = parts.iter().flat_map(|p| [p.kv_heads.start(), p.kv_heads.end()]).collect();
    edges.sort_unstable();
    edges.dedup();
    edges
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Span;

    fn span(below: usize, longest: usize) -> impl Strategy<Value = Span> {
        (0..below, 1..=longest).prop_map(|(start, len)| Span::at(start, len))
    }

    /// Small rectangles and large triangles and bands, most of them for one head.
    fn part() -> impl Strategy<Value = MaskPart> {
        let small = (span(24, 4), span(24, 3)).prop_map(|(q, kv)| BandSlice::new(q, kv, None, None));
        let ends = (-24i64..24, prop_oneof![0i64..3, 0i64..30], any::<bool>(), any::<bool>());
        let large = (span(12, 24), span(24, 24), ends).prop_map(|(q, kv, (lo, width, low, high))| {
            BandSlice::new(q, kv, low.then_some(lo), high.then_some(lo + width))
        });
        let slice = prop_oneof![small, large].prop_filter_map("band", Result::ok);
        let heads = prop_oneof![4 => Just(Span::to(1)), 1 => span(3, 3)];
        (heads, slice).prop_map(|(kv_heads, slice)| MaskPart { kv_heads, slice })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(3000) })]

        #[test]
        fn the_sweep_finds_the_pair_that_all_pairs_show(parts in prop::collection::vec(part(), 0..12)) {
            prop_assert_eq!(by_sweep(&parts), by_pairs(&parts));
        }

        /// Each part in turn is the only one that overlaps, if it does.
        #[test]
        fn the_sweep_finds_a_single_overlap(parts in prop::collection::vec(part(), 2..24)) {
            let mut disjoint: Vec<MaskPart> = Vec::new();
            for part in parts {
                disjoint.push(part);
                let pair = by_pairs(&disjoint);
                prop_assert_eq!(by_sweep(&disjoint), pair);
                if pair.is_some() {
                    disjoint.pop();
                }
            }
        }
    }

    #[test]
    fn neighbours_meet_below_what_was_between_them() {
        let part = |rows, kv, hi| {
            let slice = BandSlice::new(Span::to(rows), kv, None, hi).unwrap();
            MaskPart { kv_heads: Span::to(1), slice }
        };
        let (left, right) = (part(20, Span::to(20), Some(0)), part(20, Span::at(10, 2), None));
        let between = part(4, Span::at(5, 1), None);
        assert_eq!(by_sweep(&[left, between, right]), Some((0, 2)));
        assert_eq!(by_sweep(&[between, part(10, Span::to(20), Some(0)), right]), None);
    }
}
