//! Q, K, V to O and LSE.

use super::builder::{Builder, Lengths};
use super::{Common, Ids, mask};
use crate::CudaError;
use crate::cudnn::names::{DataType, Pointwise, Reduction};

pub(super) fn add(builder: &mut Builder, common: &Common) -> Result<(), CudaError> {
    let layouts = common.layouts;
    let v = builder.ragged(Ids::V, common.io, layouts.kv, common.v_offsets)?;
    let o = builder.ragged(Ids::O, common.io, layouts.q, common.row_offsets)?;
    let lse = builder.ragged(Ids::LSE, DataType::F32, layouts.lse, common.lse_offsets)?;

    let f32_scores = |builder: &mut Builder| builder.interim(DataType::F32, layouts.scores);
    let [products, scores] = [f32_scores(builder)?, f32_scores(builder)?];
    let lengths = Lengths { m: Some(common.rows), n: Some(common.keys), k: None };
    builder.matmul([common.q, common.k, products], lengths, true)?;
    builder.pointwise((Pointwise::Mul, DataType::F32), products, Some(common.scale), scores)?;
    let scores = mask::add(builder, common, scores)?;

    let by_row = |builder: &mut Builder| builder.interim(DataType::F32, layouts.row);
    let [max, sum, log] = [by_row(builder)?, by_row(builder)?, by_row(builder)?];
    let [shifted, weights] = [f32_scores(builder)?, f32_scores(builder)?];
    builder.reduce(Reduction::Max, scores, max)?;
    builder.pointwise((Pointwise::Sub, DataType::F32), scores, Some(max), shifted)?;
    builder.pointwise((Pointwise::Exp, DataType::F32), shifted, None, weights)?;
    builder.reduce(Reduction::Add, weights, sum)?;
    builder.pointwise((Pointwise::Log, DataType::F32), sum, None, log)?;
    builder.pointwise((Pointwise::Add, DataType::F32), max, Some(log), lse)?;

    let shares = builder.interim(common.io, layouts.scores)?;
    builder.pointwise((Pointwise::Div, DataType::F32), weights, Some(sum), shares)?;
    let lengths = Lengths { m: Some(common.rows), n: None, k: Some(common.keys) };
    builder.matmul([shares, v, o], lengths, false)
}
