//! Where a tile finds the keys of its blocks.
//!
//! Products need K as rows, for the scores; the forward pass V as strips; the backward pass V as rows and K as strips.

use super::pack::{Form, block_len, pack_block, words};
use super::simd::{Program, Words};
use super::visibility::BLOCK;
use super::work::{Blocks, HeadWork};
use crate::{AnyTensor, Direction, Span, TensorView};

/// K and V of the keys that a head's work has.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeyTensors<'a> {
    /// `[keys, kv heads, head_dim]`.
    pub(super) k: AnyTensor<'a>,
    /// `[keys, kv heads, v_head_dim]`.
    pub(super) v: AnyTensor<'a>,
}

/// Packs the keys of a head, block by block.
pub(super) struct Pack<'a> {
    pub(super) work: &'a HeadWork,
    pub(super) tensors: KeyTensors<'a>,
    pub(super) blocks: Blocks,
    pub(super) to: &'a mut [f32],
}

/// Words that [`Pack`] fills.
pub(super) struct PackLen<'a> {
    pub(super) work: &'a HeadWork,
    pub(super) blocks: Blocks,
}

/// The keys of a tile.
#[derive(Clone, Copy)]
pub(super) enum KeySource<'a> {
    /// What [`Pack`] made for all tiles of the head.
    Packed {
        /// The blocks packed.
        blocks: Blocks,
        /// Block after block.
        words: &'a [f32],
    },
    /// The tensors themselves: the tile is the head's only one, and packs a block when it comes to it.
    Tensors(KeyTensors<'a>),
}

/// The keys of one block, for products. Pointers are good for the keys that the block holds.
pub(super) struct BlockKeys {
    pub(super) k: KeyRows,
    /// Backward only.
    pub(super) v: KeyRows,
    /// Of V forward, of K backward.
    pub(super) strips: *const f32,
}

/// Key `n` of a block has its words at `n * stride`.
#[derive(Clone, Copy)]
pub(super) struct KeyRows {
    pub(super) first: *const f32,
    pub(super) stride: usize,
}

/// Where the parts of a packed block start, and where it ends.
struct BlockLayout {
    v: usize,
    strips: usize,
    end: usize,
}

impl BlockLayout {
    #[inline(always)]
    fn of<W: Words>(work: &HeadWork) -> Self {
        let (dim, v_dim) = (work.geometry.head_dim(), work.geometry.v_head_dim());
        let v = block_len::<W>(Form::Rows, dim);
        let (strips, strip_dim) = match work.direction {
            Direction::Forward => (v, v_dim),
            Direction::Backward => (v + block_len::<W>(Form::Rows, v_dim), dim),
        };
        BlockLayout { v, strips, end: strips + block_len::<W>(Form::Strips, strip_dim) }
    }

    /// The parts of a block packed at `at`.
    #[inline(always)]
    fn keys<W: Words>(&self, work: &HeadWork, at: &[f32]) -> BlockKeys {
        let rows = |from: usize, dim| KeyRows { first: at[from..].as_ptr(), stride: words::<W>(dim) };
        let (dim, v_dim) = (work.geometry.head_dim(), work.geometry.v_head_dim());
        BlockKeys { k: rows(0, dim), v: rows(self.v, v_dim), strips: at[self.strips..].as_ptr() }
    }
}

/// Words of a block that a tile packs itself.
#[inline(always)]
pub(super) fn own_block_len<W: Words>(work: &HeadWork) -> usize {
    BlockLayout::of::<W>(work).end
}

impl Program for PackLen<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<W: Words, const MR: usize, const NV: usize>(self) -> usize {
        self.blocks.count() * own_block_len::<W>(self.work)
    }
}

impl Program for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<W: Words, const MR: usize, const NV: usize>(self) {
        let Pack { work, tensors, blocks, to } = self;
        for (block, to) in blocks.starts().zip(to.chunks_exact_mut(own_block_len::<W>(work))) {
            pack_rows::<W, MR>(work, &tensors, blocks, block, to);
            pack_strips::<W, MR>(work, &tensors, blocks, block, to);
        }
    }
}

#[inline(always)]
fn pack_rows<W: Words, const MR: usize>(
    work: &HeadWork,
    tensors: &KeyTensors<'_>,
    blocks: Blocks,
    block: usize,
    to: &mut [f32],
) {
    let layout = BlockLayout::of::<W>(work);
    pack_block::<W, MR>(work, &tensors.k, blocks, block, Form::Rows, &mut to[..layout.v]);
    if work.direction == Direction::Backward {
        pack_block::<W, MR>(work, &tensors.v, blocks, block, Form::Rows, &mut to[layout.v..layout.strips]);
    }
}

#[inline(always)]
fn pack_strips<W: Words, const MR: usize>(
    work: &HeadWork,
    tensors: &KeyTensors<'_>,
    blocks: Blocks,
    block: usize,
    to: &mut [f32],
) {
    let layout = BlockLayout::of::<W>(work);
    let tensor = match work.direction {
        Direction::Forward => &tensors.v,
        Direction::Backward => &tensors.k,
    };
    pack_block::<W, MR>(work, tensor, blocks, block, Form::Strips, &mut to[layout.strips..layout.end]);
}

impl KeySource<'_> {
    /// The keys of the block that starts at key `block`. `own` has room for one that must be packed; what is returned
    /// points there, or into the source, and is good until `own` is written again.
    #[inline(always)]
    pub(super) fn block<W: Words, const MR: usize>(
        &self,
        work: &HeadWork,
        block: usize,
        own: &mut [f32],
    ) -> BlockKeys {
        let layout = BlockLayout::of::<W>(work);
        match self {
            KeySource::Packed { blocks, words } => {
                let packed = &words[(block - blocks.base()) / BLOCK * layout.end..][..layout.end];
                layout.keys::<W>(work, packed)
            }
            KeySource::Tensors(tensors) => {
                let held = Span::at(block, BLOCK);
                let blocks = Blocks::of(work.kv.intersect(held));
                pack_strips::<W, MR>(work, tensors, blocks, block, own);
                // Rows of f32 one after another need no packing, unless padding must stand in for keys that are not there.
                // Rows far apart do: at a distance of a power of two they would drive each other from the caches.
                if let (AnyTensor::F32(k), AnyTensor::F32(v)) = (&tensors.k, &tensors.v)
                    && W::PER_WORD == 1
                    && work.kv.covers(held)
                    && [k, v].iter().all(|tensor| tensor.stride() == tensor.shape()[2])
                {
                    let mut keys = layout.keys::<W>(work, own);
                    for (rows, tensor) in [(&mut keys.k, k), (&mut keys.v, v)] {
                        let first = from_row(tensor, block - work.kv.start(), work.kv_head).as_ptr();
                        *rows = KeyRows { first, stride: tensor.stride() };
                    }
                    return keys;
                }
                pack_rows::<W, MR>(work, tensors, blocks, block, own);
                layout.keys::<W>(work, own)
            }
        }
    }
}

/// The elements from one head of one token on, to the end of the storage.
fn from_row<'a, T>(view: &TensorView<'a, T>, token: usize, head: usize) -> &'a [T] {
    &view.data()[token * view.stride() + head * view.shape()[2]..]
}
