//! Cuts band slices into pieces whose mask cuDNN has a fast kernel for. Pure.
//!
//! Cells are those of a rectangle, or of a lower triangle or trapezoid whose last row sees every key.
//! A band slice is cut by rows where its upper or lower end begins or ceases to bind. Where only the lower end binds,
//! the piece is turned round: with rows and keys in reverse order it is a triangle like any other. Where both bind,
//! short blocks of rows have a triangle at either end.
//!
//! Cuts depend on the slice alone, so the pieces of a task, and with them its bits, are the same in any batch.

use outboard_attention::{BandSlice, Direction, Span};

/// Rows of a forward piece at most: long ones are cut so that those with the most keys can start first. The kernel works
/// on tiles of 128 rows, so a cut at a multiple changes no bit.
pub(crate) const MAX_FORWARD_ROWS: usize = 4096;
/// Rows of a block where both ends of the band bind, at most.
const MAX_BAND_ROWS: usize = 2048;

/// Which cells of a piece count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Shape {
    /// All.
    Full,
    /// As many rows as keys: row `r` sees the first `r + 1` keys.
    Triangle,
    /// Row `r` of `n` sees the first `keys - (n - 1 - r)` keys: the last row sees all.
    Causal,
}

/// A part of a task's mask that is one sequence of a cuDNN call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Query positions.
    pub(crate) q: Span,
    /// Key positions.
    pub(crate) kv: Span,
    /// Which cells count.
    pub(crate) shape: Shape,
    /// True when rows and keys run from the last to the first.
    pub(crate) reversed: bool,
}

/// How the pieces of a direction must look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) direction: Direction,
    /// Whether backward sums in a fixed order. The kernel that does adds to dQ in the order of the keys, and skips nothing
    /// that is hidden: rows wait for each other less where a piece has as many rows as keys, and triangles are best cut
    /// into squares and small triangles.
    pub(crate) ordered: bool,
    /// Whether tensors may be used in place.
    pub(crate) in_place: bool,
}

/// Rows that share a tile of the kernels.
const TILE_ROWS: usize = 128;
/// Backward, a trapezoid of so many keys for each row, and of few rows, is one piece. The kernel computes what its triangle
/// hides, which is then a fifteenth of the work at most, and less than a second call would take.
const TAIL_KEYS: usize = 8;
const MAX_TAIL_ROWS: usize = 1024;
/// Keys of an ordered full piece at least.
const MIN_ORDERED_KEYS: usize = 256;
/// Rows of an ordered triangle at most.
const MAX_ORDERED_TRIANGLE: usize = 2048;

impl Piece {
    /// The piece's rows `from..to` in its own order.
    fn rows(&self, from: usize, to: usize) -> Span {
        match self.reversed {
            false => Span::at(self.q.start() + from, to - from),
            true => Span::at(self.q.end() - to, to - from),
        }
    }

    /// The piece's keys `from..to` in its own order.
    fn keys(&self, from: usize, to: usize) -> Span {
        match self.reversed {
            false => Span::at(self.kv.start() + from, to - from),
            true => Span::at(self.kv.end() - to, to - from),
        }
    }

    /// Number of cells.
    #[cfg(test)]
    pub(crate) fn cells(&self) -> u64 {
        let (rows, keys) = (self.q.len() as u64, self.kv.len() as u64);
        match self.shape {
            Shape::Full => rows * keys,
            Shape::Triangle | Shape::Causal => rows * keys - rows * (rows - 1) / 2,
        }
    }
}

impl Cut {
    /// The shapes that pieces may have.
    pub(crate) fn shapes(self) -> &'static [Shape] {
        match self.direction {
            Direction::Backward if !self.ordered => &[Shape::Full, Shape::Triangle, Shape::Causal],
            _ => &[Shape::Full, Shape::Causal],
        }
    }
}

