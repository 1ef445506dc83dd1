//! Attention as operation graphs of cuDNN.
//!
//! A call computes a batch of *sequences*: each is a piece of one kv head of one task, with the `group` query heads that
//! read it. So one graph serves tasks of any number of heads. All tensors are ragged: `[tokens, heads, dim]` one sequence
//! after the other, wherever an array of 64-bit offsets says. Sequences may share the memory they read.
//!
//! The graphs are those that NVIDIA's frontend writes for composite attention (the shapes of operations that cuDNN's
//! fused kernels are matched against), but for these differences: backward, D goes in by a made-up O (see
//! [`Ids::O`]), and dK and dV come out for each query head, before they are summed.

mod backward;
mod builder;
mod forward;
mod mask;

use std::sync::Arc;

use outboard_attention::{DType, Direction};

use crate::CudaError;
use crate::batch::Shape;
use crate::cudnn::names::DataType;
use crate::cudnn::{Cudnn, Handle};

pub(crate) use builder::Graph;
use builder::{Builder, Layout, Tensor};

/// Element type, heads and dim of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct CallGeometry {
    /// bf16 or f16.
    pub(crate) dtype: DType,
    /// Query heads that read the one kv head of a sequence.
    pub(crate) group: usize,
    /// Elements of a head of Q, K, V and O.
    pub(crate) dim: usize,
    /// kv heads that lie side by side in each token of K and V, and forward of Q, O and LSE (with their groups). A sequence
    /// is one of them.
    pub(crate) heads: usize,
}

/// The most that a call may hold: of sequences, and of tokens in each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Bounds {
    pub(crate) sequences: usize,
    pub(crate) rows: usize,
    pub(crate) keys: usize,
}

/// What a graph computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct GraphKey {
    pub(crate) direction: Direction,
    pub(crate) shape: Shape,
    pub(crate) geometry: CallGeometry,
    pub(crate) bounds: Bounds,
}

/// Identifiers of the tensors of a call, and what they hold. Sizes are those of one sequence of `rows` rows and `keys`
/// keys; "16-bit" is the call's element type.
#[derive(Debug)]
pub(crate) struct Ids;

impl Ids {
    /// Queries `[rows, group, dim]`, 16-bit.
    pub(crate) const Q: i64 = 1;
    /// Keys `[keys, dim]`, 16-bit.
    pub(crate) const K: i64 = 2;
    /// Values `[keys, dim]`, 16-bit.
    pub(crate) const V: i64 = 3;
    /// Outputs `[rows, group, dim]`, 16-bit. Backward, cuDNN reads it only for `rowsum(dO * O)`, so it is any tensor for
    /// which that is D.
    pub(crate) const O: i64 = 4;
    /// LSE `[rows, group]`, f32, natural log: a result forward, over all keys of the row backward.
    pub(crate) const LSE: i64 = 5;
    /// dO `[rows, group, dim]`, 16-bit.
    pub(crate) const D_O: i64 = 6;
    /// dQ `[rows, group, dim]`, 16-bit.
    pub(crate) const DQ: i64 = 7;
    /// What dQ is summed in, f32, in an order of cuDNN's own: scratch of the size of `[rows, group, dim]`.
    pub(crate) const DQ_SUMS: i64 = 8;
    /// dK of each query head, `[keys, group, dim]`, 16-bit.
    pub(crate) const DK: i64 = 9;
    /// dV of each query head, `[keys, group, dim]`, 16-bit.
    pub(crate) const DV: i64 = 10;
    /// D `[rows, group]`, f32: scratch.
    pub(crate) const D: i64 = 11;
    /// Rows of each sequence, `i32[sequences]`.
    pub(crate) const ROWS: i64 = 20;
    /// Keys of each sequence, `i32[sequences]`.
    pub(crate) const KEYS: i64 = 21;
    /// First element in Q of each sequence, `i64[sequences + 1]`; also in O and dO backward.
    pub(crate) const Q_OFFSETS: i64 = 22;
    /// First element in K.
    pub(crate) const K_OFFSETS: i64 = 23;
    /// First element in V.
    pub(crate) const V_OFFSETS: i64 = 27;
    /// First element in the results by row: O, or dQ.
    pub(crate) const ROW_OFFSETS: i64 = 24;
    /// First element in LSE.
    pub(crate) const LSE_OFFSETS: i64 = 25;
    /// First element in dK and dV, divided by the group.
    pub(crate) const KEY_OFFSETS: i64 = 26;
    /// Factor on scores: a scalar.
    pub(crate) const SCALE: i64 = 30;
    /// What masked scores are: a scalar.
    pub(crate) const HIDDEN: i64 = 31;
    /// The same for the second mask: the kernels are matched against a graph with two.
    pub(crate) const HIDDEN_CAUSAL: i64 = 32;
    /// 1: a scalar.
    pub(crate) const ONE: i64 = 33;
}

