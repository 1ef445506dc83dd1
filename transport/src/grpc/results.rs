//! Results: out of the server as a header and chunks, into the client from them.

use std::sync::Arc;
use std::time::Duration;

use outboard_attention::kernel::Results;
use outboard_attention::{Direction, TensorSlice};
use outboard_proto::v1::{Chunk, DType, ResultHeader};
use outboard_proto::{ErrorKind, TaskError, TaskHeader, TensorRef};

use super::elements::{Destination, Outgoing};
use crate::TaskOutcome;
use crate::sizes::{Row, result_kinds, row_of, tokens_of};

/// A result ready to send: tensor `n` of it has id `n`.
#[derive(Debug)]
pub(super) struct OutgoingResult {
    pub(super) header: ResultHeader,
    pub(super) tensors: Vec<Outgoing>,
}

/// The result of task `id` as it travels.
///
/// # Errors
/// [`ErrorKind::Internal`] when the results do not fit the task.
pub(super) fn outgoing(
    id: u64,
    header: &TaskHeader,
    outcome: TaskOutcome,
) -> Result<OutgoingResult, TaskError> {
    let TaskOutcome { results, numerics_id, queued, compute } = outcome;
    let data = match (results, header.direction) {
        (Results::Forward { o, lse }, Direction::Forward) => vec![o, lse],
        (Results::Backward { dq, dk, dv }, Direction::Backward) => vec![dq, dk, dv],
        _ => return Err(TaskError::internal(format!("the server computed no {} result", header.direction))),
    };
    let mut tensors = Vec::with_capacity(data.len());
    for (&kind, data) in result_kinds(header).iter().zip(data) {
        let Row { heads, dim, .. } = row_of(header, kind);
        let slice = TensorSlice::contiguous("result", data, tokens_of(header, kind), heads, dim);
        let unfit = |error| {
            TaskError::internal(format!("the server computed a {kind} that does not fit the task: {error}"))
        };
        tensors.push(Outgoing::new(slice.map_err(unfit)?));
    }
    let reference = |(n, &kind)| {
        let tokens = tokens_of(header, kind);
        (&TensorRef { id: n as u64, kind, tokens, carried: true, last_use: true }).into()
    };
    let header = ResultHeader {
        task: id,
        tensors: result_kinds(header).iter().enumerate().map(reference).collect(),
        result_dtype: DType::from(&header.result_dtype) as i32,
        numerics_id: numerics_id.to_string(),
        queued_seconds: queued.as_secs_f32(),
        compute_seconds: compute.as_secs_f32(),
    };
    Ok(OutgoingResult { header, tensors })
}

/// A result on its way in.
#[derive(Debug)]
pub(super) struct IncomingResult {
    direction: Direction,
    tensors: Vec<(u64, Destination)>,
    numerics_id: Arc<str>,
    queued: Duration,
    compute: Duration,
}

impl IncomingResult {
    /// Room for the result of a task, by its own header and the result's.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when the two do not fit.
    pub(super) fn new(task: &TaskHeader, result: ResultHeader) -> Result<IncomingResult, TaskError> {
        let corrupt =
            |what: String| TaskError::new(ErrorKind::Corrupt, format!("the server's result header {what}"));
        if result.result_dtype != DType::F32 as i32 {
            return Err(corrupt(format!("has result_dtype {}, and f32 was asked for", result.result_dtype)));
        }
        let kinds = result_kinds(task);
        if result.tensors.len() != kinds.len() {
            return Err(corrupt(format!(
                "names {} tensors; there must be {}",
                result.tensors.len(),
                kinds.len()
            )));
        }
        let mut tensors: Vec<(u64, Destination)> = Vec::with_capacity(kinds.len());
        for (&kind, tensor) in kinds.iter().zip(result.tensors) {
            let tensor = TensorRef::try_from(tensor)
                .map_err(|error| corrupt(format!("names a bad tensor: {error}")))?;
            let tokens = tokens_of(task, kind);
            if tensor.kind != kind
                || tensor.tokens != tokens
                || tensors.iter().any(|(id, _)| *id == tensor.id)
            {
                let TensorRef { id, kind: other, tokens: held, .. } = tensor;
                return Err(corrupt(format!(
                    "names tensor {id} as {other} of tokens {held}; {kind} of tokens {tokens} must come here"
                )));
            }
            let row = row_of(task, kind);
            tensors.push((tensor.id, Destination::new(row.dtype, row.tensor_bytes(tokens.len()) as usize)));
        }
        let seconds = |s: f32| Duration::try_from_secs_f32(s).unwrap_or_default();
        Ok(IncomingResult {
            direction: task.direction,
            tensors,
            numerics_id: result.numerics_id.into(),
            queued: seconds(result.queued_seconds),
            compute: seconds(result.compute_seconds),
        })
    }

    /// Takes in a chunk; true when the result is whole.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when the chunk does not fit.
    pub(super) fn chunk(&mut self, chunk: &Chunk) -> Result<bool, TaskError> {
        let Some((_, tensor)) = self.tensors.iter_mut().find(|(id, _)| *id == chunk.tensor) else {
            let message = format!("the server's result has no tensor {}, and a chunk names it", chunk.tensor);
            return Err(TaskError::new(ErrorKind::Corrupt, message));
        };
        tensor.put(chunk)?;
        Ok(self.tensors.iter().all(|(_, tensor)| tensor.is_whole()))
    }

    /// The outcome, once whole.
    pub(super) fn into_outcome(self) -> TaskOutcome {
        let mut data = self.tensors.into_iter().map(|(_, tensor)| tensor.into_elements().into_f32());
        // All are f32, as the task asked.
        let mut next = || data.next().flatten().unwrap_or_default();
        let results = match self.direction {
            Direction::Forward => Results::Forward { o: next(), lse: next() },
            Direction::Backward => Results::Backward { dq: next(), dk: next(), dv: next() },
        };
        let IncomingResult { numerics_id, queued, compute, .. } = self;
        TaskOutcome { results, numerics_id, queued, compute }
    }
}
