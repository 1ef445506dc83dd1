//! An open stream of a client: tasks and tensors out, results in, credit between.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use outboard_proto::v1::attend_request::Message;
use outboard_proto::v1::attend_response::Message as Answer;
use outboard_proto::v1::{self, AttendRequest, AttendResponse, ServerGreeting};
use outboard_proto::{ErrorKind, MAX_CHUNK_BYTES, TaskError, TaskHeader, WireTask};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until};
use tonic::Streaming;

use super::elements::Outgoing;
use super::link::{Link, Opened, Shared, Shipped, closed, ended};
use super::parcel::{Parcel, SharedTensor, bytes_of, pack};
use super::results::IncomingResult;
use crate::Reply;
use crate::budget::too_large;
use crate::sums::{counted, sum_of};

/// How long a server that reads no more may take to say why.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What the two halves of a stream share.
pub(super) struct Connection {
    shared: Arc<Shared>,
    cancelled: Arc<Notify>,
    /// Rung when credit has come or a task has ended.
    changed: Notify,
    memory_bytes: u64,
    standing: u64,
    state: Mutex<State>,
}

struct State {
    credit: u64,
    /// True once the server takes no more tasks.
    draining: bool,
    /// True from a request for credit to the grant that answers it.
    asking: bool,
    /// Of the shipment at hand, not sent yet.
    waiting: Vec<Shipped>,
    /// Announced to the server, not ended yet.
    live: HashMap<u64, Live>,
    next_task: u64,
    next_tensor: u64,
}

struct Live {
    reply: Reply,
    header: TaskHeader,
    result: Option<IncomingResult>,
}

/// What to send of a parcel.
struct Packed {
    headers: Vec<v1::TaskHeader>,
    /// In order of sending: the carrier's id, the tensor's id, the tensor, and the ids of its users.
    tensors: Vec<(u64, u64, Outgoing, Vec<u64>)>,
}

/// The stream takes no more messages.
struct Deaf;

impl Connection {
    /// A stream just opened, with the shipment it was opened for.
    pub(super) fn new(link: &Link, greeting: &ServerGreeting, first: Vec<Shipped>) -> Connection {
        let credit = greeting.credit_bytes;
        let live = HashMap::new();
        let state = State {
            credit,
            asking: false,
            draining: false,
            waiting: first,
            live,
            next_task: 0,
            next_tensor: 0,
        };
        Connection {
            shared: Arc::clone(&link.shared),
            cancelled: Arc::clone(&link.cancelled),
            changed: Notify::new(),
            memory_bytes: greeting.memory_bytes,
            standing: credit,
            state: Mutex::new(state),
        }
    }

    /// Ships what is queued until the stream ends. Every task has ended then; the error is why, if it matters to those
    /// that are queued still.
    pub(super) async fn run(
        self,
        queue: &mut mpsc::Receiver<Vec<Shipped>>,
        opened: Opened,
    ) -> Option<TaskError> {
        let Opened { outbound, mut inbound, .. } = opened;
        let result = tokio::select! {
            result = self.receive(&mut inbound) => result,
            sent = self.send(queue, &outbound) => match sent {
                Ok(()) => Ok(()),
                Err(Deaf) => {
                    let last_words = tokio::time::timeout(LAST_WORDS, self.receive(&mut inbound));
                    last_words.await.unwrap_or_else(|_| Err(closed(&self.shared.config.address)))
                }
            },
        };
        let mut state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        let idle = state.live.is_empty() && state.waiting.is_empty();
        let error = match result {
            Ok(()) if idle => return None,
            Ok(()) => closed(&self.shared.config.address),
            Err(error) => error,
        };
        for (_, live) in state.live.drain() {
            live.reply.send(Err(error.clone().context(live.header.name())));
        }
        state.waiting.into_iter().for_each(|task| task.fail(&error));
        // A stream lost while idle is opened anew by the next shipment.
        (!idle).then_some(error)
    }

    async fn receive(&self, inbound: &mut Streaming<AttendResponse>) -> Result<(), TaskError> {
        let address = &self.shared.config.address;
        while let Some(answer) = inbound.message().await.map_err(|status| ended(address, &status))? {
            self.take(answer.message);
        }
        Ok(())
    }

