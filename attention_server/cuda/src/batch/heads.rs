//! The kv heads of a task, cut into pieces, and the slabs they share. Pure.

use outboard_attention::{Direction, Span, Task};

use super::pieces::{Cut, Piece, pieces};
use super::places::{LaidTask, call_geometry};

/// One head of one task, while it is laid out.
pub(super) struct Head<'a> {
    pub(super) task: &'a Task,
    pub(super) pieces: Vec<Piece>,
}

/// Which head of which task.
pub(super) struct HeadOf<'a> {
    pub(super) index: usize,
    pub(super) number: usize,
    pub(super) laid: &'a LaidTask<'a>,
}

/// Pieces of a task at most, over all heads. Each costs about a hundred bytes of tables and a sequence of a call.
pub(crate) const MAX_PIECES: usize = 1 << 18;

/// The heads of a task, in order, and their pieces; none when there are too many.
pub(super) fn heads(cut: Cut, task: &Task) -> Option<Vec<Head<'_>>> {
    let mut left = MAX_PIECES;
    let mut heads = Vec::new();
    for head in task.kv_heads().start()..task.kv_heads().end() {
        let mut of_head = Vec::new();
        for slice in task.mask().slices_of(head) {
            pieces(slice, cut, &mut of_head, left)?;
        }
        left -= of_head.len();
        heads.push(Head { task, pieces: of_head });
    }
    Some(heads)
}

/// Whether the tensors of a task can be used in place: cuDNN then reads the heads of each token where they lie, and forward
/// writes O and LSE where they belong. Depends on the task alone.
pub(super) fn fits_in_place(cut: Cut, laid: &LaidTask<'_>, heads: &[Head<'_>]) -> bool {
    let LaidTask { geometry, task } = laid;
    let dims = [geometry.head_dim(), geometry.v_head_dim()];
    // Parts of the heads go through slabs: otherwise each number of heads would need plans of its own.
    let whole = task.kv_heads().len() == geometry.kv_heads();
    let straight = heads.iter().all(|head| !head.has(true));
    let rows_once = |head: &Head<'_>| {
        head.has_single_rows() && head.pieces.iter().map(|p| p.q.len()).sum::<usize>() == task.q().len()
    };
    dims == [call_geometry(geometry).dim; 2]
        && whole
        && straight
        && (cut.direction == Direction::Backward || heads.iter().all(rows_once))
}

impl Head<'_> {
    /// True when no row is in more than one piece.
    pub(super) fn has_single_rows(&self) -> bool {
        let mut spans: Vec<Span> = self.pieces.iter().map(|piece| piece.q).collect();
        spans.sort_by_key(|span| span.start());
        spans.windows(2).all(|pair| pair[0].end() <= pair[1].start())
    }

    pub(super) fn has(&self, reversed: bool) -> bool {
        self.pieces.iter().any(|piece| piece.reversed == reversed)
    }
}

/// Rows or keys of slabs: where the forward and the reversed one of a head start.
#[derive(Clone, Copy, Default)]
pub(super) struct Slab {
    forward: usize,
    reversed: usize,
}

impl Slab {
    pub(super) fn take(next: &mut usize, len: usize, head: &Head<'_>) -> Slab {
        let mut take = |wanted: bool| {
            let start = *next;
            *next += if wanted { len } else { 0 };
            start
        };
        Slab { forward: take(head.has(false)), reversed: take(head.has(true)) }
    }

    pub(super) fn start(&self, reversed: bool) -> usize {
        if reversed { self.reversed } else { self.forward }
    }

    /// Where `part` of the positions `all` starts, in the order of the slab.
    pub(super) fn place(&self, all: Span, part: Span, reversed: bool) -> usize {
        match reversed {
            false => self.forward + part.start() - all.start(),
            true => self.reversed + all.end() - part.end(),
        }
    }
}
