//! Tasks for the attention server in this process: tensors go by pointer.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, Weak};

use outboard_attention::TensorSlice;
use outboard_proto::{ErrorKind, TaskError, TaskHeader};
use tokio::runtime::Handle;
use tokio::sync::{OnceCell, Semaphore};

use crate::guard::{Deadline, guard};
use crate::home::{Fetched, deliver};
use crate::parts::Claim;
use crate::sizes::{check, numerics_ids, refuse, result_bytes};
use crate::sums::{GroupSum, Member, SumKey, counted, sum_of};
use crate::{
    ArrivedTask, ByteBudget, ByteLease, GradientInputs, Homes, Keys, Origin, Pending, Reply, TaskHandler,
    TaskInputs, TaskRequest, Traffic, Transport,
};

/// Most shipments that may wait for the server's memory at once.
const MAX_WAITING: usize = 4096;

/// A [`Transport`] to a handler in the same process.
#[derive(Clone)]
pub struct InProcess {
    handler: Arc<dyn TaskHandler>,
    homes: Homes,
    runtime: Handle,
    waiting: Arc<Semaphore>,
}

impl InProcess {
    /// Ships to `handler`; waits for its memory on `runtime`.
    pub fn new(handler: Arc<dyn TaskHandler>, runtime: Handle) -> InProcess {
        InProcess {
            handler,
            homes: Homes::default(),
            runtime,
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
        }
    }

    /// The same, which fetches keys by `homes`.
    pub fn with_homes(self, homes: Homes) -> InProcess {
        InProcess { homes, ..self }
    }
}

impl std::fmt::Debug for InProcess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InProcess").field("numerics_ids", &self.numerics_ids()).finish_non_exhaustive()
    }
}

impl Transport for InProcess {
    fn ship(&self, shipment: Vec<TaskRequest>) -> Vec<Pending> {
        let Ok(permit) = Arc::clone(&self.waiting).try_acquire_owned() else {
            let message =
                format!("{MAX_WAITING} shipments wait for the server in this process already; ship later");
            let busy = || Pending::failed(TaskError::new(ErrorKind::Busy, message.clone()));
            return shipment.iter().map(|_| busy()).collect();
        };
        let mut pendings = Vec::with_capacity(shipment.len());
        let mut tasks = Vec::with_capacity(shipment.len());
        let checked = check(&shipment);
        for (request, checked) in shipment.into_iter().zip(checked) {
            if let Err(error) = checked {
                pendings.push(Pending::failed(error.context(request.header.name())));
                continue;
            }
            let deadline = Deadline::of(&request.header);
            let (reply, pending) = match deadline {
                // Without a deadline nothing has to stand between: the handler sees a dropped task itself.
                None => Pending::new(),
                Some(_) => guard(&self.runtime, &request.header, deadline, (), || {}),
            };
            pendings.push(pending);
            tasks.push((request, reply));
        }
        let server = Server { handler: Arc::clone(&self.handler), homes: self.homes.clone() };
        self.runtime.spawn(async move {
            let (mut shared, mut groups) = (SharedKeys::default(), server.groups(&tasks));
            // A group's tasks one after another: while some of them have their memory, nobody else waits for it.
            let mut first: HashMap<SumKey, usize> = HashMap::new();
            let at = |(n, (request, _)): (usize, &(TaskRequest, Reply))| {
                sum_of(&request.header).map_or(n, |key| *first.entry(key).or_insert(n))
            };
            let order: Vec<usize> = tasks.iter().enumerate().map(at).collect();
            let mut tasks: Vec<_> = order.into_iter().zip(tasks).collect();
            tasks.sort_by_key(|(at, _)| *at);
            for (_, (request, reply)) in tasks {
                let group = sum_of(&request.header).and_then(|key| groups.get_mut(&key));
                server.submit(request, &mut shared, group, reply).await;
            }
            drop(permit);
        });
        pendings
    }

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }

    fn numerics_ids(&self) -> Vec<String> {
        numerics_ids(&*self.handler)
    }
}

