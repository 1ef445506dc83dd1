//! Where a tile finds the keys of its blocks.
//!
//! Products need K as rows, for the scores; the forward pass V as strips; the backward pass V as rows and K as strips.

use super::pack::{Form, block_len, pack_block, words};
use super::row::Row;
use super::simd::{Program, Vector, Words};
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
pub(super) struct BlockKeys<'a> {
    pub(super) k: KeyRows,
    /// Backward only.
    pub(super) v: KeyRows,
    /// Of V forward, of K backward.
    strips: KeyStrips<'a>,
}

enum KeyStrips<'a> {
    Packed(*const f32),
    /// What they will be made of can be asked for while the rows are in use.
    Unpacked {
        work: &'a HeadWork,
        tensors: &'a KeyTensors<'a>,
        block: usize,
        to: &'a mut [f32],
    },
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

    /// K and V of a block whose rows are packed at `at`.
    #[inline(always)]
    fn rows<W: Words>(&self, work: &HeadWork, at: &[f32]) -> [KeyRows; 2] {
        let rows = |from: usize, dim| KeyRows { first: at[from..].as_ptr(), stride: words::<W>(dim) };
        [rows(0, work.geometry.head_dim()), rows(self.v, work.geometry.v_head_dim())]
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
            let layout = BlockLayout::of::<W>(work);
            pack_strips::<W, MR>(work, &tensors, blocks, block, &mut to[layout.strips..layout.end]);
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

/// `to` has room for the strips alone.
#[inline(always)]
fn pack_strips<W: Words, const MR: usize>(
    work: &HeadWork,
    tensors: &KeyTensors<'_>,
    blocks: Blocks,
    block: usize,
    to: &mut [f32],
) {
    pack_block::<W, MR>(work, tensors.of_strips(work), blocks, block, Form::Strips, to);
}

impl<'a> KeyTensors<'a> {
    /// The tensor that strips are made of.
    fn of_strips(&self, work: &HeadWork) -> &AnyTensor<'a> {
        match work.direction {
            Direction::Forward => &self.v,
            Direction::Backward => &self.k,
        }
    }
}

impl BlockKeys<'_> {
    /// The strips, which are packed now if they are not yet.
    #[inline(always)]
    pub(super) fn strips<W: Words, const MR: usize>(&mut self) -> *const f32 {
        match &mut self.strips {
            KeyStrips::Packed(first) => *first,
            KeyStrips::Unpacked { work, tensors, block, to } => {
                let blocks = Blocks::of(work.kv.intersect(Span::at(*block, BLOCK)));
                pack_strips::<W, MR>(work, tensors, blocks, *block, to);
                let first = to.as_ptr();
                self.strips = KeyStrips::Packed(first);
                first
            }
        }
    }

    /// Asks for what the strips of `keys`, counted from the block's start, will be made of.
    #[inline(always)]
    pub(super) fn ask_for_strips<V: Vector>(&self, keys: Span) {
        if let KeyStrips::Unpacked { work, tensors, block, .. } = &self.strips {
            ask_for::<V>(work, tensors.of_strips(work), Span::at(block + keys.start(), keys.len()));
        }
    }
}

/// Asks for the rows of the keys at some positions, as far as they are there.
#[inline(always)]
fn ask_for<V: Vector>(work: &HeadWork, tensor: &AnyTensor<'_>, keys: Span) {
    for key in keys.intersect(work.kv).iter() {
        Row::of(tensor, key - work.kv.start(), work.kv_head).prefetch::<V>();
    }
}

impl<'a> KeySource<'a> {
    /// Asks for the rows of K at some positions, if they are yet to be packed or read where they lie.
    #[inline(always)]
    pub(super) fn ask_for_rows<V: Vector>(&self, work: &HeadWork, keys: Span) {
        if let KeySource::Tensors(tensors) = self {
            ask_for::<V>(work, &tensors.k, keys);
        }
    }

    /// The keys of the block that starts at key `block`. `own` has room for one that must be packed; what is returned
    /// points there, or into the source, and is good until `own` is written again.
    #[inline(always)]
    pub(super) fn block<'b, W: Words, const MR: usize>(
        &'b self,
        work: &'b HeadWork,
        block: usize,
        own: &'b mut [f32],
    ) -> BlockKeys<'b> {
        let layout = BlockLayout::of::<W>(work);
        match self {
            KeySource::Packed { blocks, words } => {
                let packed = &words[(block - blocks.base()) / BLOCK * layout.end..][..layout.end];
                let [k, v] = layout.rows::<W>(work, packed);
                BlockKeys { k, v, strips: KeyStrips::Packed(packed[layout.strips..].as_ptr()) }
            }
            KeySource::Tensors(tensors) => {
                let held = Span::at(block, BLOCK);
                let (rows, strips) = own[..layout.end].split_at_mut(layout.strips);
                // Rows of f32 one after another need no packing, unless padding must stand in for keys that are not there.
                // Rows far apart do: at a distance of a power of two they would drive each other from the caches.
                let [k, v] = match (&tensors.k, &tensors.v) {
                    (AnyTensor::F32(k), AnyTensor::F32(v))
                        if W::PER_WORD == 1
                            && work.kv.covers(held)
                            && [k, v].iter().all(|tensor| tensor.stride() == tensor.shape()[2]) =>
                    {
                        [k, v].map(|tensor| KeyRows {
                            first: from_row(tensor, block - work.kv.start(), work.kv_head).as_ptr(),
                            stride: tensor.stride(),
                        })
                    }
                    _ => {
                        pack_rows::<W, MR>(work, tensors, Blocks::of(work.kv.intersect(held)), block, rows);
                        layout.rows::<W>(work, rows)
                    }
                };
                BlockKeys { k, v, strips: KeyStrips::Unpacked { work, tensors, block, to: strips } }
            }
        }
    }
}

/// The elements from one head of one token on, to the end of the storage.
fn from_row<'a, T>(view: &TensorView<'a, T>, token: usize, head: usize) -> &'a [T] {
    &view.data()[token * view.stride() + head * view.shape()[2]..]
}
