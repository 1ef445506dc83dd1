//! K and V laid out for the micro-kernel, once for all tiles of a head.

use super::dispatch::MAX_TILE_ROWS;
use super::vector::Vector;
use super::visibility::{BLOCK, KEY_STEP};
use super::work::{Blocks, HeadWork};
use crate::{Span, TensorView};

/// One layout of a block of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// `[key][dim]`: keys are the rows of a product's left operand.
    Rows,
    /// `[dim / tile][key][tile]`: dimensions are its rows, keys its depth.
    Strips,
}

/// Elements that one block of keys of `dim` dimensions takes at most.
pub(super) fn block_len(form: Form, dim: usize) -> usize {
    match form {
        Form::Rows => BLOCK * dim,
        Form::Strips => BLOCK * dim.next_multiple_of(MAX_TILE_ROWS),
    }
}

/// Copies the keys of one block, those of `blocks` and zeros for the padding around them. `MR` is the tile of strips.
#[inline(always)]
pub(super) fn pack_block<V: Vector, const MR: usize>(
    work: &HeadWork,
    from: TensorView<'_>,
    blocks: Blocks,
    block: usize,
    form: Form,
    to: &mut [f32],
) {
    let dim = from.shape()[2];
    let held = blocks.keys.intersect(Span::at(block, BLOCK));
    let row = |key: usize| {
        held.contains(block + key).then(|| from.row(block + key - work.kv.start(), work.kv_head))
    };
    match form {
        Form::Rows => {
            for key in blocks.steps(block).iter() {
                copy_padded::<V>(row(key).unwrap_or_default(), &mut to[key * dim..][..dim]);
            }
        }
        Form::Strips => {
            // A step of keys at a time, so that each strip gets whole cache lines.
            for step in blocks.steps(block).iter().step_by(KEY_STEP) {
                let rows: [&[f32]; KEY_STEP] = std::array::from_fn(|n| row(step + n).unwrap_or_default());
                for (strip, to) in to.chunks_exact_mut(BLOCK * MR).enumerate() {
                    let (to, _) = to[step * MR..][..KEY_STEP * MR].as_chunks_mut::<MR>();
                    for (to, row) in to.iter_mut().zip(rows) {
                        let rest = row.get(strip * MR..).unwrap_or_default();
                        match rest.first_chunk::<MR>() {
                            Some(whole) => *to = *whole,
                            None => {
                                *to = [0.0; MR];
                                to[..rest.len()].copy_from_slice(rest);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Copies `from` to the start of `to` and zeroes the rest. Short rows are common, and a call to copy each is not cheap.
#[inline(always)]
pub(super) fn copy_padded<V: Vector>(from: &[f32], to: &mut [f32]) {
    let (from, to) = (from, &mut to[..]);
    let whole = from.len().min(to.len()) / V::LANES * V::LANES;
    for at in (0..whole).step_by(V::LANES) {
        // SAFETY: both hold `whole` elements, a multiple of a vector.
        unsafe { V::load(from.as_ptr().add(at)).store(to.as_mut_ptr().add(at)) }
    }
    for (at, to) in to.iter_mut().enumerate().skip(whole) {
        *to = from.get(at).copied().unwrap_or(0.0);
    }
}
