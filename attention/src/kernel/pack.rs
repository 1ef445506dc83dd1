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
            // A step of keys at a time, so that each strip gets whole cache lines.
            let strips = dim.div_ceil(MR);
            let mut across = [[0.0; MAX_DIM]; KEY_STEP];
            let across = &mut across[..KEY_STEP / W::PER_WORD];
            for step in blocks.steps(block).iter().step_by(KEY_STEP) {
                for (n, across) in across.iter_mut().enumerate() {
                    let key = step + n * W::PER_WORD;
                    W::of_rows(row(key), row(key + W::PER_WORD - 1), &mut across[..strips * MR]);
                }
                let at = step / W::PER_WORD * MR;
                for (strip, to) in to.chunks_exact_mut(strip_len::<W, MR>()).take(strips).enumerate() {
                    let (to, _) = to[at..][..KEY_STEP / W::PER_WORD * MR].as_chunks_mut::<MR>();
                    for (to, across) in to.iter_mut().zip(across.iter()) {
                        if let Some(words) = across[strip * MR..].first_chunk::<MR>() {
                            *to = *words;
                        }
                    }
                }
            }
        }
    }
}

/// Largest padded head dimension.
const MAX_DIM: usize = crate::MAX_HEAD_DIM.next_multiple_of(MAX_TILE_ROWS);
const _: () = assert!(KEY_STEP.is_multiple_of(2), "pairs of keys must not straddle steps");
