//! K and V laid out for the micro-kernel, once for all tiles of a head.

use super::visibility::BLOCK;
use super::work::{Blocks, HeadWork};
use crate::{Span, TensorView};

/// One layout of a block of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// `[key][dim]`: keys are the rows of a product's left operand.
    Rows,
    /// `[dim / tile][key][tile]`: dimensions are its rows, keys its depth.
    Strips {
        /// Rows of a register tile.
        tile: usize,
    },
}

/// Elements of one block of keys of `dim` dimensions.
pub(super) fn block_len(form: Form, dim: usize) -> usize {
    match form {
        Form::Rows => BLOCK * dim,
        Form::Strips { tile } => BLOCK * dim.next_multiple_of(tile),
    }
}

/// Copies the keys of one block, those of `blocks` and zeros for the padding around them.
pub(super) fn pack_block(
    work: &HeadWork,
    from: TensorView<'_>,
    blocks: Blocks,
    block: usize,
    form: Form,
    to: &mut [f32],
) {
    let dim = from.shape()[2];
    let held = blocks.keys.intersect(Span::at(block, BLOCK));
    let row = |key: usize| from.row(key - work.kv.start(), work.kv_head);
    match form {
        Form::Rows => {
            for key in blocks.steps(block).iter() {
                let to = &mut to[key * dim..][..dim];
                if held.contains(block + key) { to.copy_from_slice(row(block + key)) } else { to.fill(0.0) }
            }
        }
        Form::Strips { tile } => {
            for (strip, to) in to.chunks_exact_mut(BLOCK * tile).enumerate() {
                let width = tile.min(dim - strip * tile);
                for key in blocks.steps(block).iter() {
                    let to = &mut to[key * tile..][..tile];
                    to.fill(0.0);
                    if held.contains(block + key) {
                        to[..width].copy_from_slice(&row(block + key)[strip * tile..][..width]);
                    }
                }
            }
        }
    }
}
