//! Which keys of a block the rows of a panel see.

use super::simd::Vector;
use crate::{BandSlice, Span};

/// Keys come in blocks of this many, at multiples of it from position zero whatever the task, so that a row meets the
/// same blocks in the same order in every task that holds them.
pub(super) const BLOCK: usize = super::KEY_BLOCK;

/// Keys are computed in steps of this many, also counted from position zero.
pub(super) const KEY_STEP: usize = 8;

/// The keys of a block that some row of a panel sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sight {
    /// First key, counted from the block's start; a multiple of [`KEY_STEP`].
    pub(super) from: usize,
    /// One past the last key, likewise.
    pub(super) to: usize,
    /// False when every row sees every key of `from..to`.
    pub(super) masked: bool,
}

/// The keys that the query at `position` sees in `slice`, for a position within its queries.
fn keys_at(slice: &BandSlice, position: usize) -> (i64, i64) {
    let position = position as i64;
    let (start, end) = (slice.kv().start() as i64, slice.kv().end() as i64);
    let start = slice.lo().map_or(start, |lo| start.max(position.saturating_add(lo)));
    let end = slice.hi().map_or(end, |hi| end.min(position.saturating_add(hi).saturating_add(1)));
    (start, end)
}

/// Bounds on the keys that queries in `positions` see in `slice`; both ends move up with the position.
fn keys_between(slice: &BandSlice, positions: Span) -> Option<(i64, i64)> {
    let rows = slice.q().intersect(positions);
    if rows.is_empty() {
        return None;
    }
    let (start, _) = keys_at(slice, rows.start());
    let (_, end) = keys_at(slice, rows.end() - 1);
    (start < end).then_some((start, end))
}

/// The slices that count cells of `positions` and `keys`, as far as bounds tell.
pub(super) fn slices_near(slices: &[BandSlice], positions: Span, keys: Span, near: &mut Vec<BandSlice>) {
    near.clear();
    near.extend(slices.iter().filter(|slice| {
        keys_between(slice, positions)
            .is_some_and(|(start, end)| start < keys.end() as i64 && end > keys.start() as i64)
    }));
}

/// Bounds on the keys that queries in `positions` see in any slice; empty when they see none.
pub(super) fn key_hull(slices: &[BandSlice], positions: Span) -> Span {
    let spans = slices.iter().filter_map(|s| keys_between(s, positions));
    let hull = spans.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)));
    hull.and_then(|(start, end)| Span::new(start.max(0) as usize, end.max(0) as usize)).unwrap_or_default()
}

/// What the queries in `positions` see of the block that starts at key `block`, `None` when nothing.
pub(super) fn sight(slices: &[BandSlice], positions: Span, block: usize) -> Option<Sight> {
    let first = block as i64;
    let last = first + BLOCK as i64;
    let inside = |(start, end): (i64, i64)| {
        let (start, end) = (start.max(first), end.min(last));
        (start < end).then_some((start, end))
    };
    let seen = slices.iter().filter_map(|s| keys_between(s, positions).and_then(inside));
    let (from, to) = seen.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)))?;
    let from = (from - first) as usize / KEY_STEP * KEY_STEP;
    let to = ((to - first) as usize).next_multiple_of(KEY_STEP);
    let whole = |s: &BandSlice| {
        let (start, _) = keys_at(s, positions.end() - 1);
        let (_, end) = keys_at(s, positions.start());
        s.q().covers(positions) && start <= first + from as i64 && end >= first + to as i64
    };
    Some(Sight { from, to, masked: !slices.iter().any(whole) })
}

/// For each slice that meets the block, for each of `lanes` lanes: half below the first key it sees there, then one
/// past the last, both counted from the block's start. Padding lanes see what the last row sees.
pub(super) fn lane_bounds(
    slices: &[BandSlice],
    lanes: usize,
    positions: &[usize],
    block: usize,
    to: &mut Vec<f32>,
) {
    to.clear();
    let (Some(first), Some(last)) = (positions.first(), positions.last()) else { return };
    let all = Span::at(*first, last + 1 - first);
    let relative = |key: i64| (key - block as i64).clamp(0, BLOCK as i64) as f32;
    for slice in slices {
        let meets = |(start, end): (i64, i64)| start < (block + BLOCK) as i64 && end > block as i64;
        if !keys_between(slice, all).is_some_and(meets) {
            continue;
        }
        let at = to.len();
        to.resize(at + 2 * lanes, 0.0);
        let (starts, ends) = to[at..].split_at_mut(lanes);
        for (lane, (start, end)) in starts.iter_mut().zip(ends).enumerate() {
            let position = positions.get(lane).copied().unwrap_or(*last);
            if slice.q().contains(position) {
                let keys = keys_at(slice, position);
                (*start, *end) = (relative(keys.0) - 0.5, relative(keys.1));
            }
        }
    }
}