/// Appends the pieces of `slice`, disjoint and with exactly its cells, in a fixed order. None, and not all of them, when
/// `pieces` then has more than `max`.
pub(crate) fn pieces(slice: &BandSlice, cut: Cut, pieces: &mut Vec<Piece>, max: usize) -> Option<()> {
    for region in regions(slice, max)? {
        match cut.direction {
            Direction::Forward => cut_rows(&region, pieces),
            Direction::Backward if is_tail(&region, cut.ordered) => pieces.push(region),
            Direction::Backward => cut_squares(&region, cut.ordered, pieces),
        }
        if pieces.len() > max {
            return None;
        }
    }
    Some(())
}

/// The slice as rectangles and trapezoids, none when they are more than `max`.
fn regions(slice: &BandSlice, max: usize) -> Option<Vec<Piece>> {
    // Positions are at most 2^30 and band ends any i64, so sums are taken in i128 and clamped to the rows.
    let (first, end) = (slice.q().start() as i128, slice.q().end() as i128);
    let (left, right) = (slice.kv().start() as i128, slice.kv().end() as i128);
    let lo = slice.lo().map(i128::from);
    let hi = slice.hi().map(i128::from);
    // The rows that see a key, and where each end binds.
    let begins = hi.map_or(first, |hi| first.max(left - hi));
    let ends = lo.map_or(end, |lo| end.min(right - lo));
    if begins >= ends {
        return Some(Vec::new());
    }
    // A row that an end just touches is as well in the triangle as beside it.
    let upper_until = hi.map_or(begins, |hi| (right - hi).clamp(begins, ends));
    let lower_from = lo.map_or(ends, |lo| (left - lo).clamp(begins, ends));
    let span = |from: i128, to: i128| Span::at(from as usize, (to - from) as usize);
    let mut regions = Vec::new();
    let mut push = |rows: (i128, i128), keys: (i128, i128), shape, reversed| {
        if rows.0 < rows.1 && keys.0 < keys.1 {
            regions.push(Piece { q: span(rows.0, rows.1), kv: span(keys.0, keys.1), shape, reversed });
        }
    };
    let (early, late) = (upper_until.min(lower_from), upper_until.max(lower_from));
    // Rows before both: only the upper end binds.
    if let Some(hi) = hi {
        push((begins, early), (left, early + hi), Shape::Causal, false);
    }
    match (lo, hi) {
        // Both bind between.
        (Some(lo), Some(hi)) if lower_from < upper_until => {
            let block = (hi - lo + 1).min(MAX_BAND_ROWS as i128);
            if (late - early) / block > max as i128 {
                return None;
            }
            let mut from = early;
            while from < late {
                // Blocks end at multiples of their size, so that a cut of the task by rows moves none.
                let to = ((from / block + 1) * block).min(late);
                let middle = to - 1 + lo;
                push((from, to - 1), (from + lo, middle), Shape::Causal, true);
                push((from, to), (middle, to + hi), Shape::Causal, false);
                from = to;
            }
        }
        // Neither does.
        _ => push((early, late), (left, right), Shape::Full, false),
    }
    // Rows after both: only the lower end binds.
    if let Some(lo) = lo {
        push((late, ends), (late + lo, right), Shape::Causal, true);
    }
    Some(regions)
}

/// Cuts a region into blocks of rows, from its first on.
fn cut_rows(region: &Piece, pieces: &mut Vec<Piece>) {
    let (rows, keys) = (region.q.len(), region.kv.len());
    let mut from = 0;
    while from < rows {
        let to = (from + MAX_FORWARD_ROWS).min(rows);
        let seen = match region.shape {
            Shape::Full => keys,
            Shape::Triangle | Shape::Causal => keys - (rows - to),
        };
        pieces.push(Piece { q: region.rows(from, to), kv: region.keys(0, seen), ..*region });
        from = to;
    }
}

