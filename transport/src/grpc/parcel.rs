//! What of a shipment is sent together, and each tensor of it once.

use std::collections::HashMap;
use std::ops::Range;

use outboard_attention::{Span, TensorIdentity, TensorSlice};
use outboard_proto::{TaskError, TensorKind, TensorRef};

use crate::TaskRequest;
use crate::sizes::{Input, input_kinds, input_of, row_of, task_bytes, tokens_of};

/// Tasks sent together: the first of a shipment, as many as the server can hold at once.
#[derive(Debug)]
pub(super) struct Parcel {
    /// How many tasks.
    pub(super) tasks: usize,
    /// Bytes of credit they take: themselves, carried tensors and results.
    pub(super) bytes: u64,
    /// The tensors that each task names, in wire order, with ids counted from zero.
    pub(super) references: Vec<Vec<TensorRef>>,
    /// The tensors by id.
    pub(super) tensors: Vec<SharedTensor>,
}

/// A tensor and the tasks that read it.
#[derive(Debug)]
pub(super) struct SharedTensor {
    /// `None` when the server fetches it.
    pub(super) slice: Option<TensorSlice>,
    /// Indices of tasks of the parcel, in order; the first carries it.
    pub(super) users: Vec<usize>,
}

/// One task's use of one tensor.
struct Use<'a> {
    task: usize,
    kind: TensorKind,
    needed: Span,
    input: Input<'a>,
}

/// The memory that a tensor is in, here or at its homes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Identity {
    Here(TensorIdentity),
    /// By the address of what its tasks share.
    AtHomes(usize, TensorKind),
}

impl Use<'_> {
    fn identity(&self) -> Identity {
        match self.input {
            Input::Here(slice) => Identity::Here(slice.identity()),
            Input::AtHomes(keys) => Identity::AtHomes(keys.identity(), self.kind),
        }
    }
}

/// A run of tokens that tasks read of one tensor, without a gap.
struct Run {
    tokens: Span,
    uses: Range<usize>,
}

/// Packs the first tasks of a shipment, as many as take `limit` bytes together; `None` when even the first alone takes
/// more.
///
/// # Errors
/// [`outboard_proto::ErrorKind::Internal`] when a tensor does not hold what it said.
pub(super) fn pack(tasks: &[&TaskRequest], limit: u64) -> Result<Option<Parcel>, TaskError> {
    let fits = |count: usize| bytes_of(&tasks[..count]) <= limit;
    let mut count = tasks.len();
    if !fits(count) {
        // More tasks never take fewer bytes.
        let (mut fitting, mut too_many) = (0, count);
        while too_many - fitting > 1 {
            let middle = fitting + (too_many - fitting) / 2;
            if fits(middle) { fitting = middle } else { too_many = middle }
        }
        count = fitting;
    }
    if count == 0 { Ok(None) } else { parcel(&tasks[..count]).map(Some) }
}

/// Bytes of credit that the tasks take when sent together.
pub(super) fn bytes_of(tasks: &[&TaskRequest]) -> u64 {
    let (uses, runs) = runs_of(tasks);
    let run_bytes = |run: &Run| {
        let Use { task, kind, .. } = uses[run.uses.start];
        row_of(&tasks[task].header, kind).tensor_bytes(run.tokens.len())
    };
    let own = tasks.iter().map(|task| task_bytes(&task.header));
    own.chain(runs.iter().map(run_bytes)).fold(0, u64::saturating_add)
}

fn parcel(tasks: &[&TaskRequest]) -> Result<Parcel, TaskError> {
    let (uses, runs) = runs_of(tasks);
    let mut references: Vec<Vec<TensorRef>> = tasks.iter().map(|_| Vec::new()).collect();
    let mut tensors = Vec::with_capacity(runs.len());
    for (id, run) in runs.iter().enumerate() {
        let mut users: Vec<(usize, TensorKind)> =
            uses[run.uses.clone()].iter().map(|u| (u.task, u.kind)).collect();
        users.sort_by_key(|&(task, kind)| (task, place_of(kind)));
        let last = users.len() - 1;
        for (n, &(task, kind)) in users.iter().enumerate() {
            let (carried, last_use) = (n == 0, n == last);
            references[task].push(TensorRef { id: id as u64, kind, tokens: run.tokens, carried, last_use });
        }
        let missing =
            || TaskError::internal(format!("a tensor does not hold the tokens {} that it said", run.tokens));
        let slice = match uses[run.uses.start].input {
            Input::Here(slice) => Some(slice.with_tokens(run.tokens).ok_or_else(missing)?),
            Input::AtHomes(_) => None,
        };
        tensors.push(SharedTensor { slice, users: users.into_iter().map(|(task, _)| task).collect() });
    }
    for named in &mut references {
        named.sort_by_key(|tensor| place_of(tensor.kind));
    }
    Ok(Parcel { tasks: tasks.len(), bytes: bytes_of(tasks), references, tensors })
}

/// Where a kind stands in wire order.
fn place_of(kind: TensorKind) -> usize {
    input_kinds(outboard_attention::Direction::Backward).iter().position(|&k| k == kind).unwrap_or(usize::MAX)
}

/// Every use of a tensor, sorted so that uses of overlapping tokens of the same memory follow each other; and the runs
/// that they form. Only what tasks need is in a run, not all that their slices hold.
fn runs_of<'a>(tasks: &[&'a TaskRequest]) -> (Vec<Use<'a>>, Vec<Run>) {
    // Memory addresses differ from run to run of the program: order by first appearance.
    let mut order: HashMap<Identity, usize> = HashMap::new();
    let mut uses = Vec::new();
    for (task, request) in tasks.iter().enumerate() {
        for &kind in input_kinds(request.header.direction) {
            let Some(input) = input_of(request, kind) else { continue };
            let own = tokens_of(&request.header, kind);
            // What is fetched is fetched whole.
            let needed = match input {
                Input::Here(_) => own,
                Input::AtHomes(_) => request.header.fetched_keys().unwrap_or(own),
            };
            let (next, of_tensor) = (order.len(), Use { task, kind, needed, input });
            let rank = *order.entry(of_tensor.identity()).or_insert(next);
            uses.push((rank, of_tensor));
        }
    }
    uses.sort_by_key(|(rank, u)| (*rank, u.needed));
    let mut runs: Vec<Run> = Vec::new();
    let mut run_rank = None;
    for (n, (rank, u)) in uses.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if run_rank == Some(*rank) && run.tokens.meets(u.needed) => {
                run.tokens = run.tokens.hull(u.needed);
                run.uses.end = n + 1;
            }
            _ => runs.push(Run { tokens: u.needed, uses: n..n + 1 }),
        }
        run_rank = Some(*rank);
    }
    (uses.into_iter().map(|(_, u)| u).collect(), runs)
}
