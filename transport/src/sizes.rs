//! Which tensors a task reads and gives back, how large they are, and what any transport refuses. Both ends count
//! credits by these sizes.

use outboard_attention::{DType, Direction, Span, TensorSlice};
use outboard_proto::{ErrorKind, TaskError, TaskHeader, TensorKind};

use crate::{TaskHandler, TaskInputs, TaskRequest};

/// Bytes of credit that a task's header costs beyond its tensors and slices, so that no number of tiny tasks takes memory
/// that is not counted.
const HEADER_BYTES: u64 = 4096;
/// The same for each slice of its mask.
const SLICE_BYTES: u64 = 256;
/// The same for each tensor that it names.
pub(crate) const TENSOR_BYTES: u64 = 256;

/// The tensors that a task reads, in wire order.
pub(crate) fn input_kinds(direction: Direction) -> &'static [TensorKind] {
    match direction {
        Direction::Forward => &[TensorKind::Q, TensorKind::K, TensorKind::V],
        Direction::Backward => {
            &[TensorKind::Q, TensorKind::K, TensorKind::V, TensorKind::DO, TensorKind::Lse, TensorKind::D]
        }
    }
}

/// The tensor of a kind that the task reads, `None` when it has none.
pub(crate) fn input_of(inputs: &TaskInputs, kind: TensorKind) -> Option<&TensorSlice> {
    let gradient = inputs.gradient.as_ref();
    match kind {
        TensorKind::Q => Some(&inputs.q),
        TensorKind::K => Some(&inputs.k),
        TensorKind::V => Some(&inputs.v),
        TensorKind::DO => gradient.map(|g| &g.d_o),
        TensorKind::Lse => gradient.map(|g| &g.lse),
        TensorKind::D => gradient.map(|g| &g.d),
        _ => None,
    }
}

/// Checks at the caller that a task's tensors are all there and fit its header.
pub(crate) fn check(request: &TaskRequest) -> Result<(), TaskError> {
    request.check()?;
    check_dtypes(&request.header)?;
    for &kind in input_kinds(request.header.direction) {
        if input_of(&request.inputs, kind).is_none() {
            let direction = request.header.direction;
            return Err(TaskError::invalid(format!("a {direction} task needs {kind}, which is not given")));
        }
    }
    Ok(())
}

/// The tensors that a task gives back, in wire order.
pub(crate) fn result_kinds(direction: Direction) -> &'static [TensorKind] {
    match direction {
        Direction::Forward => &[TensorKind::O, TensorKind::Lse],
        Direction::Backward => &[TensorKind::DQ, TensorKind::DK, TensorKind::DV],
    }
}

/// The token positions of a tensor of this kind that the task needs.
pub(crate) fn tokens_of(header: &TaskHeader, kind: TensorKind) -> Span {
    match kind {
        TensorKind::K | TensorKind::V | TensorKind::DK | TensorKind::DV => header.task.kv(),
        _ => header.task.q(),
    }
}

/// `[heads, dim]` of a token in a tensor of this kind.
pub(crate) fn row_of(header: &TaskHeader, kind: TensorKind) -> [usize; 2] {
    let shapes = header.task.shapes(&header.geometry);
    let [_, heads, dim] = match kind {
        TensorKind::Q | TensorKind::DQ => shapes.q,
        TensorKind::K | TensorKind::DK => shapes.k,
        TensorKind::V | TensorKind::DV => shapes.v,
        TensorKind::O | TensorKind::DO => shapes.o,
        TensorKind::Lse | TensorKind::D => shapes.row,
    };
    [heads, dim]
}

/// Bytes of an f32 tensor.
pub(crate) fn tensor_bytes(tokens: usize, [heads, dim]: [usize; 2]) -> u64 {
    [heads, dim, size_of::<f32>()].iter().fold(tokens as u64, |bytes, &n| bytes.saturating_mul(n as u64))
}

/// Bytes of the task's results.
pub(crate) fn result_bytes(header: &TaskHeader) -> u64 {
    let bytes = |&kind: &TensorKind| tensor_bytes(tokens_of(header, kind).len(), row_of(header, kind));
    result_kinds(header.direction).iter().map(bytes).fold(0, u64::saturating_add)
}

/// Bytes of credit that a task takes besides the elements of the tensors it carries.
pub(crate) fn task_bytes(header: &TaskHeader) -> u64 {
    let slices = header.task.mask().parts().len() as u64;
    let tensors = input_kinds(header.direction).len() as u64;
    result_bytes(header)
        .saturating_add(HEADER_BYTES)
        .saturating_add(slices.saturating_mul(SLICE_BYTES))
        .saturating_add(tensors.saturating_mul(TENSOR_BYTES))
}

/// Refuses element types that no transport carries yet.
pub(crate) fn check_dtypes(header: &TaskHeader) -> Result<(), TaskError> {
    for (field, dtype) in [("geometry.dtype", header.geometry.dtype()), ("result_dtype", header.result_dtype)]
    {
        if dtype != DType::F32 {
            let message = format!("{field} is {dtype}, which is not supported yet; send f32");
            return Err(TaskError::new(ErrorKind::Unsupported, message));
        }
    }
    Ok(())
}

/// Refuses a task whose numerics id is not `numerics_id`.
pub(crate) fn check_numerics(header: &TaskHeader, numerics_id: &str) -> Result<(), TaskError> {
    match &header.numerics_id {
        Some(required) if required != numerics_id => Err(numerics_mismatch(required, numerics_id)),
        _ => Ok(()),
    }
}

/// The error of a server that would compute other bits.
pub(crate) fn numerics_mismatch(required: &str, numerics_id: &str) -> TaskError {
    let message = format!(
        "the server's numerics id is {numerics_id:?}, and {required:?} is required; send the task to a server of that id, or \
         require none"
    );
    TaskError::new(ErrorKind::NumericsMismatch, message)
}

/// Refuses what the handler will not compute, by the header alone.
pub(crate) fn refuse(handler: &dyn TaskHandler, header: &TaskHeader) -> Result<(), TaskError> {
    check_dtypes(header)?;
    check_numerics(header, handler.numerics_id())?;
    handler.admit(header)
}