/// Whether a region is computed backward as it is.
fn is_tail(region: &Piece, ordered: bool) -> bool {
    let (rows, keys) = (region.q.len(), region.kv.len());
    let few = rows <= TILE_ROWS || rows <= MAX_TAIL_ROWS.min(keys / TAIL_KEYS);
    region.shape == Shape::Causal && !ordered && rows < keys && few
}

/// Cuts a trapezoid into rectangles and square triangles.
fn cut_squares(region: &Piece, ordered: bool, pieces: &mut Vec<Piece>) {
    let (rows, keys) = (region.q.len(), region.kv.len());
    let full = match region.shape {
        Shape::Full => keys,
        Shape::Triangle | Shape::Causal => keys - rows,
    };
    // The kernels skip what is hidden only where the first row sees the first key. The one that sums in a fixed order skips
    // nothing either way, and is slower then.
    let triangle = if ordered { Shape::Causal } else { Shape::Triangle };
    let part = |rows: (usize, usize), keys: (usize, usize), shape| Piece {
        q: region.rows(rows.0, rows.1),
        kv: region.keys(keys.0, keys.1),
        shape,
        ..*region
    };
    let block = if ordered { rows.next_multiple_of(TILE_ROWS).max(MIN_ORDERED_KEYS) } else { full.max(1) };
    for from in (0..full).step_by(block) {
        pieces.push(part((0, rows), (from, (from + block).min(full)), Shape::Full));
    }
    if region.shape == Shape::Full {
        return;
    }
    // Triangles that are still to be cut, as ranges of rows, the first on top.
    let mut triangles = vec![(0, rows)];
    while let Some((from, to)) = triangles.pop() {
        if !ordered || to - from <= MAX_ORDERED_TRIANGLE {
            pieces.push(part((from, to), (full + from, full + to), triangle));
            continue;
        }
        let middle = from + ((to - from) / 2).next_multiple_of(TILE_ROWS);
        pieces.push(part((middle, to), (full + from, full + middle), Shape::Full));
        triangles.extend([(middle, to), (from, middle)]);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    const CUTS: [Cut; 3] = [
        Cut { direction: Direction::Forward, ordered: false, in_place: true },
        Cut { direction: Direction::Backward, ordered: false, in_place: true },
        Cut { direction: Direction::Backward, ordered: true, in_place: true },
    ];

    fn sees(piece: &Piece, i: usize, j: usize) -> bool {
        if !piece.q.contains(i) || !piece.kv.contains(j) {
            return false;
        }
        let (row, key) = match piece.reversed {
            false => (i - piece.q.start(), j - piece.kv.start()),
            true => (piece.q.end() - 1 - i, piece.kv.end() - 1 - j),
        };
        piece.shape == Shape::Full || key + piece.q.len() <= piece.kv.len() + row
    }

    fn pieces(slice: &BandSlice, cut: Cut) -> Vec<Piece> {
        let mut pieces = Vec::new();
        super::pieces(slice, cut, &mut pieces, usize::MAX).unwrap();
        pieces
    }

    fn check(q: Span, kv: Span, lo: Option<i64>, hi: Option<i64>) {
        let slice = BandSlice::new(q, kv, lo, hi).unwrap();
        for cut in CUTS {
            let pieces = pieces(&slice, cut);
            let cells: u64 = pieces.iter().map(Piece::cells).sum();
            assert_eq!(cells, slice.cells(), "{slice:?} {cut:?} {pieces:?}");
            for piece in &pieces {
                assert!(piece.shape == Shape::Full || piece.q.len() <= piece.kv.len(), "{piece:?}");
                assert!(cut.shapes().contains(&piece.shape), "{piece:?}");
                if piece.shape == Shape::Triangle || cut.ordered && piece.shape == Shape::Causal {
                    assert_eq!(piece.q.len(), piece.kv.len(), "{piece:?}");
                }
                if cut.direction == Direction::Forward {
                    assert!(piece.q.len() <= MAX_FORWARD_ROWS);
                }
            }
            if q.len() * kv.len() > 40_000 {
                continue;
            }
            for i in q.start()..q.end() {
                for j in kv.start()..kv.end() {
                    let seen = pieces.iter().filter(|piece| sees(piece, i, j)).count();
                    let counts = slice.keys_of(i).contains(j);
                    assert_eq!(seen, usize::from(counts), "({i}, {j}) of {slice:?} {cut:?} {pieces:?}");
                }
            }
        }
    }

    #[test]
    fn pieces_have_exactly_the_cells_of_every_small_slice() {
        for (q, kv) in
            [((0, 5), (0, 5)), ((3, 4), (0, 7)), ((0, 7), (3, 4)), ((6, 3), (0, 4)), ((0, 1), (0, 1))]
        {
            let ends = || std::iter::once(None).chain((-11..=11).map(Some));
            for lo in ends() {
                for hi in ends() {
                    if lo.zip(hi).is_none_or(|(lo, hi)| lo <= hi) {
                        check(Span::at(q.0, q.1), Span::at(kv.0, kv.1), lo, hi);
                    }
                }
            }
        }
    }

    /// More rows than are one piece backward.
    #[test]
    fn pieces_of_many_rows_have_exactly_the_cells_of_their_slice() {
        for (lo, hi) in
            [(None, Some(0)), (None, Some(-40)), (Some(20), None), (Some(-10), Some(30)), (None, Some(250))]
        {
            check(Span::at(30, 150), Span::at(10, 240), lo, hi);
        }
    }

    #[test]
    fn long_slices_are_cut_without_loss() {
        let tail = Span::at(70_000, 30_000);
        for (lo, hi) in [
            (None, None),
            (None, Some(0)),
            (Some(0), None),
            (Some(-1023), Some(0)),
            (Some(-5000), Some(3)),
            (Some(-40_000), Some(-20_000)),
            (Some(i64::MIN), Some(i64::MAX)),
        ] {
            check(tail, Span::to(100_000), lo, hi);
            check(Span::to(3000), Span::to(100_000), lo, hi);
        }
    }

    #[test]
    fn a_mask_of_too_many_pieces_is_given_up() {
        let all = Span::to(1 << 30);
        let diagonal = BandSlice::new(all, all, Some(0), Some(0)).unwrap();
        for cut in CUTS {
            let mut pieces = Vec::new();
            assert!(super::pieces(&diagonal, cut, &mut pieces, 1000).is_none());
            assert!(pieces.len() < 100_000);
        }
    }

    #[test]
    fn a_cut_by_rows_moves_no_block_of_a_band() {
        let (kv, lo, hi) = (Span::to(9000), Some(-700), Some(5));
        let of = |q| pieces(&BandSlice::new(q, kv, lo, hi).unwrap(), CUTS[0]);
        let whole = of(Span::to(9000));
        let (first, second) = (of(Span::at(0, 706 * 4)), of(Span::at(706 * 4, 9000 - 706 * 4)));
        assert_eq!([first, second].concat(), whole);
    }

    #[test]
    fn a_short_causal_tail_is_one_piece_and_a_long_one_two_backward() {
        let tail = |rows, keys| {
            let slice = BandSlice::new(Span::at(keys - rows, rows), Span::to(keys), None, Some(0)).unwrap();
            CUTS.map(|cut| pieces(&slice, cut))
        };
        for (rows, keys) in [(1, 2), (128, 200), (500, 4000), (1024, 10_000)] {
            let [forward, backward, _] = tail(rows, keys);
            assert_eq!((forward.len(), &forward), (1, &backward));
        }
        for (rows, keys) in [(129, 200), (501, 4000), (1025, 10_000)] {
            let [forward, backward, _] = tail(rows, keys);
            assert_eq!((forward.len(), backward.len()), (1, 2));
            assert_eq!((backward[0].shape, backward[0].kv), (Shape::Full, Span::to(keys - rows)));
            assert_eq!((backward[1].shape, backward[1].kv), (Shape::Triangle, Span::at(keys - rows, rows)));
        }
    }
}
