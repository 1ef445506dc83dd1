//! Tasks for the attention server in this process: tensors go by pointer.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use outboard_attention::TensorSlice;
use outboard_proto::{ErrorKind, TaskError, TaskHeader};
use tokio::runtime::Handle;
use tokio::sync::{OnceCell, Semaphore};

use crate::guard::{Deadline, guard};
use crate::home::{Fetched, deliver};
use crate::sizes::{check, fetched_bytes, numerics_ids, refuse, result_bytes};
use crate::{
    ArrivedTask, ByteLease, GradientInputs, Homes, Keys, Origin, Pending, Reply, TaskHandler, TaskInputs,
    TaskRequest, Traffic, Transport,
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
        for request in shipment {
            if let Err(error) = check(&request) {
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
            // What tasks share is let go with the last of them, whoever still holds their requests.
            let mut shared: HashMap<usize, Arc<FetchedKeys>> = HashMap::new();
            for (request, reply) in tasks {
                let keys = match &request.keys {
                    Keys::AtHomes(share) => Some(Arc::clone(shared.entry(share.identity()).or_default())),
                    Keys::Here { .. } => None,
                };
                server.submit(request, keys, reply).await;
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

/// K and V that tasks of a shipment share, once they are fetched.
#[derive(Debug, Default)]
struct FetchedKeys {
    cell: OnceCell<[TensorSlice; 2]>,
    /// Their memory.
    lease: OnceLock<ByteLease>,
}

/// What submitting takes.
#[derive(Clone)]
struct Server {
    handler: Arc<dyn TaskHandler>,
    homes: Homes,
}

impl Server {
    /// Waits for room for all memory that the task takes here, its results and the keys that it is the first to fetch, and
    /// submits it. One task after another: whoever waits for room waits for tasks that have theirs.
    async fn submit(&self, request: TaskRequest, fetched: Option<Arc<FetchedKeys>>, mut reply: Reply) {
        let TaskRequest { header, q, keys, gradient } = request;
        if let Err(error) = refuse(&*self.handler, &header) {
            return self.fail(&header, reply, error);
        }
        let first = fetched.as_ref().is_some_and(|keys| keys.lease.get().is_none());
        let of_keys = if first { fetched_bytes(&header) } else { 0 };
        let lease = tokio::select! {
            biased;
            lease = self.handler.budget().lease(result_bytes(&header).saturating_add(of_keys)) => lease,
            () = reply.cancelled() => return,
        };
        let lease = match lease {
            Ok(lease) => lease,
            Err(error) => return self.fail(&header, reply, error),
        };
        match (keys, fetched) {
            (Keys::AtHomes(_), Some(keys)) => {
                // The keys' memory is counted for as long as any of their tasks holds them.
                let _ = keys.lease.set(lease.clone());
                let server = self.clone();
                tokio::spawn(async move {
                    server.submit_fetched(header, (q, gradient), keys, lease, reply).await
                });
            }
            (Keys::Here { k, v }, _) => {
                let inputs = TaskInputs { q, k, v, gradient };
                self.handler.submit(ArrivedTask { header, inputs, origin: Origin::InPlace, lease, reply });
            }
            (Keys::AtHomes(_), None) => {
                self.fail(&header, reply, TaskError::internal("nothing to fetch the task's keys into"));
            }
        }
    }

    /// Submits a task whose memory has been counted, once its keys are there; delivers their gradients.
    async fn submit_fetched(
        &self,
        header: TaskHeader,
        (q, gradient): (TensorSlice, Option<GradientInputs>),
        keys: Arc<FetchedKeys>,
        lease: ByteLease,
        mut reply: Reply,
    ) {
        let fetch = async {
            let tokens = header.fetched_keys().unwrap_or_default();
            let Fetched { k, v, received } = self.homes.fetch(&header, tokens).await?;
            self.handler.count_bytes(received, 0);
            Ok([k, v])
        };
        let fetched = tokio::select! {
            biased;
            fetched = keys.cell.get_or_try_init(|| fetch) => fetched.cloned(),
            () = reply.cancelled() => return,
        };
        let [k, v] = match fetched {
            Ok(slices) => slices,
            Err(error) => return self.fail(&header, reply, error),
        };
        let (inner, pending) = Pending::new();
        let inputs = TaskInputs { q, k, v, gradient };
        let task =
            ArrivedTask { header: header.clone(), inputs, origin: Origin::InPlace, lease, reply: inner };
        self.handler.submit(task);
        let finish = async { deliver(&self.homes, &*self.handler, &header, pending.await?).await };
        let outcome = tokio::select! {
            biased;
            outcome = finish => outcome,
            () = reply.cancelled() => return,
        };
        drop(keys);
        reply.send(outcome.map_err(|error| error.context(header.name())));
    }

    fn fail(&self, header: &TaskHeader, reply: Reply, error: TaskError) {
        self.handler.count_failed(&error);
        reply.send(Err(error.context(header.name())));
    }
}