/// Builds a graph, for the handle's device or, without one, for any.
pub(crate) fn build(cudnn: &Arc<Cudnn>, key: &GraphKey, handle: Option<&Handle>) -> Result<Graph, CudaError> {
    let mut builder = Builder::new(cudnn);
    let common = Common::new(&mut builder, key)?;
    match key.direction {
        Direction::Forward => forward::add(&mut builder, &common)?,
        Direction::Backward => backward::add(&mut builder, &common)?,
    }
    builder.finish(key.bounds.sequences, handle)
}

/// The layouts of a graph, and the tensors that both directions have.
struct Common {
    shape: Shape,
    group: usize,
    io: DataType,
    layouts: Layouts,
    rows: Tensor,
    keys: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    v_offsets: Tensor,
    row_offsets: Tensor,
    lse_offsets: Tensor,
    q: Tensor,
    /// K transposed, `[dim, keys]`.
    k: Tensor,
    scale: Tensor,
}

/// Layouts with the axes `[sequence, head, row or key, dim or key]`.
#[derive(Clone, Copy)]
struct Layouts {
    /// Q and what has its size.
    q: Layout,
    /// K and V.
    kv: Layout,
    /// dK and dV of the only query head.
    kv_of_head: Layout,
    /// dK and dV of each query head.
    kv_of_heads: Layout,
    /// Scores.
    scores: Layout,
    /// One number a row, as cuDNN's interim tensors have it.
    row: Layout,
    /// One number a row, token by token, as LSE lies in memory.
    lse: Layout,
    /// Products of dO and O.
    products: Layout,
}

impl Common {
    fn new(builder: &mut Builder, key: &GraphKey) -> Result<Common, CudaError> {
        let CallGeometry { dtype, group, dim, heads } = key.geometry;
        let io = match dtype {
            DType::Bf16 => DataType::Bf16,
            DType::F16 => DataType::F16,
            other => return Err(CudaError::DType { dtype: other }),
        };
        let Bounds { sequences, rows, keys } = key.bounds;
        let [b, h, s, t, d] = [sequences, group, rows, keys, dim].map(|n| n as i64);
        let kv = heads as i64;
        // Backward, rows lie apart for each head.
        let of_rows = if key.direction == Direction::Forward { kv * h } else { h };
        let layouts = Layouts {
            q: Layout { dims: [b, h, s, d], strides: [of_rows * s * d, d, of_rows * d, 1] },
            kv: Layout { dims: [b, 1, t, d], strides: [kv * t * d, d, kv * d, 1] },
            kv_of_head: Layout { dims: [b, 1, t, d], strides: [t * d, d, d, 1] },
            kv_of_heads: Layout { dims: [b, h, t, d], strides: [t * d * h, d, d * h, 1] },
            scores: Layout { dims: [b, h, s, t], strides: [h * s * t, s * t, t, 1] },
            row: Layout { dims: [b, h, s, 1], strides: [h * s, s, 1, 1] },
            lse: Layout { dims: [b, h, s, 1], strides: [of_rows * s, 1, of_rows, 1] },
            products: Layout { dims: [b, h, s, d], strides: [h * s * d, s * d, h * d, 1] },
        };
        let offsets = Layout::vector(b + 1);
        let mut offset = |id| builder.device(id, DataType::I64, offsets);
        let q_offsets = offset(Ids::Q_OFFSETS)?;
        let (k_offsets, v_offsets) = (offset(Ids::K_OFFSETS)?, offset(Ids::V_OFFSETS)?);
        let (row_offsets, lse_offsets) = (offset(Ids::ROW_OFFSETS)?, offset(Ids::LSE_OFFSETS)?);
        let lengths = Layout { dims: [b, 1, 1, 1], strides: [1; 4] };
        Ok(Common {
            shape: key.shape,
            group,
            io,
            layouts,
            rows: builder.device(Ids::ROWS, DataType::I32, lengths)?,
            keys: builder.device(Ids::KEYS, DataType::I32, lengths)?,
            q_offsets,
            k_offsets,
            v_offsets,
            row_offsets,
            lse_offsets,
            q: builder.ragged(Ids::Q, io, layouts.q, q_offsets)?,
            k: builder.ragged(Ids::K, io, layouts.kv.transposed(), k_offsets)?,
            scale: builder.scalar(Ids::SCALE)?,
        })
    }
}