/// K and V that tasks of a shipment share.
#[derive(Debug)]
struct FetchedKeys {
    /// Once they are fetched, or lost.
    cell: OnceCell<Result<[TensorSlice; 2], TaskError>>,
    /// Their memory.
    lease: ByteLease,
    /// By which others find them while they are here.
    claims: OnceLock<Vec<Claim>>,
}

/// The fetched keys of a shipment, by what their tasks share.
#[derive(Debug, Default)]
struct SharedKeys {
    known: HashMap<usize, Weak<FetchedKeys>>,
    /// Keeps them for tasks to come.
    kept: Vec<Arc<FetchedKeys>>,
}

/// The memory that a task takes here: its results', and the keys that it reads.
type Room = (ByteLease, Option<Arc<FetchedKeys>>);

impl SharedKeys {
    /// Takes `results` bytes for a task, and `fetched` for its keys where they are not here already. Whoever waits holds
    /// nothing meanwhile, so that it waits for tasks that have all of theirs; it may be that keys are fetched again then.
    async fn room(
        &mut self,
        budget: &ByteBudget,
        keys: &Keys,
        results: u64,
        fetched: u64,
    ) -> Result<Room, TaskError> {
        let share = match keys {
            Keys::AtHomes(share) => Some(share.identity()),
            Keys::Here { .. } => None,
        };
        let fetched = if share.is_some() { fetched } else { 0 };
        let known = share.and_then(|share| self.get(share));
        let now = budget.try_lease_both(results, if known.is_some() { 0 } else { fetched });
        let (own, of_keys, known) = match now {
            Some([own, of_keys]) => (own, of_keys, known),
            None => {
                drop(known);
                self.kept.clear();
                let [own, of_keys] = budget.lease_both(results, fetched).await?;
                (own, of_keys, share.and_then(|share| self.get(share)))
            }
        };
        let Some(share) = share else { return Ok((own, None)) };
        let keys = known.unwrap_or_else(|| {
            let new =
                Arc::new(FetchedKeys { cell: OnceCell::new(), lease: of_keys, claims: OnceLock::new() });
            self.known.insert(share, Arc::downgrade(&new));
            self.kept.push(Arc::clone(&new));
            new
        });
        Ok((own, Some(keys)))
    }

    fn get(&self, share: usize) -> Option<Arc<FetchedKeys>> {
        self.known.get(&share).and_then(Weak::upgrade)
    }
}

/// A reduction group that is shipped as a whole.
struct Group {
    sum: Arc<GroupSum>,
    /// Bytes of all its results, and of the keys that its tasks read.
    results: u64,
    keys: u64,
    /// Tasks still to be submitted.
    left: usize,
    /// The memory of all its tasks, once the first has it: none of them gives any back before the last is computed.
    room: Option<(ByteLease, Option<Arc<FetchedKeys>>)>,
}

impl Group {
    /// The place of the next of its tasks.
    fn next(&mut self) -> Member {
        self.left = self.left.saturating_sub(1);
        self.sum.member()
    }
}

/// What submitting takes.
#[derive(Clone)]
struct Server {
    handler: Arc<dyn TaskHandler>,
    homes: Homes,
}

impl Server {
    /// The reduction groups that are in a shipment as a whole and fit the memory so: their tasks' gradients are added up.
    fn groups(&self, tasks: &[(TaskRequest, Reply)]) -> HashMap<SumKey, Group> {
        let headers = || tasks.iter().map(|(request, _)| &request.header);
        let together = counted(headers());
        let mut groups = HashMap::new();
        for header in headers() {
            let Some(key) = sum_of(header).filter(|key| together.get(key) == Some(&header.group_tasks))
            else {
                continue;
            };
            let tasks = header.group_tasks as usize;
            let group = groups.entry(key).or_insert_with(|| {
                let keys = self.homes.fetched_bytes(header);
                Group { sum: GroupSum::new(tasks), results: 0, keys, left: tasks, room: None }
            });
            group.results = group.results.saturating_add(result_bytes(header));
        }
        let largest = self.handler.budget().largest();
        groups.retain(|_, group| group.results.saturating_add(group.keys) <= largest);
        groups
    }

