//! Which tensors a task reads and gives back, how large they are, and what any transport refuses. Both ends count
//! credits by these sizes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;

use outboard_attention::{DType, Direction, Span, TensorSlice};
use outboard_proto::{ErrorKind, TaskError, TaskHeader, TensorKind, check_key_homes};

use crate::{KeyShare, Keys, TaskHandler, TaskRequest};

/// Bytes of credit that a task's header costs beyond its tensors and slices, so that no number of tiny tasks takes memory
/// that is not counted.
const HEADER_BYTES: u64 = 4096;
/// The same for each slice of its mask.
const SLICE_BYTES: u64 = 256;
/// The same for each tensor that it names.
pub(crate) const TENSOR_BYTES: u64 = 256;
/// The same for each home of its keys.
const HOME_BYTES: u64 = 256;

/// The tensors that a task reads, in wire order.
pub(crate) fn input_kinds(direction: Direction) -> &'static [TensorKind] {
    match direction {
        Direction::Forward => &[TensorKind::Q, TensorKind::K, TensorKind::V],
        Direction::Backward => {
            &[TensorKind::Q, TensorKind::K, TensorKind::V, TensorKind::DO, TensorKind::Lse, TensorKind::D]
        }
    }
}

/// A tensor that a task reads, where it is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Input<'a> {
    /// At the client.
    Here(&'a TensorSlice),
    /// At its homes.
    AtHomes(&'a KeyShare),
}

/// The tensor of a kind that the task reads, `None` when it has none.
pub(crate) fn input_of(request: &TaskRequest, kind: TensorKind) -> Option<Input<'_>> {
    let gradient = request.gradient.as_ref();
    let here = match (kind, &request.keys) {
        (TensorKind::K | TensorKind::V, Keys::AtHomes(keys)) => return Some(Input::AtHomes(keys)),
        (TensorKind::K, Keys::Here { k, .. }) => Some(k),
        (TensorKind::V, Keys::Here { v, .. }) => Some(v),
        (TensorKind::Q, _) => Some(&request.q),
        (TensorKind::DO, _) => gradient.map(|g| &g.d_o),
        (TensorKind::Lse, _) => gradient.map(|g| &g.lse),
        (TensorKind::D, _) => gradient.map(|g| &g.d),
        _ => None,
    };
    here.map(Input::Here)
}

/// Checks at the caller that the tensors of each task are all there and fit its header, and that tasks which share keys
/// name the same ones. One answer for each task.
pub(crate) fn check(shipment: &[TaskRequest]) -> Vec<Result<(), TaskError>> {
    let mut shared: HashMap<usize, &TaskHeader> = HashMap::new();
    let check = |request| {
        check_task(request)?;
        let TaskRequest { header, keys: Keys::AtHomes(share), .. } = request else { return Ok(()) };
        match shared.entry(share.identity()) {
            Entry::Occupied(first) if !same_keys(first.get(), header) => Err(TaskError::invalid(format!(
                "the task shares its keys with another, {}, which names others; share only what is the same",
                first.get().name()
            ))),
            Entry::Occupied(_) => Ok(()),
            Entry::Vacant(place) => {
                place.insert(header);
                Ok(())
            }
        }
    };
    shipment.iter().map(check).collect()
}

/// True when two tasks name the same keys, of the same form, at the same homes.
fn same_keys(one: &TaskHeader, other: &TaskHeader) -> bool {
    let form = |header| [TensorKind::K, TensorKind::V].map(|kind| row_of(header, kind));
    let range = |header: &TaskHeader| header.key_range(Span::default());
    form(one) == form(other) && range(one) == range(other) && one.key_homes == other.key_homes
}

fn check_task(request: &TaskRequest) -> Result<(), TaskError> {
    request.check()?;
    check_result_dtype(&request.header)?;
    match request.keys {
        Keys::AtHomes(_) => check_key_homes(&request.header.key_homes, request.header.task.kv())?,
        Keys::Here { .. } if request.header.key_homes.is_empty() => {}
        Keys::Here { .. } => {
            return Err(TaskError::invalid(
                "the task names homes of its keys, and holds the keys themselves; give one",
            ));
        }
    }
    for &kind in input_kinds(request.header.direction) {
        if input_of(request, kind).is_none() {
            let direction = request.header.direction;
            return Err(TaskError::invalid(format!("a {direction} task needs {kind}, which is not given")));
        }
    }
    Ok(())
}

/// The tensors that a task makes.
pub(crate) fn made_kinds(direction: Direction) -> &'static [TensorKind] {
    match direction {
        Direction::Forward => &[TensorKind::O, TensorKind::Lse],
        Direction::Backward => &[TensorKind::DQ, TensorKind::DK, TensorKind::DV],
    }
}

/// The tensors that a task gives back, in wire order: those that it makes, less what goes to the homes of its keys.
pub(crate) fn result_kinds(header: &TaskHeader) -> &'static [TensorKind] {
    match header.direction {
        Direction::Backward if !header.key_homes.is_empty() => &[TensorKind::DQ],
        direction => made_kinds(direction),
    }
}

/// The token positions of a tensor of this kind that the task needs.
pub(crate) fn tokens_of(header: &TaskHeader, kind: TensorKind) -> Span {
    match kind {
        TensorKind::K | TensorKind::V | TensorKind::DK | TensorKind::DV => header.task.kv(),
        _ => header.task.q(),
    }
}

