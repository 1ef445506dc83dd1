//! Whole tasks that wait for the executor. Bounded in bytes, since every task holds a lease on the server's memory.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outboard_proto::{ErrorKind, TaskError};
use outboard_transport::{ArrivedTask, Origin};

use crate::batch::{Ready, next_batch};

/// How long the tasks of this process give way to those from elsewhere.
const LOCAL_PATIENCE: Duration = Duration::from_secs(10);

/// A task and when it became whole.
#[derive(Debug)]
pub(crate) struct QueuedTask {
    pub(crate) task: ArrivedTask,
    pub(crate) arrived: Instant,
    pub(crate) flops: f64,
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<QueuedTask>,
    /// Taken by the executor and not yet ended.
    running: usize,
    closed: bool,
}

/// The queue between transports and the executor.
#[derive(Debug, Default)]
pub(crate) struct TaskQueue {
    state: Mutex<State>,
    changed: Condvar,
}

impl TaskQueue {
    /// Adds a task; ends it at once when the queue is closed.
    pub(crate) fn push(&self, task: ArrivedTask) {
        let flops = task.header.task.flops(&task.header.geometry, task.header.direction);
        let mut state = self.lock();
        if state.closed {
            drop(state);
            task.reply
                .send(Err(TaskError::unavailable("the server has shut down; send the task to another")));
            return;
        }
        state.ready.push_back(QueuedTask { task, arrived: Instant::now(), flops });
        drop(state);
        self.changed.notify_all();
    }

    /// Waits for tasks and takes the next batch of at most `max_flops`; `None` when the queue was closed and is empty.
    /// Tasks that were cancelled, or are past their deadline, are ended and handed to `dropped` instead.
    pub(crate) fn next_batch(&self, max_flops: f64, dropped: impl Fn(&TaskError)) -> Option<Vec<QueuedTask>> {
        let mut state = self.lock();
        loop {
            let batch;
            (state, batch) = self.take(state, max_flops, &dropped);
            if batch.is_some() || state.closed {
                return batch;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// As [`TaskQueue::next_batch`], but waits no longer than `patience` for tasks.
    pub(crate) fn try_next_batch(
        &self,
        max_flops: f64,
        patience: Duration,
        dropped: impl Fn(&TaskError),
    ) -> Option<Vec<QueuedTask>> {
        let (state, batch) = self.take(self.lock(), max_flops, &dropped);
        if batch.is_some() {
            return batch;
        }
        let (state, _) = self.changed.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner);
        self.take(state, max_flops, &dropped).1
    }

    /// Takes the next batch, if a task is ready.
    fn take<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        max_flops: f64,
        dropped: &impl Fn(&TaskError),
    ) -> (MutexGuard<'a, State>, Option<Vec<QueuedTask>>) {
        loop {
            let hopeless = state.take_hopeless(Instant::now());
            if hopeless.is_empty() {
                break;
            }
            // Replies wake other threads; they are sent outside the lock.
            drop(state);
            for (task, error) in hopeless {
                dropped(&error);
                task.task.reply.send(Err(error));
            }
            state = self.lock();
        }
        let ready: Vec<Ready> =
            state.ready.iter().map(|t| Ready { urgent: t.is_urgent(), flops: t.flops }).collect();
        let chosen = next_batch(&ready, max_flops);
        if chosen.is_empty() {
            return (state, None);
        }
        let mut batch: Vec<_> = chosen.iter().rev().filter_map(|&i| state.ready.remove(i)).collect();
        batch.reverse();
        state.running += batch.len();
        (state, Some(batch))
    }

    /// Tells the queue that `tasks` of those taken have ended.
    pub(crate) fn ended(&self, tasks: usize) {
        self.lock().running -= tasks;
    }

    /// Tasks waiting or running.
    pub(crate) fn len(&self) -> usize {
        let state = self.lock();
        state.ready.len() + state.running
    }

    /// Takes no more tasks. Those in hand are still computed.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held, and every state in between is sound.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes out the tasks that nobody waits for any more, with the reason.
    fn take_hopeless(&mut self, now: Instant) -> Vec<(QueuedTask, TaskError)> {
        let mut hopeless = Vec::new();
        let mut i = 0;
        while let Some(queued) = self.ready.get(i) {
            match queued.hopeless(now) {
                None => i += 1,
                Some(error) => hopeless.extend(self.ready.remove(i).map(|task| (task, error))),
            }
        }
        hopeless
    }
}

impl QueuedTask {
    fn is_urgent(&self) -> bool {
        self.task.origin == Origin::Remote || self.arrived.elapsed() > LOCAL_PATIENCE
    }

    fn hopeless(&self, now: Instant) -> Option<TaskError> {
        let header = &self.task.header;
        if self.task.reply.is_cancelled() {
            return Some(TaskError::new(ErrorKind::Cancelled, format!("{} was cancelled", header.name())));
        }
        let limit: Duration = header.deadline?;
        (now.duration_since(self.arrived) > limit).then(|| TaskError::deadline(&header.name(), limit))
    }
}
