//! Tensors as tasks and results name them.

use std::fmt;

use outboard_attention::Span;

use super::{convert, not_empty};
use crate::{TaskError, v1};

/// What a tensor is to the task that names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorKind {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Outputs.
    O,
    /// Log-sum-exp of scores.
    Lse,
    /// Gradient of the output.
    DO,
    /// rowsum(dO * O).
    D,
    /// Gradient of Q.
    DQ,
    /// Gradient of K.
    DK,
    /// Gradient of V.
    DV,
}

impl fmt::Display for TensorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TensorKind::Q => "Q",
            TensorKind::K => "K",
            TensorKind::V => "V",
            TensorKind::O => "O",
            TensorKind::Lse => "LSE",
            TensorKind::DO => "dO",
            TensorKind::D => "D",
            TensorKind::DQ => "dQ",
            TensorKind::DK => "dK",
            TensorKind::DV => "dV",
        })
    }
}

/// A tensor that a task or a result names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorRef {
    /// Its id on the stream, or within the result.
    pub id: u64,
    /// What it is to this task.
    pub kind: TensorKind,
    /// Positions in the document of the tokens it holds.
    pub tokens: Span,
    /// True when its chunks follow under this task.
    pub carried: bool,
    /// True when no later task of the stream names it.
    pub last_use: bool,
}

impl TryFrom<v1::TensorRef> for TensorRef {
    type Error = TaskError;

    fn try_from(tensor: v1::TensorRef) -> Result<TensorRef, TaskError> {
        let kind = match v1::TensorKind::try_from(tensor.kind) {
            Ok(v1::TensorKind::Q) => TensorKind::Q,
            Ok(v1::TensorKind::K) => TensorKind::K,
            Ok(v1::TensorKind::V) => TensorKind::V,
            Ok(v1::TensorKind::O) => TensorKind::O,
            Ok(v1::TensorKind::Lse) => TensorKind::Lse,
            Ok(v1::TensorKind::DO) => TensorKind::DO,
            Ok(v1::TensorKind::D) => TensorKind::D,
            Ok(v1::TensorKind::DQ) => TensorKind::DQ,
            Ok(v1::TensorKind::DK) => TensorKind::DK,
            Ok(v1::TensorKind::DV) => TensorKind::DV,
            Ok(v1::TensorKind::Unspecified) => {
                return Err(TaskError::invalid("kind is not given; say what the tensor is to the task"));
            }
            Err(_) => {
                let kind = tensor.kind;
                return Err(TaskError::invalid(format!(
                    "kind is {kind}, which is no TensorKind of this protocol version"
                )));
            }
        };
        let tokens = not_empty("tokens", convert("tokens", tensor.tokens)?)?;
        Ok(TensorRef { id: tensor.id, kind, tokens, carried: tensor.carried, last_use: tensor.last_use })
    }
}

impl From<&TensorRef> for v1::TensorRef {
    fn from(tensor: &TensorRef) -> v1::TensorRef {
        let kind = match tensor.kind {
            TensorKind::Q => v1::TensorKind::Q,
            TensorKind::K => v1::TensorKind::K,
            TensorKind::V => v1::TensorKind::V,
            TensorKind::O => v1::TensorKind::O,
            TensorKind::Lse => v1::TensorKind::Lse,
            TensorKind::DO => v1::TensorKind::DO,
            TensorKind::D => v1::TensorKind::D,
            TensorKind::DQ => v1::TensorKind::DQ,
            TensorKind::DK => v1::TensorKind::DK,
            TensorKind::DV => v1::TensorKind::DV,
        };
        v1::TensorRef {
            id: tensor.id,
            kind: kind as i32,
            tokens: Some((&tensor.tokens).into()),
            carried: tensor.carried,
            last_use: tensor.last_use,
        }
    }
}