    /// Waits for room for all memory that the task takes here and submits it.
    async fn submit(
        &self,
        request: TaskRequest,
        shared: &mut SharedKeys,
        mut group: Option<&mut Group>,
        mut reply: Reply,
    ) {
        let TaskRequest { header, q, keys, gradient } = request;
        // A task that goes no further fails its sum.
        let member = group.as_mut().map(|group| group.next());
        if let Err(error) = refuse(&*self.handler, &header) {
            if let Some(group) = group.filter(|group| group.left == 0) {
                group.room = None;
            }
            return self.fail(&header, reply, error);
        }
        let fetched = self.homes.fetched_bytes(&header);
        let known = group.as_mut().and_then(|group| group.room.take());
        let room = match known {
            Some(room) => Ok(room),
            None => {
                let results = group.as_ref().map_or_else(|| result_bytes(&header), |group| group.results);
                tokio::select! {
                    biased;
                    room = shared.room(self.handler.budget(), &keys, results, fetched) => room,
                    () = reply.cancelled() => return,
                }
            }
        };
        if let (Some(group), Ok(room)) = (group, &room) {
            group.room = (group.left > 0).then(|| room.clone());
        }
        match (room, keys) {
            (Err(error), _) => self.fail(&header, reply, error),
            (Ok((lease, _)), Keys::Here { k, v }) => {
                let inputs = TaskInputs { q, k, v, gradient };
                self.handler.submit(ArrivedTask { header, inputs, origin: Origin::InPlace, lease, reply });
            }
            (Ok((lease, Some(keys))), Keys::AtHomes(_)) => {
                let server = self.clone();
                tokio::spawn(async move {
                    let inputs = (q, gradient, member);
                    server.submit_fetched(header, inputs, keys, lease, reply).await
                });
            }
            (Ok((_, None)), Keys::AtHomes(_)) => {
                self.fail(&header, reply, TaskError::internal("nothing to fetch the task's keys into"));
            }
        }
    }

    /// Submits a task whose memory has been counted, once its keys are there; delivers their gradients.
    async fn submit_fetched(
        &self,
        header: TaskHeader,
        (q, gradient, member): (TensorSlice, Option<GradientInputs>, Option<Member>),
        keys: Arc<FetchedKeys>,
        results: ByteLease,
        mut reply: Reply,
    ) {
        // When the task that fetches is cancelled, the next one fetches in its place.
        let fetch = async || {
            let tokens = header.fetched_keys().unwrap_or_default();
            let Fetched { k, v, received, claims } = self.homes.fetch(&header, tokens).await?;
            self.handler.count_bytes(received, 0);
            // There are none before: keys are fetched once.
            let _ = keys.claims.set(claims);
            Ok([k, v])
        };
        let fetched = tokio::select! {
            biased;
            fetched = keys.cell.get_or_init(fetch) => fetched.clone(),
            () = reply.cancelled() => return,
        };
        let [k, v] = match fetched {
            Ok(slices) => slices,
            Err(error) => return self.fail(&header, reply, error),
        };
        let (inner, pending) = Pending::new();
        let inputs = TaskInputs { q, k, v, gradient };
        let lease = ByteLease::joined(vec![results.clone(), keys.lease.clone()]);
        let origin = Origin::InPlace;
        self.handler.submit(ArrivedTask { header: header.clone(), inputs, origin, lease, reply: inner });
        let finish = async {
            let outcome = pending.await;
            drop(keys);
            deliver(&self.homes, &*self.handler, &header, member, outcome?).await
        };
        let outcome = tokio::select! {
            biased;
            outcome = finish => outcome,
            () = reply.cancelled() => return,
        };
        // Until here they were delivered from.
        drop(results);
        reply.send(outcome.map_err(|error| error.context(header.name())));
    }

    fn fail(&self, header: &TaskHeader, reply: Reply, error: TaskError) {
        self.handler.count_failed(&error);
        reply.send(Err(error.context(header.name())));
    }
}