    fn take(&self, answer: Option<Answer>) {
        let mut state = self.state();
        match answer {
            Some(Answer::Credit(grant)) => {
                state.credit = state.credit.saturating_add(grant.bytes);
                state.asking &= !grant.answers_request;
                drop(state);
                self.changed.notify_one();
            }
            Some(Answer::Drain(_)) => {
                state.draining = true;
                drop(state);
                self.changed.notify_one();
            }
            Some(Answer::Result(result)) => {
                let id = result.task;
                let Some(live) = state.live.get_mut(&id) else { return };
                match IncomingResult::new(&live.header, result) {
                    Ok(result) => live.result = Some(result),
                    Err(error) => self.end(state, id, Err(error)),
                }
            }
            Some(Answer::Chunk(chunk)) => {
                Shared::count(&self.shared.received, chunk.data.len());
                let id = chunk.task;
                // Results of tasks that were given up may still be on their way.
                let Some(live) = state.live.get_mut(&id) else { return };
                let taken = match &mut live.result {
                    Some(result) => result.chunk(&chunk),
                    None => {
                        Err(TaskError::new(ErrorKind::Corrupt, "the server sent a result without its header"))
                    }
                };
                match taken {
                    Ok(false) => {}
                    Ok(true) => self.end(state, id, Ok(())),
                    Err(error) => self.end(state, id, Err(error)),
                }
            }
            Some(Answer::Failure(v1::TaskFailure { task, failure })) => {
                let unknown = || TaskError::internal("the server gave no reason");
                let error = failure.map_or_else(unknown, TaskError::from);
                self.end(state, task, Err(error));
            }
            // Neither a second greeting nor an unknown message concerns any task.
            Some(Answer::Greeting(_)) | None => {}
        }
    }

    /// Ends a task: with its whole result, or with an error.
    fn end(&self, mut state: MutexGuard<'_, State>, id: u64, how: Result<(), TaskError>) {
        let Some(live) = state.live.remove(&id) else { return };
        drop(state);
        let address = &self.shared.config.address;
        let missing = || TaskError::internal("the result is missing");
        let outcome = how.and_then(|()| live.result.map(IncomingResult::into_outcome).ok_or_else(missing));
        live.reply.send(outcome.map_err(|error| error.context(format_args!("attention server {address}"))));
        self.changed.notify_one();
    }

    /// Sends shipment after shipment until the transport is dropped or the server drains, then waits for the last task.
    async fn send(
        &self,
        queue: &mut mpsc::Receiver<Vec<Shipped>>,
        outbound: &mpsc::Sender<AttendRequest>,
    ) -> Result<(), Deaf> {
        let mut open = true;
        loop {
            while let Some(packed) = self.next_parcel(outbound).await? {
                self.send_parcel(packed, outbound).await?;
            }
            self.return_excess(outbound).await?;
            {
                let state = self.state();
                if (!open || state.draining) && state.live.is_empty() {
                    return Ok(());
                }
            }
            tokio::select! {
                shipment = queue.recv(), if open => match shipment {
                    Some(shipment) => self.state().waiting = shipment,
                    None => open = false,
                },
                () = self.cancelled.notified() => self.sweep(outbound).await?,
                () = self.changed.notified() => {}
            }
        }
    }

    /// The next tasks of the shipment at hand, once there is credit for them; `None` at its end.
    async fn next_parcel(&self, outbound: &mpsc::Sender<AttendRequest>) -> Result<Option<Packed>, Deaf> {
        let mut give_up = None;
        while let Some(parcel) = self.pack_waiting() {
            // The parcel stays as it is until a task is cancelled or the server drains.
            let pack_anew = loop {
                let request = {
                    let mut state = self.state();
                    if state.draining {
                        break true;
                    }
                    if parcel.bytes <= state.credit {
                        state.credit -= parcel.bytes;
                        return Ok(Some(state.announce(parcel)));
                    }
                    let asked = std::mem::replace(&mut state.asking, true);
                    // What was granted for a smaller parcel goes back first: whoever held it while waiting for more could
                    // wait for a client that does the same.
                    (!asked).then(|| {
                        let excess = state.take_excess(self.standing);
                        (excess, parcel.bytes - state.credit)
                    })
                };
                if let Some((excess, bytes)) = request {
                    give_back(outbound, excess).await?;
                    post(outbound, Message::Credit(v1::CreditRequest { bytes })).await?;
                }
                let limit = self.shared.config.credit_timeout;
                let give_up = *give_up.get_or_insert_with(|| Instant::now() + limit);
                tokio::select! {
                    () = self.changed.notified() => {}
                    () = self.cancelled.notified() => break true,
                    () = sleep_until(give_up) => break false,
                }
            };
            if pack_anew {
                self.sweep(outbound).await?;
            } else {
                self.give_up_waiting(parcel.bytes);
            }
        }
        Ok(None)
    }

    fn pack_waiting(&self) -> Option<Parcel> {
        let mut state = self.state();
        state.waiting.retain(|task| !task.reply.is_cancelled());
        if state.draining {
            let error = closed(&self.shared.config.address);
            state.waiting.drain(..).for_each(|task| task.fail(&error));
        }
        while !state.waiting.is_empty() {
            let requests: Vec<_> = state.waiting.iter().map(|task| &task.request).collect();
            let error = match pack(&requests, self.memory_bytes) {
                Ok(Some(parcel)) => return Some(parcel),
                Ok(None) => too_large(bytes_of(&requests[..1]), self.memory_bytes),
                Err(error) => error,
            };
            let error = error.context(format_args!("attention server {}", self.shared.config.address));
            state.waiting.remove(0).fail(&error);
        }
        None
    }

