//! What a server's stream has been told of and not yet handed on: tasks, and the tensors they wait for.

mod fetching;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet, VecDeque};

use outboard_attention::{Span, TensorSlice};
use outboard_proto::v1::Chunk;
use outboard_proto::{ErrorKind, TaskError, TaskHeader, TensorKind, TensorRef, WireTask};

pub(super) use self::fetching::Fetch;
use self::fetching::Fetching;
use super::elements::Destination;
use crate::sizes::{Row, TENSOR_BYTES, input_kinds, row_of, task_bytes, tokens_of};
use crate::sums::Member;
use crate::{ByteLease, GradientInputs, TaskInputs};

/// Most ids of given-up tensors whose late chunks are still known for what they are.
const MAX_DEAD: usize = 4096;
/// Most tensors a task reads.
const MAX_INPUTS: usize = 6;

/// The tasks and tensors of one stream. No method panics or blocks on anything a client sends.
#[derive(Debug)]
pub(super) struct Arrivals {
    max_tasks: usize,
    tasks: HashMap<u64, Waiting>,
    tensors: HashMap<u64, Tensor>,
    dead: DeadTensors,
    /// How many fetches there have been.
    fetches: u64,
}

#[derive(Debug)]
struct Waiting {
    header: TaskHeader,
    tensors: Vec<TensorRef>,
    /// How many of them are not whole.
    missing: usize,
    results: ByteLease,
    /// Its place in its group's sum, which fails when the task does.
    member: Option<Member>,
}

#[derive(Debug)]
struct Tensor {
    carrier: u64,
    tokens: Span,
    row: Row,
    content: Content,
    lease: ByteLease,
    /// Waiting tasks that name it, once for each time they do.
    users: Vec<u64>,
    /// True until a task says that no later one names it.
    open: bool,
}

#[derive(Debug)]
enum Content {
    Arriving(Destination),
    /// On its way from its homes.
    Fetching(Fetching),
    Whole(TensorSlice),
    /// Its homes did not give it.
    Lost(TaskError),
}

/// A task whose tensors are all there.
#[derive(Debug)]
pub(super) struct WholeTask {
    pub(super) id: u64,
    pub(super) header: TaskHeader,
    pub(super) inputs: TaskInputs,
    /// Bytes of itself, its inputs and its results.
    pub(super) lease: ByteLease,
    /// Bytes of itself and its results.
    pub(super) results: ByteLease,
    pub(super) member: Option<Member>,
}

/// A task that cannot go on.
pub(super) type Failed = (u64, TaskError);

/// Ids of tensors that were given up half-way: their chunks may still be on the way.
#[derive(Debug, Default)]
struct DeadTensors {
    ids: HashSet<u64>,
    order: VecDeque<u64>,
}

impl DeadTensors {
    fn insert(&mut self, id: u64) {
        if self.ids.insert(id) {
            self.order.push_back(id);
        }
        if self.order.len() > MAX_DEAD
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
    }
}

fn is_key(kind: TensorKind) -> bool {
    matches!(kind, TensorKind::K | TensorKind::V)
}

/// What a checked task spends: first itself and its results, then each tensor it carries, which may outlive it.
pub(super) fn costs(task: &WireTask) -> Vec<u64> {
    let carried = task.tensors.iter().filter(|tensor| tensor.carried);
    let bytes = |tensor: &TensorRef| row_of(&task.header, tensor.kind).tensor_bytes(tensor.tokens.len());
    let carried: Vec<u64> = carried.map(|tensor| bytes(tensor).saturating_add(TENSOR_BYTES)).collect();
    let own = task_bytes(&task.header).saturating_sub(carried.len() as u64 * TENSOR_BYTES);
    std::iter::once(own).chain(carried).collect()
}

impl Arrivals {
    pub(super) fn new(max_tasks: usize) -> Arrivals {
        let (tasks, tensors, dead) = (HashMap::new(), HashMap::new(), DeadTensors::default());
        Arrivals { max_tasks, tasks, tensors, dead, fetches: 0 }
    }

