//! Head geometry: how many heads of what size, and how scores are scaled.

use std::fmt;
use std::str::FromStr;

use crate::{InvalidAttention, Span};

/// Largest head dimension (of Q/K or of V) that Outboard accepts.
pub const MAX_HEAD_DIM: usize = 256;
/// Largest number of query heads that Outboard accepts.
pub const MAX_HEADS: usize = 4096;
/// Largest document, in tokens. Positions then fit 32 bits, signed differences included.
pub const MAX_TOKENS: usize = 1 << 30;

/// Element type of Q, K, V and dO. LSE, D and partial results are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE 754 half precision.
    F16,
}

/// A name that is no element type's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is no element type; it must be f32, bf16 or f16")]
pub struct UnknownDType {
    /// The name.
    pub name: String,
}

impl DType {
    /// Every element type.
    pub const ALL: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

    /// Size of one element in bytes.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 | DType::F16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
        })
    }
}

impl FromStr for DType {
    type Err = UnknownDType;

    fn from_str(name: &str) -> Result<Self, UnknownDType> {
        let named = DType::ALL.into_iter().find(|dtype| dtype.to_string() == name);
        named.ok_or_else(|| UnknownDType { name: name.into() })
    }
}

/// Unchecked fields of a [`HeadGeometry`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadShape {
    /// Query heads, a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of one head of Q and K.
    pub head_dim: usize,
    /// Elements of one head of V and O.
    pub v_head_dim: usize,
    /// Factor on `Q K^T` before the softmax.
    pub scale: f32,
    /// Element type of Q, K, V and dO.
    pub dtype: DType,
    /// Logit soft-capping: a scaled score `s` becomes `softcap * tanh(s / softcap)` before the softmax.
    pub softcap: Option<f32>,
}

/// Heads of one attention layer, validated: `q_heads` is a multiple of `kv_heads`, dimensions are within
/// `1..=`[`MAX_HEAD_DIM`], and scale and softcap are finite and positive. Query head `h` reads kv head `h / group()`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadGeometry(HeadShape);

impl TryFrom<HeadShape> for HeadGeometry {
    type Error = InvalidAttention;

    fn try_from(shape: HeadShape) -> Result<Self, InvalidAttention> {
        let in_range = |field, value: usize, max: usize| {
            if (1..=max).contains(&value) {
                Ok(())
            } else {
                Err(InvalidAttention::OutOfRange { field, value: value as u64, min: 1, max: max as u64 })
            }
        };
        in_range("q_heads", shape.q_heads, MAX_HEADS)?;
        in_range("kv_heads", shape.kv_heads, MAX_HEADS)?;
        in_range("head_dim", shape.head_dim, MAX_HEAD_DIM)?;
        in_range("v_head_dim", shape.v_head_dim, MAX_HEAD_DIM)?;
        if !shape.q_heads.is_multiple_of(shape.kv_heads) {
            return Err(InvalidAttention::UnevenGroups { q_heads: shape.q_heads, kv_heads: shape.kv_heads });
        }
        if !(shape.scale.is_finite() && shape.scale > 0.0) {
            return Err(InvalidAttention::BadScale { scale: shape.scale });
        }
        if let Some(softcap) = shape.softcap
            && !(softcap.is_finite() && softcap > 0.0)
        {
            return Err(InvalidAttention::BadSoftcap { softcap });
        }
        Ok(HeadGeometry(shape))
    }
}

impl HeadGeometry {
    /// Geometry of a common layer: equal Q/K and V dims, scale `1/sqrt(head_dim)`, f32.
    ///
    /// # Errors
    /// As [`HeadGeometry::try_from`].
    pub fn standard(q_heads: usize, kv_heads: usize, head_dim: usize) -> Result<Self, InvalidAttention> {
        let scale = 1.0 / (head_dim.max(1) as f32).sqrt();
        let (dtype, softcap) = (DType::F32, None);
        HeadShape { q_heads, kv_heads, head_dim, v_head_dim: head_dim, scale, dtype, softcap }.try_into()
    }

    /// Query heads.
    pub fn q_heads(&self) -> usize {
        self.0.q_heads
    }

    /// Key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.0.kv_heads
    }

    /// Query heads that share one kv head.
    pub fn group(&self) -> usize {
        self.0.q_heads / self.0.kv_heads
    }

    /// Elements of one head of Q and K.
    pub fn head_dim(&self) -> usize {
        self.0.head_dim
    }

    /// Elements of one head of V and O.
    pub fn v_head_dim(&self) -> usize {
        self.0.v_head_dim
    }

    /// Factor on `Q K^T` before the softmax.
    pub fn scale(&self) -> f32 {
        self.0.scale
    }

    /// Element type of Q, K, V and dO.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// What scores are capped at softly, if they are.
    pub fn softcap(&self) -> Option<f32> {
        self.0.softcap
    }

    /// The same heads, with Q, K and V of another element type.
    pub fn with_dtype(self, dtype: DType) -> HeadGeometry {
        HeadGeometry(HeadShape { dtype, ..self.0 })
    }

    /// The plain fields.
    pub fn shape(&self) -> HeadShape {
        self.0
    }

    /// The query heads that read the kv heads of `kv_heads`.
    pub fn q_heads_of(&self, kv_heads: Span) -> Span {
        Span::at(kv_heads.start() * self.group(), kv_heads.len() * self.group())
    }

    /// Forward FLOPs of `cells` cells of one kv head: two products over its whole query group.
    pub fn forward_flops(&self, cells: u64) -> f64 {
        2.0 * cells as f64 * self.group() as f64 * (self.0.head_dim + self.0.v_head_dim) as f64
    }

    /// Backward FLOPs of `cells` cells of one kv head: three products over Q/K dims, two over V dims.
    pub fn backward_flops(&self, cells: u64) -> f64 {
        2.0 * cells as f64 * self.group() as f64 * (3 * self.0.head_dim + 2 * self.0.v_head_dim) as f64
    }
}
