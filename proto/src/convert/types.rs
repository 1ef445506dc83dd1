//! Ids, enums, geometry and masks.

use outboard_attention::{BandSlice, DType, Direction, DocumentId, HeadGeometry, HeadShape, Mask, MaskPart};

use super::{MAX_SLICES, convert};
use crate::{TaskError, v1};

impl TryFrom<v1::DocumentId> for DocumentId {
    type Error = TaskError;

    fn try_from(id: v1::DocumentId) -> Result<DocumentId, TaskError> {
        Ok(DocumentId { rank: id.rank, index: id.index })
    }
}

impl From<&DocumentId> for v1::DocumentId {
    fn from(id: &DocumentId) -> v1::DocumentId {
        v1::DocumentId { rank: id.rank, index: id.index }
    }
}

/// The element type of field `field`.
pub(super) fn dtype(field: &'static str, value: i32) -> Result<DType, TaskError> {
    match v1::DType::try_from(value) {
        Ok(v1::DType::F32) => Ok(DType::F32),
        Ok(v1::DType::Bf16) => Ok(DType::Bf16),
        Ok(v1::DType::F16) => Ok(DType::F16),
        Ok(v1::DType::Unspecified) => Err(TaskError::invalid(format!(
            "{field} is not given; set D_TYPE_F32, D_TYPE_BF16 or D_TYPE_F16"
        ))),
        Err(_) => {
            Err(TaskError::invalid(format!("{field} is {value}, which is no DType of this protocol version")))
        }
    }
}

/// The direction of field `field`.
pub(super) fn direction(field: &'static str, value: i32) -> Result<Direction, TaskError> {
    match v1::Direction::try_from(value) {
        Ok(v1::Direction::Forward) => Ok(Direction::Forward),
        Ok(v1::Direction::Backward) => Ok(Direction::Backward),
        Ok(v1::Direction::Unspecified) => Err(TaskError::invalid(format!(
            "{field} is not given; set DIRECTION_FORWARD or DIRECTION_BACKWARD"
        ))),
        Err(_) => Err(TaskError::invalid(format!(
            "{field} is {value}, which is no Direction of this protocol version"
        ))),
    }
}

impl From<&DType> for v1::DType {
    fn from(dtype: &DType) -> v1::DType {
        match dtype {
            DType::F32 => v1::DType::F32,
            DType::Bf16 => v1::DType::Bf16,
            DType::F16 => v1::DType::F16,
            // DType may grow; what the wire has no name for is refused by whoever reads it.
            _ => v1::DType::Unspecified,
        }
    }
}

impl TryFrom<v1::DType> for DType {
    type Error = TaskError;

    fn try_from(value: v1::DType) -> Result<DType, TaskError> {
        dtype("dtype", value as i32)
    }
}

impl From<&Direction> for v1::Direction {
    fn from(direction: &Direction) -> v1::Direction {
        match direction {
            Direction::Forward => v1::Direction::Forward,
            Direction::Backward => v1::Direction::Backward,
        }
    }
}

impl TryFrom<v1::HeadGeometry> for HeadGeometry {
    type Error = TaskError;

    fn try_from(geometry: v1::HeadGeometry) -> Result<HeadGeometry, TaskError> {
        let shape = HeadShape {
            q_heads: geometry.q_heads as usize,
            kv_heads: geometry.kv_heads as usize,
            head_dim: geometry.head_dim as usize,
            v_head_dim: geometry.v_head_dim as usize,
            scale: geometry.scale,
            dtype: dtype("dtype", geometry.dtype)?,
            softcap: geometry.softcap,
        };
        Ok(HeadGeometry::try_from(shape)?)
    }
}

impl From<&HeadGeometry> for v1::HeadGeometry {
    fn from(geometry: &HeadGeometry) -> v1::HeadGeometry {
        v1::HeadGeometry {
            q_heads: geometry.q_heads() as u32,
            kv_heads: geometry.kv_heads() as u32,
            head_dim: geometry.head_dim() as u32,
            v_head_dim: geometry.v_head_dim() as u32,
            scale: geometry.scale(),
            dtype: v1::DType::from(&geometry.dtype()) as i32,
            softcap: geometry.softcap(),
        }
    }
}

impl TryFrom<v1::BandSlice> for MaskPart {
    type Error = TaskError;

    fn try_from(slice: v1::BandSlice) -> Result<MaskPart, TaskError> {
        let (q, kv) = (convert("q", slice.q)?, convert("kv", slice.kv)?);
        let kv_heads = convert("kv_heads", slice.kv_heads)?;
        Ok(MaskPart { kv_heads, slice: BandSlice::new(q, kv, slice.lo, slice.hi)? })
    }
}

impl From<&MaskPart> for v1::BandSlice {
    fn from(part: &MaskPart) -> v1::BandSlice {
        v1::BandSlice {
            q: Some((&part.slice.q()).into()),
            kv: Some((&part.slice.kv()).into()),
            kv_heads: Some((&part.kv_heads).into()),
            lo: part.slice.lo(),
            hi: part.slice.hi(),
        }
    }
}

/// The mask of field `field`.
pub(super) fn mask(field: &'static str, slices: Vec<v1::BandSlice>) -> Result<Mask, TaskError> {
    if slices.len() > MAX_SLICES {
        let count = slices.len();
        let message = format!(
            "{field} has {count} slices; at most {MAX_SLICES} are allowed: cut the task into smaller ones"
        );
        return Err(TaskError::invalid(message));
    }
    let part = |(n, slice)| {
        MaskPart::try_from(slice).map_err(|e: TaskError| e.context(format_args!("{field}[{n}]")))
    };
    let parts = slices.into_iter().enumerate().map(part).collect::<Result<Vec<_>, _>>()?;
    Mask::new(parts).map_err(|error| TaskError::from(error).context(field))
}

/// The slices of a mask, in order.
pub(super) fn slices(mask: &Mask) -> Vec<v1::BandSlice> {
    mask.parts().iter().map(v1::BandSlice::from).collect()
}
