//! Stands between a caller and whoever computes its task: a dropped or overdue task ends at once, whatever the other
//! side is busy with.

use std::time::Duration;

use outboard_proto::{TaskError, TaskHeader};
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep_until};

use crate::{Pending, Reply};

/// When a task must be done, and how long that was when it was shipped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    pub(crate) at: Instant,
    pub(crate) limit: Duration,
}

impl Deadline {
    /// The deadline of a task that is shipped now; `None` when it has none, or one beyond the clock's reach.
    pub(crate) fn of(header: &TaskHeader) -> Option<Deadline> {
        let limit = header.deadline?;
        Some(Deadline { at: Instant::now().checked_add(limit)?, limit })
    }

    /// The error of a task that missed it.
    pub(crate) fn missed(self, header: &TaskHeader) -> TaskError {
        TaskError::deadline(&header.name(), self.limit)
    }
}

/// A task's two ends: the caller's, and the one for whoever computes it. When the caller drops its end, or the deadline
/// passes, the inner end reads as cancelled and `on_cancel` runs. `held` is dropped when the task ends.
pub(crate) fn guard<H: Send + 'static>(
    runtime: &Handle,
    header: &TaskHeader,
    deadline: Option<Deadline>,
    held: H,
    on_cancel: impl FnOnce() + Send + 'static,
) -> (Reply, Pending) {
    let (inner_reply, mut inner) = Pending::new();
    let (mut reply, pending) = Pending::new();
    let overdue = deadline.map(|deadline| (deadline.at, deadline.missed(header)));
    runtime.spawn(async move {
        let missed = async {
            match overdue {
                Some((at, error)) => {
                    sleep_until(at).await;
                    error
                }
                None => std::future::pending().await,
            }
        };
        let outcome = tokio::select! {
            biased;
            outcome = &mut inner => Some(outcome),
            () = reply.cancelled() => None,
            error = missed => {
                drop(inner);
                on_cancel();
                drop(held);
                reply.send(Err(error));
                return;
            }
        };
        match outcome {
            Some(outcome) => {
                drop(held);
                reply.send(outcome);
            }
            None => {
                drop(inner);
                on_cancel();
            }
        }
    });
    (inner_reply, pending)
}
