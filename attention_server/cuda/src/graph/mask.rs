//! The part of a graph that hides scores.

use super::builder::{Builder, Tensor};
use super::{Common, Ids};
use crate::CudaError;
use crate::batch::Shape;
use crate::cudnn::names::{DataType, Pointwise};

/// `scores`, hidden where they lie beyond a sequence's rows or keys, and where its triangle ends.
pub(super) fn add(builder: &mut Builder, common: &Common, scores: Tensor) -> Result<Tensor, CudaError> {
    let inside = hide_padding(builder, common, scores)?;
    match common.shape {
        Shape::Full => Ok(inside),
        Shape::Triangle => hide_later(builder, common, inside, Corner::First),
        Shape::Causal => hide_later(builder, common, inside, Corner::Last),
    }
}

fn hide_padding(builder: &mut Builder, common: &Common, scores: Tensor) -> Result<Tensor, CudaError> {
    let layout = common.layouts.scores;
    let [row, key] = [builder.interim(DataType::I32, layout)?, builder.interim(DataType::I32, layout)?];
    builder.index(2, scores, row)?;
    builder.index(3, scores, key)?;
    let mut boolean = || builder.interim(DataType::Bool, layout);
    let [row_inside, key_inside, inside] = [boolean()?, boolean()?, boolean()?];
    let below = (Pointwise::Below, DataType::Bool);
    builder.pointwise(below, row, Some(common.rows), row_inside)?;
    builder.pointwise(below, key, Some(common.keys), key_inside)?;
    builder.pointwise((Pointwise::And, DataType::Bool), row_inside, Some(key_inside), inside)?;
    let (hidden, out) = (builder.scalar(Ids::HIDDEN)?, builder.interim(DataType::F32, layout)?);
    builder.select(inside, scores, hidden, out)?;
    Ok(out)
}

/// Where a triangle has its corner.
enum Corner {
    /// The first row sees the first key alone.
    First,
    /// The last row sees the last key.
    Last,
}

fn hide_later(
    builder: &mut Builder,
    common: &Common,
    scores: Tensor,
    corner: Corner,
) -> Result<Tensor, CudaError> {
    let layout = common.layouts.scores;
    let [row, key] = [builder.interim(DataType::I32, layout)?, builder.interim(DataType::I32, layout)?];
    builder.index(2, scores, row)?;
    builder.index(3, scores, key)?;
    let last_key = match corner {
        Corner::First => row,
        Corner::Last => {
            let [sum, last] =
                [builder.interim(DataType::I32, layout)?, builder.interim(DataType::I32, layout)?];
            builder.pointwise((Pointwise::Add, DataType::I32), row, Some(common.keys), sum)?;
            builder.pointwise((Pointwise::Sub, DataType::I32), sum, Some(common.rows), last)?;
            last
        }
    };
    let (counts, out) = (builder.interim(DataType::Bool, layout)?, builder.interim(DataType::F32, layout)?);
    builder.pointwise((Pointwise::AtLeast, DataType::Bool), last_key, Some(key), counts)?;
    let hidden = builder.scalar(Ids::HIDDEN_CAUSAL)?;
    builder.select(counts, scores, hidden, out)?;
    Ok(out)
}