    /// True when no task waits for a tensor.
    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// True when a task of this id waits.
    pub(super) fn holds(&self, task: u64) -> bool {
        self.tasks.contains_key(&task)
    }

    /// Refuses a task when too many are under way already: those that wait here, and `running` that were handed on.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`].
    pub(super) fn check_room(&self, running: usize) -> Result<(), TaskError> {
        let (waiting, tensors, max) = (self.tasks.len(), self.tensors.len(), self.max_tasks);
        if waiting + running < max && tensors < max.saturating_mul(MAX_INPUTS) {
            return Ok(());
        }
        let message = format!(
            "{waiting} tasks of this stream wait, with {tensors} tensors, and {running} run; {max} tasks may be under way: send \
             fewer at once"
        );
        Err(TaskError::new(ErrorKind::Busy, message))
    }

    /// Checks the tensors that a task names against each other and against what the stream carries.
    ///
    /// # Errors
    /// What is wrong with which tensor.
    pub(super) fn check(&self, task: &WireTask) -> Result<(), TaskError> {
        let needed = input_kinds(task.header.direction);
        for &kind in needed {
            let count = task.tensors.iter().filter(|tensor| tensor.kind == kind).count();
            if count != 1 {
                return Err(TaskError::invalid(format!(
                    "tensors names {kind} {count} times; it must be named once"
                )));
            }
        }
        if let Some(tokens) = task.header.fetched_keys() {
            let keys = task.tensors.iter().filter(|tensor| is_key(tensor.kind));
            let carried = keys.clone().filter(|tensor| tensor.carried).count();
            if carried == 1 || keys.clone().any(|tensor| tensor.tokens != tokens) {
                return Err(TaskError::invalid(format!(
                    "key_homes names tokens {tokens}; K and V must hold these, and be carried both or neither"
                )));
            }
        }
        for (n, tensor) in task.tensors.iter().enumerate() {
            let check = self.check_tensor(task, &task.tensors[..n], tensor);
            check.map_err(|error| error.context(format_args!("tensor {} ({})", tensor.id, tensor.kind)))?;
        }
        Ok(())
    }

    fn check_tensor(
        &self,
        task: &WireTask,
        before: &[TensorRef],
        tensor: &TensorRef,
    ) -> Result<(), TaskError> {
        let invalid = |message: String| Err(TaskError::invalid(message));
        let TensorRef { id, kind, tokens, .. } = *tensor;
        if !input_kinds(task.header.direction).contains(&kind) {
            return invalid(format!("a {} task does not read it", task.header.direction));
        }
        let needed = tokens_of(&task.header, kind);
        if !tokens.covers(needed) {
            return invalid(format!("it holds tokens {tokens}, and the task needs {needed}"));
        }
        let row = row_of(&task.header, kind);
        let earlier = before.iter().rev().find(|other| other.id == id);
        let carried = match (self.tensors.get(&id), earlier) {
            (Some(known), _) => Some((known.tokens, known.row, known.open)),
            (None, Some(other)) => Some((other.tokens, row_of(&task.header, other.kind), !other.last_use)),
            (None, None) => None,
        };
        match carried {
            None if tensor.carried => Ok(()),
            None => {
                invalid("no task of the stream carries it, or its chunks were bad; carry it again".to_owned())
            }
            Some(_) if tensor.carried => {
                invalid("it is carried twice; give every tensor an id of its own".to_owned())
            }
            Some((_, _, false)) => invalid("an earlier task said that it was the last to use it".to_owned()),
            Some((other, ..)) if other != tokens => {
                invalid(format!("it was carried with tokens {other}, and is named with {tokens}"))
            }
            Some((_, other, _)) if other != row => {
                invalid(format!("it was carried as {other}, and the task needs {row}"))
            }
            Some(_) => Ok(()),
        }
    }

