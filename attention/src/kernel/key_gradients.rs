//! Where a chunk's share of dK and dV is summed.

use super::visibility::BLOCK;
use super::work::{Blocks, HeadWork, Output};
use crate::Span;

/// Rows of a partial share are padded to a multiple of this, the most lanes of any vector.
const PADDING: usize = 16;

/// The share of dK and dV that one chunk sums.
pub(super) enum KeyGradients<'a> {
    /// One of several, summed by [`finish_keys`].
    Partial {
        /// Its layout.
        layout: Partial,
        /// Any content.
        data: &'a mut [f32],
    },
    /// The only one: the results themselves, for these keys of the head.
    Results {
        /// Positions of all keys of the task.
        kv: Span,
        /// The head within the task.
        kv_head: usize,
        /// dK.
        dk: &'a Output,
        /// dV.
        dv: &'a Output,
    },
}

/// Layout of a chunk's dK (not yet scaled) and dV: whole blocks of the keys that its rows see, dK then dV.
#[derive(Clone, Copy, Debug)]
pub(super) struct Partial {
    blocks: Blocks,
    dk_width: usize,
    dv_width: usize,
}

impl Partial {
    pub(super) fn of(work: &HeadWork, rows: Span) -> Self {
        let padded = |dim: usize| dim.next_multiple_of(PADDING);
        let (dk_width, dv_width) = (padded(work.geometry.head_dim()), padded(work.geometry.v_head_dim()));
        Partial { blocks: work.blocks(rows), dk_width, dv_width }
    }

    pub(super) fn len(&self) -> usize {
        self.blocks.count() * BLOCK * (self.dk_width + self.dv_width)
    }

    /// dK and dV of the key at a position, which must lie in the blocks.
    fn rows<'a>(&self, partial: &'a [f32], key: usize) -> (&'a [f32], &'a [f32]) {
        let key = key - self.blocks.base();
        let (dk, dv) = partial.split_at(self.blocks.count() * BLOCK * self.dk_width);
        (&dk[key * self.dk_width..][..self.dk_width], &dv[key * self.dv_width..][..self.dv_width])
    }
}

impl KeyGradients<'_> {
    /// Sets everything to zero.
    ///
    /// # Safety
    /// The results must be in place, and no one else may hold the head's rows of them.
    pub(super) unsafe fn clear(&mut self) {
        match self {
            KeyGradients::Partial { layout, data } => data[..layout.len()].fill(0.0),
            KeyGradients::Results { kv, kv_head, dk, dv } => {
                for token in 0..kv.len() {
                    // SAFETY: the caller vouches for it.
                    unsafe {
                        dk.row(token, *kv_head).fill(0.0);
                        dv.row(token, *kv_head).fill(0.0);
                    }
                }
            }
        }
    }

    /// Scales dK, where it is not left to [`finish_keys`].
    ///
    /// # Safety
    /// As [`KeyGradients::clear`].
    pub(super) unsafe fn finish(&mut self, scale: f32) {
        if let KeyGradients::Results { kv, kv_head, dk, .. } = self {
            for token in 0..kv.len() {
                // SAFETY: the caller vouches for it.
                for dk in unsafe { dk.row(token, *kv_head) } {
                    *dk *= scale;
                }
            }
        }
    }

    /// Where dK and dV of the block at key `block` are to be added: the address of its first key's row, and the
    /// elements from one key to the next. Rows are written up to `padded` elements, for dK and dV. `edge` is room for
    /// a block of both; it is used where rows of the results cannot be written so.
    ///
    /// # Safety
    /// As [`KeyGradients::clear`]. What is returned is good until the next call.
    #[inline(always)]
    pub(super) unsafe fn open(
        &mut self,
        work: &HeadWork,
        block: usize,
        padded: [usize; 2],
        edge: &mut [f32],
    ) -> [(*mut f32, usize); 2] {
        match self {
            KeyGradients::Partial { layout, data } => {
                let (dk, dv) = data.split_at_mut(layout.blocks.count() * BLOCK * layout.dk_width);
                let key = block - layout.blocks.base();
                let at = |to: &mut [f32], width: usize| (to[key * width..].as_mut_ptr(), width);
                [at(dk, layout.dk_width), at(dv, layout.dv_width)]
            }
            KeyGradients::Results { kv, kv_head, dk, dv } => {
                let direct = direct(work, block, padded);
                let (dk_edge, dv_edge) = edge.split_at_mut(BLOCK * padded[0]);
                let at = |output: &Output, edge: &mut [f32], padded: usize| {
                    if direct {
                        return (output.address(block - kv.start(), *kv_head), output.token_stride());
                    }
                    for key in kv.intersect(Span::at(block, BLOCK)).iter() {
                        // SAFETY: the caller vouches for it.
                        let row = unsafe { output.row(key - kv.start(), *kv_head) };
                        let edge = &mut edge[(key - block) * padded..][..padded];
                        edge[..row.len()].copy_from_slice(row);
                    }
                    (edge.as_mut_ptr(), padded)
                };
                [at(dk, dk_edge, padded[0]), at(dv, dv_edge, padded[1])]
            }
        }
    }

    /// Ends what [`KeyGradients::open`] began, with the same arguments.
    ///
    /// # Safety
    /// As [`KeyGradients::clear`].
    #[inline(always)]
    pub(super) unsafe fn close(&mut self, work: &HeadWork, block: usize, padded: [usize; 2], edge: &[f32]) {
        let KeyGradients::Results { kv, kv_head, dk, dv } = self else { return };
        if direct(work, block, padded) {
            return;
        }
        let (dk_edge, dv_edge) = edge.split_at(BLOCK * padded[0]);
        for (output, edge, padded) in [(dk, dk_edge, padded[0]), (dv, dv_edge, padded[1])] {
            for key in kv.intersect(Span::at(block, BLOCK)).iter() {
                // SAFETY: the caller vouches for it.
                let row = unsafe { output.row(key - kv.start(), *kv_head) };
                let edge = &edge[(key - block) * padded..];
                row.copy_from_slice(&edge[..row.len()]);
            }
        }
    }
}

/// True when a block's rows of the results can be added to in whole vectors: all its keys are there, and no row is
/// padded.
fn direct(work: &HeadWork, block: usize, padded: [usize; 2]) -> bool {
    padded == [work.geometry.head_dim(), work.geometry.v_head_dim()] && work.kv.covers(Span::at(block, BLOCK))
}

/// Writes dK and dV of one head: the chunks' shares, summed in order from zero.
///
/// # Safety
/// The results must be in place, and no one else may hold the head's rows of them.
pub(super) unsafe fn finish_keys(work: &HeadWork, chunks: &[(Partial, &[f32])], dk: &Output, dv: &Output) {
    for key in work.kv.iter() {
        let token = key - work.kv.start();
        // SAFETY: the caller vouches for it.
        let (dk, dv) = unsafe { (dk.row(token, work.kv_head), dv.row(token, work.kv_head)) };
        dk.fill(0.0);
        dv.fill(0.0);
        for (layout, partial) in chunks {
            if !layout.blocks.keys.contains(key) {
                continue;
            }
            let (dk_part, dv_part) = layout.rows(partial, key);
            for (sum, part) in dk.iter_mut().zip(dk_part) {
                *sum += part;
            }
            for (sum, part) in dv.iter_mut().zip(dv_part) {
                *sum += part;
            }
        }
        for dk in dk {
            *dk *= work.geometry.scale();
        }
    }
}
