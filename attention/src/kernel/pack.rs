//! K and V laid out for the micro-kernel.

use super::row::Row;
use super::simd::{MAX_TILE_ROWS, Words};
use super::visibility::{BLOCK, KEY_STEP};
use super::work::{Blocks, HeadWork};
use crate::{AnyTensor, Span};

/// One layout of a block of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// `[key][dim]`: keys are the rows of a product's left operand, dimensions its depth.
    Rows,
    /// `[dim / tile][key][tile]`: dimensions are its rows, keys its depth.
    Strips,
}

/// Words of a row of `dim` elements.
#[inline(always)]
pub(super) fn words<W: Words>(dim: usize) -> usize {
    dim.div_ceil(W::PER_WORD)
}

/// Words that one block of keys of `dim` dimensions takes at most.
#[inline(always)]
pub(super) fn block_len<W: Words>(form: Form, dim: usize) -> usize {
    match form {
        Form::Rows => BLOCK * words::<W>(dim),
        Form::Strips => BLOCK / W::PER_WORD * dim.next_multiple_of(MAX_TILE_ROWS),
    }
}

/// Words from one strip to the next.
#[inline(always)]
pub(super) fn strip_len<W: Words, const MR: usize>() -> usize {
    BLOCK / W::PER_WORD * MR
}

/// Copies the keys of one block, those of `blocks` and zeros for the padding around them. `MR` is the tile of strips.
#[inline(always)]
pub(super) fn pack_block<W: Words, const MR: usize>(
    work: &HeadWork,
    from: &AnyTensor<'_>,
    blocks: Blocks,
    block: usize,
    form: Form,
    to: &mut [f32],
) {
    let held = blocks.keys.intersect(Span::at(block, BLOCK));
    let row = |key: usize| {
        let key = block + key;
        if held.contains(key) { Row::of(from, key - work.kv.start(), work.kv_head) } else { Row::default() }
    };
    let dim = from.shape()[2];
    match form {
        Form::Rows => {
            let width = words::<W>(dim);
            for key in blocks.steps(block).iter() {
                W::of_row(row(key), &mut to[key * width..][..width]);
            }
        }
        Form::Strips => {
            let strips = dim.div_ceil(MR);
            let mut across = [0.0; MAX_DIM];
            let across = &mut across[..strips * MR];
            for key in blocks.steps(block).iter().step_by(W::PER_WORD) {
                W::of_rows(row(key), row(key + W::PER_WORD - 1), across);
                let strips = to.chunks_exact_mut(strip_len::<W, MR>());
                for (strip, words) in strips.zip(across.as_chunks::<MR>().0) {
                    strip[key / W::PER_WORD * MR..][..MR].copy_from_slice(words);
                }
            }
        }
    }
}

/// Largest padded head dimension.
const MAX_DIM: usize = crate::MAX_HEAD_DIM.next_multiple_of(MAX_TILE_ROWS);
const _: () = assert!(KEY_STEP.is_multiple_of(2), "pairs of keys must not straddle steps");