    /// Takes in a task that was checked and has spent its [`costs`]. Says what is to be fetched for it, and gives it back at
    /// once when all is there already.
    pub(super) fn announce(
        &mut self,
        task: WireTask,
        leases: Vec<ByteLease>,
        member: Option<Member>,
    ) -> (Option<Fetch>, Option<WholeTask>) {
        let WireTask { id, header, tensors } = task;
        let mut leases = leases.into_iter();
        let Some(results) = leases.next() else { return (None, None) };
        let (fetching, given_up) = Fetching::new(self.fetches);
        let (mut missing, mut fetched) = (0, Vec::new());
        for tensor in &tensors {
            if tensor.carried {
                let row = row_of(&header, tensor.kind);
                let bytes = row.tensor_bytes(tensor.tokens.len()) as usize;
                let Some(lease) = leases.next() else { return (None, None) };
                let at_homes = is_key(tensor.kind) && !header.key_homes.is_empty();
                let content = if at_homes {
                    fetched.push((tensor.kind, tensor.id, lease.clone()));
                    Content::Fetching(fetching.clone())
                } else {
                    Content::Arriving(Destination::new(row.dtype, bytes))
                };
                let (tokens, users) = (tensor.tokens, Vec::new());
                let new = Tensor { carrier: id, tokens, row, content, lease, users, open: true };
                self.tensors.insert(tensor.id, new);
            }
            if let Some(known) = self.tensors.get_mut(&tensor.id) {
                known.users.push(id);
                known.open &= !tensor.last_use;
                missing += usize::from(!matches!(known.content, Content::Whole(_)));
            }
        }
        let id_of = |kind| fetched.iter().find(|(k, ..)| *k == kind).map(|(_, id, _)| *id);
        let fetch = match (id_of(TensorKind::K), id_of(TensorKind::V), header.fetched_keys()) {
            (Some(k), Some(v), Some(tokens)) => {
                self.fetches += 1;
                let lease = ByteLease::joined(fetched.into_iter().map(|(_, _, lease)| lease).collect());
                Some(fetching.fetch(&header, [k, v], tokens, lease, given_up))
            }
            _ => None,
        };
        self.tasks.insert(id, Waiting { header, tensors, missing, results, member });
        (fetch, if missing == 0 { self.complete(id) } else { None })
    }

    /// Notes that a tensor of these tasks is whole; gives back those that are too.
    fn arrived(&mut self, users: Vec<u64>) -> Vec<WholeTask> {
        let mut whole = Vec::new();
        for user in users {
            if let Some(waiting) = self.tasks.get_mut(&user) {
                waiting.missing = waiting.missing.saturating_sub(1);
                if waiting.missing == 0 {
                    whole.extend(self.complete(user));
                }
            }
        }
        whole
    }

    /// Gives up the tasks of a tensor that will not come.
    fn fail_users(&mut self, users: Vec<u64>, error: &TaskError) -> Vec<Failed> {
        let mut failed = Vec::new();
        for user in users {
            if let Some(waiting) = self.tasks.get(&user) {
                failed.push((user, error.clone().context(waiting.header.name())));
                self.cancel(user);
            }
        }
        failed
    }

    /// Takes in a chunk, and gives back the tasks that have become whole by it.
    ///
    /// # Errors
    /// The tasks that cannot go on because of it. The rest of the stream can.
    pub(super) fn chunk(&mut self, chunk: &Chunk) -> Result<Vec<WholeTask>, Vec<Failed>> {
        let (task, id) = (chunk.task, chunk.tensor);
        let fail = |message: String| Err(vec![(task, TaskError::new(ErrorKind::Corrupt, message))]);
        let Some(tensor) = self.tensors.get_mut(&id) else {
            if self.dead.ids.contains(&id) {
                return Ok(Vec::new());
            }
            return fail(format!(
                "a chunk of task {task} names tensor {id}, which is unknown or whole already"
            ));
        };
        if tensor.carrier != task {
            let carrier = tensor.carrier;
            return fail(format!("a chunk of tensor {id} names task {task}, and task {carrier} carries it"));
        }
        let destination = match &mut tensor.content {
            Content::Arriving(destination) => destination,
            Content::Whole(_) => {
                return fail(format!("a chunk of task {task} comes after tensor {id} was whole"));
            }
            Content::Fetching(_) | Content::Lost(_) => {
                return fail(format!("a chunk of task {task} comes for tensor {id}, which its homes send"));
            }
        };
        if let Err(error) = destination.put(chunk) {
            return Err(self.give_up_tensor(id, task, &error));
        }
        if !destination.is_whole() {
            return Ok(Vec::new());
        }
        let Row { heads, dim, dtype } = tensor.row;
        let elements = std::mem::replace(destination, Destination::new(dtype, 0)).into_elements();
        match TensorSlice::contiguous("tensor", elements, tensor.tokens, heads, dim) {
            Ok(slice) => tensor.content = Content::Whole(slice),
            Err(error) => return Err(self.give_up_tensor(id, task, &error.into())),
        }
        let users = tensor.users.clone();
        Ok(self.arrived(users))
    }