/// Sets the scores `[key][lane]` of a panel that are not seen to `-inf`, which exp2 turns into an exact zero.
///
/// # Safety
/// `scores` must be readable and writable for `NV` vectors at each key of `sight`.
#[inline(always)]
pub(super) unsafe fn hide<V: Vector, const NV: usize>(scores: *mut f32, sight: Sight, bounds: &[f32]) {
    let lanes = NV * V::LANES;
    let never = V::splat(f32::NEG_INFINITY);
    let zero = V::splat(0.0);
    for key in sight.from..sight.to {
        let at = V::splat(key as f32);
        for v in 0..NV {
            let mut seen = zero.lt(zero);
            for slice in bounds.chunks_exact(2 * lanes) {
                // SAFETY: a chunk holds two bounds for each lane; the caller vouches for the scores.
                unsafe {
                    let start = V::load(slice.as_ptr().add(v * V::LANES));
                    let end = V::load(slice.as_ptr().add(lanes + v * V::LANES));
                    seen = V::or(seen, V::and(start.lt(at), at.lt(end)));
                }
            }
            // SAFETY: the caller vouches for the scores.
            unsafe {
                let score = scores.add(key * lanes + v * V::LANES);
                V::select(seen, V::load(score), never).store(score);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn band(q: Span, kv: Span, lo: Option<i64>, hi: Option<i64>) -> BandSlice {
        BandSlice::new(q, kv, lo, hi).unwrap()
    }

    #[test]
    fn a_causal_panel_is_masked_on_the_diagonal_only() {
        let slices = [band(Span::to(1000), Span::to(1000), None, Some(0))];
        let rows = Span::at(300, 32);
        assert_eq!(sight(&slices, rows, 128), Some(Sight { from: 0, to: 128, masked: false }));
        assert_eq!(sight(&slices, rows, 256), Some(Sight { from: 0, to: 80, masked: true }));
        assert_eq!(sight(&slices, rows, 384), None);
        assert_eq!(key_hull(&slices, rows), Span::to(332));
    }

    #[test]
    fn a_window_starts_late_and_a_ragged_end_is_masked() {
        let window = [band(Span::to(1000), Span::to(1000), Some(-20), Some(0))];
        assert_eq!(sight(&window, Span::at(300, 8), 256), Some(Sight { from: 24, to: 56, masked: true }));
        let full = [band(Span::to(10), Span::to(131), None, None)];
        assert_eq!(sight(&full, Span::to(10), 0), Some(Sight { from: 0, to: 128, masked: false }));
        assert_eq!(sight(&full, Span::to(10), 128), Some(Sight { from: 0, to: 8, masked: true }));
        assert_eq!(sight(&full, Span::at(20, 4), 0), None);
    }

    #[test]
    fn lane_bounds_agree_with_the_slices() {
        let slices = [
            band(Span::at(10, 20), Span::at(100, 100), Some(95), Some(150)),
            band(Span::at(5, 10), Span::at(0, 3), None, None),
            band(Span::at(0, 40), Span::at(200, 300), None, None),
        ];
        let positions: Vec<usize> = (4..40).collect();
        let mut bounds = Vec::new();
        lane_bounds(&slices, 40, &positions, 128, &mut bounds);
        assert_eq!(bounds.len(), 2 * 2 * 40, "the second slice does not meet the block");
        for (lane, position) in positions.iter().enumerate() {
            for key in 0..BLOCK {
                let seen =
                    bounds.chunks_exact(80).any(|b| b[lane] < key as f32 && (key as f32) < b[40 + lane]);
                let expected = slices.iter().any(|s| s.keys_of(*position).contains(128 + key));
                assert_eq!(seen, expected, "query {position}, key {}", 128 + key);
            }
        }
    }
}