/// One token of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) heads: usize,
    pub(crate) dim: usize,
    pub(crate) dtype: DType,
}

impl Row {
    pub(crate) fn of(slice: &TensorSlice) -> Row {
        Row { heads: slice.heads(), dim: slice.dim(), dtype: slice.dtype() }
    }

    /// Bytes of a tensor of so many tokens. Saturates.
    pub(crate) fn tensor_bytes(self, tokens: usize) -> u64 {
        [self.heads, self.dim, self.dtype.bytes()]
            .iter()
            .fold(tokens as u64, |bytes, &n| bytes.saturating_mul(n as u64))
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Row { heads, dim, dtype } = self;
        write!(f, "[tokens, {heads}, {dim}] of {dtype}")
    }
}

/// A token of a tensor of this kind.
pub(crate) fn row_of(header: &TaskHeader, kind: TensorKind) -> Row {
    let shapes = header.task.shapes(&header.geometry);
    let (input, result) = (header.geometry.dtype(), header.result_dtype);
    let ([_, heads, dim], dtype) = match kind {
        TensorKind::Q => (shapes.q, input),
        TensorKind::K => (shapes.k, input),
        TensorKind::V => (shapes.v, input),
        TensorKind::DO => (shapes.o, input),
        TensorKind::O => (shapes.o, result),
        TensorKind::DQ => (shapes.q, result),
        TensorKind::DK => (shapes.k, result),
        TensorKind::DV => (shapes.v, result),
        TensorKind::Lse | TensorKind::D => (shapes.row, DType::F32),
    };
    Row { heads, dim, dtype }
}

/// Bytes of what the task makes, wherever it goes.
pub(crate) fn result_bytes(header: &TaskHeader) -> u64 {
    let bytes = |&kind: &TensorKind| row_of(header, kind).tensor_bytes(tokens_of(header, kind).len());
    made_kinds(header.direction).iter().map(bytes).fold(0, u64::saturating_add)
}

/// Bytes of credit that a task takes besides the elements of the tensors it carries.
pub(crate) fn task_bytes(header: &TaskHeader) -> u64 {
    let slices = header.task.mask().parts().len() as u64;
    let tensors = input_kinds(header.direction).len() as u64;
    let homes = header.key_homes.len() as u64;
    result_bytes(header)
        .saturating_add(HEADER_BYTES)
        .saturating_add(slices.saturating_mul(SLICE_BYTES))
        .saturating_add(tensors.saturating_mul(TENSOR_BYTES))
        .saturating_add(homes.saturating_mul(HOME_BYTES))
}

/// Refuses element types of results that no transport carries yet.
fn check_result_dtype(header: &TaskHeader) -> Result<(), TaskError> {
    match header.result_dtype {
        DType::F32 => Ok(()),
        other => {
            let message = format!("result_dtype is {other}, which is not supported yet; ask for f32");
            Err(TaskError::new(ErrorKind::Unsupported, message))
        }
    }
}

/// Refuses an element type that the handler does not compute, and a task that needs another numerics id than the
/// handler's for its element type.
fn check_numerics(handler: &dyn TaskHandler, header: &TaskHeader) -> Result<(), TaskError> {
    let dtype = header.geometry.dtype();
    let Some(numerics_id) = handler.numerics_id(dtype) else {
        let computed = DType::ALL.into_iter().filter(|&dtype| handler.numerics_id(dtype).is_some());
        let computed: Vec<String> = computed.map(|dtype| dtype.to_string()).collect();
        let message =
            format!("geometry.dtype is {dtype}, and the server computes {} alone", computed.join(" and "));
        return Err(TaskError::new(ErrorKind::Unsupported, message));
    };
    match &header.numerics_id {
        Some(required) if required != numerics_id => Err(numerics_mismatch(required, &[numerics_id])),
        _ => Ok(()),
    }
}

/// The numerics ids of a handler, one for each element type that it computes.
pub(crate) fn numerics_ids(handler: &dyn TaskHandler) -> Vec<String> {
    DType::ALL.into_iter().filter_map(|dtype| handler.numerics_id(dtype)).map(str::to_owned).collect()
}

/// The error of a server that would compute other bits.
pub(crate) fn numerics_mismatch(required: &str, ids: &[impl AsRef<str>]) -> TaskError {
    let ids: Vec<_> = ids.iter().map(|id| format!("{:?}", id.as_ref())).collect();
    let message = format!(
        "the server's numerics id is {}, and {required:?} is required; send the task to a server of that id, or require none",
        ids.join(" or ")
    );
    TaskError::new(ErrorKind::NumericsMismatch, message)
}

/// Refuses what the handler will not compute, by the header alone.
pub(crate) fn refuse(handler: &dyn TaskHandler, header: &TaskHeader) -> Result<(), TaskError> {
    check_result_dtype(header)?;
    check_numerics(handler, header)?;
    handler.admit(header)
}

/// Bytes of the K and V that a server fetches for a task; none when the client sends them.
pub(crate) fn fetched_bytes(header: &TaskHeader) -> u64 {
    let tokens = header.fetched_keys().map_or(0, |tokens| tokens.len());
    let bytes = |kind| row_of(header, kind).tensor_bytes(tokens);
    bytes(TensorKind::K).saturating_add(bytes(TensorKind::V))
}