    /// Forgets a waiting task. Its tensors stay as long as others may name them. False when it does not wait.
    pub(super) fn cancel(&mut self, task: u64) -> bool {
        let Some(waiting) = self.tasks.remove(&task) else { return false };
        for tensor in &waiting.tensors {
            self.leave(tensor.id, task);
        }
        true
    }

    /// Remembers the tensors of a refused header, so that their chunks are known for what they are.
    pub(super) fn discard(&mut self, tensor: u64) {
        if !self.tensors.contains_key(&tensor) {
            self.dead.insert(tensor);
        }
    }

    /// Gives up the tasks that wait for chunks, each with its header, and what only later tasks could name: nothing more
    /// comes from the client.
    pub(super) fn end(&mut self) -> Vec<(u64, TaskHeader)> {
        let arriving = |tensor: &Tensor| matches!(tensor.content, Content::Arriving(_));
        let waits = |named: &TensorRef| self.tensors.get(&named.id).is_some_and(arriving);
        let waiting = self.tasks.extract_if(|_, task| task.tensors.iter().any(waits));
        let given_up: Vec<_> = waiting.collect();
        for (id, task) in &given_up {
            task.tensors.iter().for_each(|tensor| self.leave(tensor.id, *id));
        }
        self.tensors.values_mut().for_each(|tensor| tensor.open = false);
        self.tensors.retain(|_, tensor| !tensor.users.is_empty());
        given_up.into_iter().map(|(id, task)| (id, task.header)).collect()
    }

    fn give_up_tensor(&mut self, id: u64, carrier: u64, error: &TaskError) -> Vec<Failed> {
        self.dead.insert(id);
        let users = self.tensors.remove(&id).map(|tensor| tensor.users).unwrap_or_default();
        let mut failed = self.fail_users(users, error);
        if failed.is_empty() {
            failed.push((carrier, error.clone()));
        }
        failed
    }

    fn leave(&mut self, tensor: u64, task: u64) {
        let Some(known) = self.tensors.get_mut(&tensor) else { return };
        known.users.retain(|&user| user != task);
        if known.users.is_empty() && !known.open {
            if matches!(known.content, Content::Arriving(_)) {
                self.dead.insert(tensor);
            }
            self.tensors.remove(&tensor);
        }
    }

    fn complete(&mut self, id: u64) -> Option<WholeTask> {
        let Waiting { header, tensors, results, member, .. } = self.tasks.remove(&id)?;
        let mut leases = vec![results.clone()];
        let mut slices = Vec::with_capacity(tensors.len());
        for tensor in &tensors {
            if let Some(Tensor { content: Content::Whole(slice), lease, .. }) = self.tensors.get(&tensor.id) {
                slices.push((tensor.kind, slice.clone()));
                leases.push(lease.clone());
            }
        }
        for tensor in &tensors {
            self.leave(tensor.id, id);
        }
        let slice = |kind| slices.iter().find(|(k, _)| *k == kind).map(|(_, slice)| slice.clone());
        let gradient = match (slice(TensorKind::DO), slice(TensorKind::Lse), slice(TensorKind::D)) {
            (Some(d_o), Some(lse), Some(d)) => Some(GradientInputs { d_o, lse, d }),
            _ => None,
        };
        let (q, k, v) = (slice(TensorKind::Q)?, slice(TensorKind::K)?, slice(TensorKind::V)?);
        let inputs = TaskInputs { q, k, v, gradient };
        Some(WholeTask { id, header, inputs, lease: ByteLease::joined(leases), results, member })
    }
}
