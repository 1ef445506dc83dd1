//! Q, K, V, dO, LSE and D to dQ, dK and dV: `P = exp(scale Q K^T - LSE)`, `dV = P^T dO`, `dS = scale P (dO V^T - D)`,
//! `dK = dS^T Q`, `dQ = dS K`.

use super::builder::{Builder, Layout, Lengths, Tensor};
use super::{Common, Ids, mask};
use crate::CudaError;
use crate::cudnn::names::{DataType, Pointwise, Reduction};

pub(super) fn add(builder: &mut Builder, common: &Common) -> Result<(), CudaError> {
    let layouts = common.layouts;
    let v = builder.ragged(Ids::V, common.io, layouts.kv.transposed(), common.v_offsets)?;
    let o = builder.ragged(Ids::O, common.io, layouts.q, common.q_offsets)?;
    let lse = builder.ragged(Ids::LSE, DataType::F32, layouts.lse, common.lse_offsets)?;
    let d_o = builder.ragged(Ids::D_O, common.io, layouts.q, common.q_offsets)?;
    let of_rows = Lengths { m: Some(common.rows), n: Some(common.keys), k: None };
    let multiply = (Pointwise::Mul, DataType::F32);
    let subtract = (Pointwise::Sub, DataType::F32);

    let (products, sums) =
        (builder.interim(DataType::F32, layouts.products)?, builder.interim(DataType::F32, layouts.row)?);
    builder.pointwise(multiply, d_o, Some(o), products)?;
    builder.reduce(Reduction::Add, products, sums)?;
    let d = builder.ragged(Ids::D, DataType::F32, layouts.lse, common.lse_offsets)?;
    let one = builder.scalar(Ids::ONE)?;
    builder.pointwise(multiply, sums, Some(one), d)?;

    let f32_scores = |builder: &mut Builder| builder.interim(DataType::F32, layouts.scores);
    let [products, scaled, shifted] = [f32_scores(builder)?, f32_scores(builder)?, f32_scores(builder)?];
    builder.matmul([common.q, common.k, products], of_rows, false)?;
    builder.pointwise(multiply, products, Some(common.scale), scaled)?;
    builder.pointwise(subtract, scaled, Some(lse), shifted)?;
    let shifted = mask::add(builder, common, shifted)?;
    let p = f32_scores(builder)?;
    builder.pointwise((Pointwise::Exp, DataType::F32), shifted, None, p)?;
    let key_offsets =
        builder.device(Ids::KEY_OFFSETS, DataType::I64, Layout::vector(layouts.q.dims[0] + 1))?;
    add_key_gradient(builder, common, key_offsets, [p, d_o], Ids::DV)?;

    let [dp, centred, weighted, ds] =
        [f32_scores(builder)?, f32_scores(builder)?, f32_scores(builder)?, f32_scores(builder)?];
    builder.matmul([d_o, v, dp], of_rows, false)?;
    builder.pointwise(subtract, dp, Some(d), centred)?;
    builder.pointwise(multiply, centred, Some(p), weighted)?;
    builder.pointwise(multiply, weighted, Some(common.scale), ds)?;
    add_key_gradient(builder, common, key_offsets, [ds, common.q], Ids::DK)?;

    let k = builder.interim_ragged(common.io, layouts.kv, common.k_offsets)?;
    builder.reshape(common.k, k)?;
    let sums = builder.ragged(Ids::DQ_SUMS, DataType::F32, layouts.q, common.row_offsets)?;
    builder.matmul([ds, k, sums], Lengths { m: Some(common.rows), n: None, k: Some(common.keys) }, false)?;
    let dq = builder.ragged(Ids::DQ, common.io, layouts.q, common.row_offsets)?;
    builder.pointwise((Pointwise::Identity, DataType::F32), sums, None, dq)
}

/// `weights^T x`, `[keys, dim]` for each query head.
fn add_key_gradient(
    builder: &mut Builder,
    common: &Common,
    offsets: Tensor,
    [weights, x]: [Tensor; 2],
    id: i64,
) -> Result<(), CudaError> {
    let Layout { dims: [b, h, s, t], strides: [x0, x1, x2, x3] } = common.layouts.scores;
    let transposed = Layout { dims: [b, h, t, s], strides: [x0, x1, x3, x2] };
    let rounded = builder.interim(common.io, transposed)?;
    builder.reshape(weights, rounded)?;
    // With more than one query head cuDNN multiplies the offsets by the group; with one it takes them as they are. Either
    // way they name the sequence's first element.
    let layout = if common.group == 1 { common.layouts.kv_of_head } else { common.layouts.kv_of_heads };
    let gradient = builder.ragged(id, common.io, layout, offsets)?;
    builder.matmul(
        [rounded, x, gradient],
        Lengths { m: Some(common.keys), n: None, k: Some(common.rows) },
        false,
    )
}
