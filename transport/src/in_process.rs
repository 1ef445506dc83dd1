//! Tasks for the attention server in this process: tensors go by pointer.

use std::sync::Arc;

use outboard_proto::{ErrorKind, TaskError};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::guard::{Deadline, guard};
use crate::sizes::{check, numerics_ids, refuse, result_bytes};
use crate::{ArrivedTask, Origin, Pending, Reply, TaskHandler, TaskRequest, Traffic, Transport};

/// Most shipments that may wait for the server's memory at once.
const MAX_WAITING: usize = 4096;

/// A [`Transport`] to a handler in the same process.
#[derive(Clone)]
pub struct InProcess {
    handler: Arc<dyn TaskHandler>,
    runtime: Handle,
    waiting: Arc<Semaphore>,
}

impl InProcess {
    /// Ships to `handler`; waits for its memory on `runtime`.
    pub fn new(handler: Arc<dyn TaskHandler>, runtime: Handle) -> InProcess {
        InProcess { handler, runtime, waiting: Arc::new(Semaphore::new(MAX_WAITING)) }
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
        let handler = Arc::clone(&self.handler);
        self.runtime.spawn(async move {
            for (request, reply) in tasks {
                submit(&*handler, request, reply).await;
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

/// Waits for room for the task's results, the only buffers that it takes here, and submits it.
async fn submit(handler: &dyn TaskHandler, request: TaskRequest, mut reply: Reply) {
    let TaskRequest { header, inputs } = request;
    let fail = |reply: Reply, error: TaskError| {
        handler.count_failed(&error);
        reply.send(Err(error.context(header.name())));
    };
    if let Err(error) = refuse(handler, &header) {
        return fail(reply, error);
    }
    let lease = tokio::select! {
        biased;
        lease = handler.budget().lease(result_bytes(&header)) => lease,
        () = reply.cancelled() => return,
    };
    match lease {
        Ok(lease) => handler.submit(ArrivedTask { header, inputs, origin: Origin::InPlace, lease, reply }),
        Err(error) => fail(reply, error),
    }
}
