//! What is shipped, and what comes back.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use outboard_attention::kernel::Results;
use outboard_attention::{AnyTensor, InvalidAttention, Span, TensorSlice};
use outboard_proto::{TaskError, TaskHeader};
use tokio::sync::oneshot;

/// The tensors that a backward task reads besides Q, K, V.
#[derive(Clone, Debug)]
pub struct GradientInputs {
    /// dO, shaped as O.
    pub d_o: TensorSlice,
    /// LSE `[tokens, q_heads, 1]`, f32.
    pub lse: TensorSlice,
    /// D = rowsum(dO * O) `[tokens, q_heads, 1]`, f32.
    pub d: TensorSlice,
}

/// The tensors that a task reads. Each holds at least the tokens that the task needs, and exactly its heads; those of Q,
/// K, V and dO are of the geometry's element type.
#[derive(Clone, Debug)]
pub struct TaskInputs {
    /// Queries.
    pub q: TensorSlice,
    /// Keys.
    pub k: TensorSlice,
    /// Values.
    pub v: TensorSlice,
    /// For backward.
    pub gradient: Option<GradientInputs>,
}

/// Where a task's K and V come from.
#[derive(Clone, Debug)]
pub enum Keys {
    /// They are sent along.
    Here {
        /// Keys.
        k: TensorSlice,
        /// Values.
        v: TensorSlice,
    },
    /// The server fetches them from the homes that the header names.
    AtHomes(KeyShare),
}

/// What tasks of one shipment share that name the same homes: clones of one. A server fetches keys once for them.
#[derive(Clone, Debug, Default)]
pub struct KeyShare(Arc<()>);

impl KeyShare {
    /// The same for clones, and for nothing else while one of them is held.
    pub(crate) fn identity(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }
}

/// A task to ship. Tasks of one shipment that hold the same slice of the same storage send it once.
#[derive(Clone, Debug)]
pub struct TaskRequest {
    /// Everything but the tensors.
    pub header: TaskHeader,
    /// Queries.
    pub q: TensorSlice,
    /// Keys and values.
    pub keys: Keys,
    /// For backward.
    pub gradient: Option<GradientInputs>,
}

impl TaskRequest {
    /// A task whose client sends all tensors.
    pub fn new(header: TaskHeader, inputs: TaskInputs) -> TaskRequest {
        let TaskInputs { q, k, v, gradient } = inputs;
        TaskRequest { header, q, keys: Keys::Here { k, v }, gradient }
    }

    /// All its tensors, when the client sends them.
    pub fn inputs(&self) -> Option<TaskInputs> {
        let Keys::Here { k, v } = &self.keys else { return None };
        let (q, gradient) = (self.q.clone(), self.gradient.clone());
        Some(TaskInputs { q, k: k.clone(), v: v.clone(), gradient })
    }

    /// Checks that the tensors fit the header: tokens held, heads, dims and element types.
    ///
    /// # Errors
    /// [`InvalidAttention`] naming the tensor at fault.
    pub fn check(&self) -> Result<(), InvalidAttention> {
        let TaskRequest { header, q, keys, gradient } = self;
        let task = &header.task;
        task.check(&header.geometry)?;
        let (shapes, dtype) = (task.shapes(&header.geometry), header.geometry.dtype());
        held("q", q, task.q())?.expect("q", shapes.q, dtype)?;
        match keys {
            Keys::Here { k, v } => {
                held("k", k, task.kv())?.expect("k", shapes.k, dtype)?;
                held("v", v, task.kv())?.expect("v", shapes.v, dtype)?;
            }
            Keys::AtHomes(_) => {
                let bound = header.fetched_keys().unwrap_or_default();
                if !bound.covers(task.kv()) {
                    let (field, bound_name) = ("kv", "the tokens of the homes that the task names");
                    return Err(InvalidAttention::OutsideSpan { field, span: task.kv(), bound_name, bound });
                }
            }
        }
        if let Some(GradientInputs { d_o, lse, d }) = gradient {
            held("d_o", d_o, task.q())?.expect("d_o", shapes.o, dtype)?;
            held("lse", lse, task.q())?.f32("lse")?.expect("lse", shapes.row)?;
            held("d", d, task.q())?.f32("d")?.expect("d", shapes.row)?;
        }
        Ok(())
    }
}

/// The tokens that a task needs of a tensor.
fn held<'a>(
    field: &'static str,
    tensor: &'a TensorSlice,
    span: Span,
) -> Result<AnyTensor<'a>, InvalidAttention> {
    let (bound_name, bound) = ("the tokens it holds", tensor.tokens());
    tensor.view_of(span).ok_or(InvalidAttention::OutsideSpan { field, span, bound_name, bound })
}

/// A task's result and what it took.
#[derive(Debug)]
pub struct TaskOutcome {
    /// O and LSE, or dQ, dK and dV; these two are empty where they went to their homes.
    pub results: Results,
    /// Who computed it.
    pub numerics_id: Arc<str>,
    /// From arrival of the last input to the start of the computation, which in a batch is the end of the task before.
    pub queued: Duration,
    /// Of the computation. The tasks of a batch share its time: each takes what passed since the one before it ended.
    pub compute: Duration,
}

/// A shipped task. Dropping it cancels the task: buffers in flight stay with their operation until it ends.
#[derive(Debug)]
pub struct Pending {
    receiver: oneshot::Receiver<Result<TaskOutcome, TaskError>>,
}

/// The other end of a [`Pending`].
#[derive(Debug)]
pub struct Reply {
    sender: oneshot::Sender<Result<TaskOutcome, TaskError>>,
}

impl Pending {
    /// A pending task and the way to end it.
    pub fn new() -> (Reply, Pending) {
        let (sender, receiver) = oneshot::channel();
        (Reply { sender }, Pending { receiver })
    }

    /// A task that has failed already.
    pub fn failed(error: TaskError) -> Pending {
        let (reply, pending) = Pending::new();
        reply.send(Err(error));
        pending
    }
}

impl Future for Pending {
    type Output = Result<TaskOutcome, TaskError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.receiver).poll(cx).map(|received| {
            received
                .unwrap_or_else(|_| Err(TaskError::unavailable("the connection ended before the task did")))
        })
    }
}

impl Reply {
    /// Ends the task. A task that was cancelled meanwhile is dropped.
    pub fn send(self, outcome: Result<TaskOutcome, TaskError>) {
        // The receiver is gone exactly when the task was cancelled, which is no error.
        let _ = self.sender.send(outcome);
    }

    /// True when the task was cancelled, so that nobody waits for the result.
    pub fn is_cancelled(&self) -> bool {
        self.sender.is_closed()
    }

    /// Resolves when the task is cancelled.
    pub async fn cancelled(&mut self) {
        self.sender.closed().await;
    }
}
