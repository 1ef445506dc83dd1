//! One kv head of one task, as the tiles see it.

use super::row::Row;
use super::simd::Words;
use super::visibility::{BLOCK, KEY_STEP, key_hull};
use crate::{AnyTensor, BandSlice, Direction, HeadGeometry, Span, Task};

/// What a tile needs to know of its kv head. Rows are (position, query head in the group), flattened in this order.
#[derive(Debug)]
pub(super) struct HeadWork {
    pub(super) geometry: HeadGeometry,
    pub(super) direction: Direction,
    /// Index of the kv head within the task.
    pub(super) kv_head: usize,
    pub(super) slices: Vec<BandSlice>,
    /// Query positions of the task.
    pub(super) q: Span,
    /// Positions of the keys that the tensors hold.
    pub(super) kv: Span,
    /// Rows of the head.
    pub(super) rows: usize,
}

impl HeadWork {
    /// `kv` are the positions of the keys that the tensors hold: those of the task, or of a stage of it.
    pub(super) fn new(
        geometry: HeadGeometry,
        direction: Direction,
        task: &Task,
        kv: Span,
        kv_head: usize,
    ) -> Self {
        let slices = task.mask().slices_of(task.kv_heads().start() + kv_head).copied().collect();
        let rows = task.q().len() * geometry.group();
        HeadWork { geometry, direction, kv_head, slices, q: task.q(), kv, rows }
    }

    /// Index of a row's token among the task's, and of its query head.
    pub(super) fn place(&self, row: usize) -> (usize, usize) {
        let group = self.geometry.group();
        (row / group, self.kv_head * group + row % group)
    }

    /// Position of a row's token in the document.
    pub(super) fn position(&self, row: usize) -> usize {
        self.q.start() + row / self.geometry.group()
    }

    /// Positions of the tokens of `rows`, which must not be empty.
    pub(super) fn positions(&self, rows: Span) -> Span {
        let first = self.position(rows.start());
        Span::at(first, self.position(rows.end() - 1) + 1 - first)
    }

    /// Cells of `rows`, each counted once a row.
    pub(super) fn cells(&self, rows: Span) -> u128 {
        let cells =
            |s: &BandSlice| s.clip(self.positions(rows), self.kv).map_or(0, |s| u128::from(s.cells()));
        self.slices.iter().map(cells).sum::<u128>() * self.geometry.group() as u128
    }

    /// The blocks of keys that `rows` see.
    pub(super) fn blocks(&self, rows: Span) -> Blocks {
        if rows.is_empty() {
            return Blocks::default();
        }
        Blocks::of(key_hull(&self.slices, self.positions(rows)).intersect(self.kv))
    }
}

/// Consecutive blocks of keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Blocks {
    /// The keys themselves, as positions.
    pub(super) keys: Span,
}

impl Blocks {
    pub(super) fn of(keys: Span) -> Self {
        Blocks { keys }
    }

    /// Position of the first block's start.
    pub(super) fn base(&self) -> usize {
        self.keys.start() / BLOCK * BLOCK
    }

    pub(super) fn count(&self) -> usize {
        if self.keys.is_empty() { 0 } else { (self.keys.end() - self.base()).div_ceil(BLOCK) }
    }

    /// Positions where the blocks start, in order.
    pub(super) fn starts(&self) -> impl Iterator<Item = usize> + use<> {
        let base = self.base();
        (0..self.count()).map(move |n| base + n * BLOCK)
    }

    /// The keys of one block that must be there to compute in steps: those held, and padding around them. Counted
    /// from the block's start.
    pub(super) fn steps(&self, block: usize) -> Span {
        let held = self.keys.intersect(Span::at(block, BLOCK));
        let from = (held.start() - block) / KEY_STEP * KEY_STEP;
        Span::at(from, (held.end() - block).next_multiple_of(KEY_STEP) - from)
    }
}

/// A result tensor of a task that several threads write, each its own rows.
#[derive(Debug)]
pub(super) struct Output {
    data: *mut f32,
    shape: [usize; 3],
}

// SAFETY: it only carries an address; `row`'s contract keeps writers apart and the buffer alive.
unsafe impl Sync for Output {}
// SAFETY: as for Sync.
unsafe impl Send for Output {}

impl Output {
    /// A contiguous buffer of the given shape.
    ///
    /// # Panics
    /// When it has another length.
    pub(super) fn new(data: &mut [f32], shape: [usize; 3]) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>());
        Output { data: data.as_mut_ptr(), shape }
    }

    /// Where one head of one token starts, for use with [`Output::token_stride`].
    ///
    /// # Panics
    /// When either index is out of range.
    pub(super) fn address(&self, token: usize, head: usize) -> *mut f32 {
        let [tokens, heads, dim] = self.shape;
        assert!(token < tokens && head < heads);
        self.data.wrapping_add((token * heads + head) * dim)
    }

    /// Elements from one token to the next.
    pub(super) fn token_stride(&self) -> usize {
        self.shape[1] * self.shape[2]
    }

    /// `len` elements from `element` on.
    ///
    /// # Safety
    /// The buffer must still be where it was, and no one else may hold the same elements.
    ///
    /// # Panics
    /// When there are fewer elements.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn part(&self, element: usize, len: usize) -> &mut [f32] {
        let all = self.shape.iter().product::<usize>();
        assert!(element <= all && len <= all - element);
        // SAFETY: the elements lie within the buffer by the assertion; the caller vouches for the rest.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(element), len) }
    }

    /// One head of one token.
    ///
    /// # Safety
    /// The buffer must still be where it was, and no one else may hold the same row.
    ///
    /// # Panics
    /// When either index is out of range.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn row(&self, token: usize, head: usize) -> &mut [f32] {
        let [tokens, heads, dim] = self.shape;
        assert!(token < tokens && head < heads);
        // SAFETY: the row lies within the buffer by the assertions; the caller vouches for the rest.
        unsafe { std::slice::from_raw_parts_mut(self.data.add((token * heads + head) * dim), dim) }
    }
}

/// Where the rows of Q or dO lie.
#[derive(Clone, Copy, Debug)]
pub(super) enum QueryRows<'a> {
    /// In a tensor of the caller's.
    View(AnyTensor<'a>),
    /// In the result that will be written over them.
    InPlace(&'a Output),
}

impl QueryRows<'_> {
    /// One head of one token.
    ///
    /// # Safety
    /// As [`Output::row`] where the rows are in place, and no one may write the row while it is borrowed.
    ///
    /// # Panics
    /// When either index is out of range.
    #[inline(always)]
    pub(super) unsafe fn row(&self, token: usize, head: usize) -> Row<'_> {
        match self {
            QueryRows::View(tensor) => Row::of(tensor, token, head),
            // SAFETY: the caller vouches for it.
            QueryRows::InPlace(output) => Row::F32(unsafe { output.row(token, head) }),
        }
    }
}

/// Copies the rows of a panel in words along the rows, padding with zeros to `lanes` rows of `width` words.
///
/// # Safety
/// As [`QueryRows::row`].
#[inline(always)]
pub(super) unsafe fn gather<W: Words>(
    work: &HeadWork,
    from: &QueryRows<'_>,
    rows: Span,
    lanes: usize,
    width: usize,
    to: &mut [f32],
) {
    for (row, to) in rows.iter().zip(to.chunks_exact_mut(width)) {
        let (token, head) = work.place(row);
        // SAFETY: the caller vouches for it, and the borrow ends here.
        W::of_row(unsafe { from.row(token, head) }, to);
    }
    to[rows.len() * width..lanes * width].fill(0.0);
}