    fn give_up_waiting(&self, bytes: u64) {
        let limit = self.shared.config.credit_timeout.as_secs_f64();
        let address = &self.shared.config.address;
        let message =
            format!("the attention server at {address} had no room for {bytes} bytes within {limit:.1} s");
        let error = TaskError::new(ErrorKind::Busy, message);
        let waiting = std::mem::take(&mut self.state().waiting);
        waiting.into_iter().for_each(|task| task.fail(&error));
    }

    async fn send_parcel(&self, packed: Packed, outbound: &mpsc::Sender<AttendRequest>) -> Result<(), Deaf> {
        // All headers first: then the server knows every reader of a tensor before its first chunk.
        for header in packed.headers {
            post(outbound, Message::Task(header)).await?;
        }
        for (carrier, id, tensor, users) in packed.tensors {
            let mut offset = 0;
            while let Some(chunk) = tensor.chunk(carrier, id, offset) {
                if self.cancelled.notified().now_or_never().is_some() {
                    self.sweep(outbound).await?;
                }
                let wanted = {
                    let state = self.state();
                    users.iter().any(|user| state.live.contains_key(user))
                };
                if !wanted {
                    break;
                }
                let bytes = chunk.data.len();
                post(outbound, Message::Chunk(chunk)).await?;
                Shared::count(&self.shared.sent, bytes);
                offset += MAX_CHUNK_BYTES;
            }
        }
        Ok(())
    }

    /// Tells the server of the tasks that were given up here.
    async fn sweep(&self, outbound: &mpsc::Sender<AttendRequest>) -> Result<(), Deaf> {
        let given_up: Vec<u64> = {
            let mut state = self.state();
            state.live.extract_if(|_, live| live.reply.is_cancelled()).map(|(id, _)| id).collect()
        };
        for task in given_up {
            post(outbound, Message::Cancel(v1::CancelTask { task })).await?;
        }
        Ok(())
    }

    /// Gives credit back that was granted for a shipment which then was not sent.
    async fn return_excess(&self, outbound: &mpsc::Sender<AttendRequest>) -> Result<(), Deaf> {
        let excess = self.state().take_excess(self.standing);
        give_back(outbound, excess).await
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes out what is held beyond the standing credit.
    fn take_excess(&mut self, standing: u64) -> u64 {
        let excess = self.credit.saturating_sub(standing);
        self.credit -= excess;
        excess
    }

    /// Moves the parcel's tasks from the waiting to the live.
    fn announce(&mut self, parcel: Parcel) -> Packed {
        let (first_task, first_tensor) = (self.next_task, self.next_tensor);
        let count = parcel.tasks.min(self.waiting.len());
        self.next_task += count as u64;
        self.next_tensor += parcel.tensors.len() as u64;
        let mut headers = Vec::with_capacity(count);
        let together = counted(self.waiting.iter().take(count).map(|shipped| &shipped.request.header));
        for (n, (shipped, mut tensors)) in self.waiting.drain(..count).zip(parcel.references).enumerate() {
            let id = first_task + n as u64;
            let Shipped { request, deadline, reply } = shipped;
            let mut header = request.header;
            // A group that is not sent as a whole has no sum.
            if sum_of(&header).is_none_or(|key| together.get(&key) != Some(&header.group_tasks)) {
                header.group_tasks = 0;
            }
            header.deadline = deadline.map(|deadline| deadline.at.saturating_duration_since(Instant::now()));
            tensors.iter_mut().for_each(|tensor| tensor.id += first_tensor);
            let wire = WireTask { id, header, tensors };
            headers.push((&wire).into());
            self.live.insert(id, Live { reply, header: wire.header, result: None });
        }
        let mut tensors: Vec<_> = parcel.tensors.into_iter().enumerate().collect();
        // A task's tensors together, so that the first task can start first.
        tensors.sort_by_key(|(_, tensor)| tensor.users.first().copied());
        let outgoing = |(n, tensor): (usize, SharedTensor)| {
            let users: Vec<u64> = tensor.users.iter().map(|&user| first_task + user as u64).collect();
            let carrier = users.first().copied().unwrap_or_default();
            Some((carrier, first_tensor + n as u64, Outgoing::new(tensor.slice?), users))
        };
        Packed { headers, tensors: tensors.into_iter().filter_map(outgoing).collect() }
    }
}

async fn give_back(outbound: &mpsc::Sender<AttendRequest>, bytes: u64) -> Result<(), Deaf> {
    match bytes {
        0 => Ok(()),
        bytes => post(outbound, Message::CreditReturn(v1::CreditReturn { bytes })).await,
    }
}

async fn post(outbound: &mpsc::Sender<AttendRequest>, message: Message) -> Result<(), Deaf> {
    outbound.send(AttendRequest { message: Some(message) }).await.map_err(|_| Deaf)
}
