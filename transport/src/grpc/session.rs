//! One stream on the server, from greeting to end.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Fuse, FusedFuture};
use outboard_attention::TensorSlice;
use outboard_proto::v1::attend_request::Message;
use outboard_proto::v1::attend_response::Message as Answer;
use outboard_proto::v1::{self, AttendRequest, ClientGreeting, Failure, ServerGreeting, TaskFailure};
use outboard_proto::{ErrorKind, PROTOCOL_VERSION, TaskError, TaskHeader, WireTask, check_protocol_version};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

use super::ServerConfig;
use super::account::Account;
use super::arrivals::{Arrivals, Failed, Fetch, WholeTask, costs};
use super::results::outgoing;
use super::writer::{FinishedTask, Outbound, Writer, write};
use crate::home::{Fetched, deliver};
use crate::parts::Claim;
use crate::sizes::{numerics_ids, refuse};
use crate::sums::{Member, Sums};
use crate::{ArrivedTask, Homes, Origin, Pending, TaskHandler};

/// Most failures that wait to be read; then no more requests are read.
const MAX_FAILURES: usize = 256;
/// Most results that wait to be sent. Each holds its memory meanwhile.
const MAX_RESULTS: usize = 16;

/// How long the last word to a client may take.
const LAST_WORD: Duration = Duration::from_secs(10);

/// What every stream of a server shares.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) handler: Arc<dyn TaskHandler>,
    pub(super) homes: Homes,
    pub(super) config: ServerConfig,
    pub(super) drain: CancellationToken,
}

/// K and V that were fetched, or why not.
type FetchEnd = (Fetch, Result<([TensorSlice; 2], Vec<Claim>), TaskError>);

/// The reading half of a stream.
struct Reader {
    shared: Shared,
    account: Arc<Account>,
    control: mpsc::Sender<Answer>,
    results: mpsc::Sender<FinishedTask>,
    arrivals: Arrivals,
    /// Tasks at the handler, or whose results wait to be sent. Dropping the set cancels them.
    tasks: JoinSet<u64>,
    running: HashMap<u64, AbortHandle>,
    sums: Sums,
    /// Keys on their way from their homes; nothing comes of fetches that were given up.
    fetches: JoinSet<Option<FetchEnd>>,
    granting: Fuse<BoxFuture<'static, Result<(), TaskError>>>,
}

/// Serves one stream until either side ends it.
pub(super) async fn attend(shared: Shared, mut inbound: Streaming<AttendRequest>, outbound: Outbound) {
    let error = match serve(shared, &mut inbound, &outbound).await {
        Ok(()) => return,
        Err(error) => error,
    };
    tracing::warn!(%error, "a stream ended early");
    // When even this cannot be sent, the client has gone.
    let _ = outbound.send_timeout(Err(Status::from(error)), LAST_WORD).await;
}

async fn serve(
    shared: Shared,
    inbound: &mut Streaming<AttendRequest>,
    outbound: &Outbound,
) -> Result<(), TaskError> {
    let stall_timeout = shared.config.stall_timeout;
    let late = |_| TaskError::deadline("the greeting", stall_timeout);
    let first = tokio::time::timeout(stall_timeout, inbound.message()).await.map_err(late)?;
    let greeting = match first.map(|message| message.and_then(|m| m.message)) {
        Ok(Some(Message::Greeting(greeting))) => greeting,
        Ok(Some(_)) => {
            let message =
                "the first message of a stream must be its greeting; send ClientGreeting, then tasks";
            return Err(TaskError::invalid(message));
        }
        Ok(None) | Err(_) => return Ok(()),
    };
    let account = greet(&shared, &greeting)?;
    let (control, control_queue) = mpsc::channel(MAX_FAILURES);
    let (results, results_queue) = mpsc::channel(MAX_RESULTS);
    let writer = Writer {
        handler: Arc::clone(&shared.handler),
        account: Arc::clone(&account),
        control: control_queue,
        results: results_queue,
        outbound: outbound.clone(),
        stall_timeout,
    };
    let answer = ServerGreeting {
        protocol_version: PROTOCOL_VERSION,
        numerics_ids: numerics_ids(&*shared.handler),
        memory_bytes: shared.handler.budget().largest(),
        credit_bytes: account.standing(),
    };
    // The queue is empty and its reader is there, so this cannot fail.
    let _ = control.try_send(Answer::Greeting(answer));
    let reader = Reader {
        arrivals: Arrivals::new(shared.config.max_tasks),
        shared,
        account,
        control,
        results,
        tasks: JoinSet::new(),
        running: HashMap::new(),
        sums: Sums::default(),
        fetches: JoinSet::new(),
        granting: Fuse::terminated(),
    };
    let writing = write(writer);
    tokio::pin!(writing);
    // The writer ends first only when the client stands still. One that has died silently may look like one that has
    // no more to send: only the way out says for sure that nobody listens.
    tokio::select! {
        read = reader.read(inbound) => read?,
        written = &mut writing => return written,
        () = outbound.closed() => return Ok(()),
    }
    writing.await
}

fn greet(shared: &Shared, greeting: &ClientGreeting) -> Result<Arc<Account>, TaskError> {
    let ClientGreeting { protocol_version, job, rank, session, streams } = greeting;
    check_protocol_version(*protocol_version)?;
    let budget = shared.handler.budget();
    let window = shared.config.window_bytes.min(budget.limit() / 8);
    let account = Account::open(budget, window / u64::from((*streams).max(1)));
    let credit = account.standing();
    tracing::debug!(job, rank, session, credit, "a stream opened");
    Ok(account)
}

impl Reader {
    async fn read(mut self, inbound: &mut Streaming<AttendRequest>) -> Result<(), TaskError> {
        let mut reading = true;
        // Whether the client was told to send no more, and since when the stream has had no tasks, or the client has known.
        let (mut drained, mut idle_since) = (false, Instant::now());
        let ServerConfig { stall_timeout, linger, .. } = self.shared.config;
        let mut heard = Instant::now();
        loop {
            let idle = self.arrivals.is_empty() && self.running.is_empty() && self.tasks.is_empty();
            if idle && !reading {
                return Ok(());
            }
            if !idle {
                idle_since = Instant::now();
            }
            tokio::select! {
                message = inbound.message(), if reading => {
                    heard = Instant::now();
                    match message {
                        Ok(Some(AttendRequest { message })) => self.take(message).await?,
                        Ok(None) => {
                            reading = false;
                            self.give_up_arriving().await?;
                        }
                        Err(status) if matches!(status.code(), Code::OutOfRange | Code::Internal) => {
                            return Err(TaskError::invalid(format!("a message cannot be read: {}", status.message())));
                        }
                        // The connection is gone, and with it whoever could be told.
                        Err(_) => return Ok(()),
                    }
                }
                Some(ended) = self.tasks.join_next() => self.ended(ended),
                Some(fetched) = self.fetches.join_next() => {
                    heard = Instant::now();
                    self.fetched(fetched).await?;
                }
                granted = &mut self.granting, if !self.granting.is_terminated() => granted?,
                () = self.shared.drain.cancelled(), if !drained => {
                    drained = true;
                    // The client has not heard of it: what it sends until then is refused, not cut off.
                    idle_since = Instant::now();
                    // The queue is gone only when the client is.
                    let _ = self.control.send(Answer::Drain(v1::Drain {})).await;
                }
                () = sleep_until(idle_since + linger), if idle && drained => return Ok(()),
                () = sleep_until(heard + stall_timeout), if reading && !self.arrivals.is_empty() && self.fetches.is_empty() => {
                    return Err(TaskError::deadline("sending the tensors of the stream's tasks", stall_timeout));
                }
            }
        }
    }

    async fn take(&mut self, message: Option<Message>) -> Result<(), TaskError> {
        match message {
            Some(Message::Task(header)) => self.take_header(header).await,
            Some(Message::Chunk(chunk)) => {
                self.shared.handler.count_bytes(chunk.data.len() as u64, 0);
                match self.arrivals.chunk(&chunk) {
                    Ok(whole) => whole.into_iter().for_each(|task| self.submit(task)),
                    Err(failed) => {
                        for failed in failed {
                            self.fail(failed).await?;
                        }
                    }
                }
                Ok(())
            }
            Some(Message::Cancel(v1::CancelTask { task })) => {
                self.forget(task);
                Ok(())
            }
            Some(Message::Credit(v1::CreditRequest { bytes })) => {
                if !self.granting.is_terminated() {
                    return Err(TaskError::invalid(format!(
                        "{bytes} bytes of credit are asked for while another request waits; await its grant first"
                    )));
                }
                self.granting = Arc::clone(&self.account).grant(bytes).boxed().fuse();
                Ok(())
            }
            Some(Message::CreditReturn(v1::CreditReturn { bytes })) => {
                self.account.give_back(bytes);
                Ok(())
            }
            Some(Message::Greeting(_)) => Err(TaskError::invalid("a second greeting; a stream has one")),
            None => Err(TaskError::invalid(
                "a message of no known kind; run one version of Outboard on both sides",
            )),
        }
    }

    async fn take_header(&mut self, wire: v1::TaskHeader) -> Result<(), TaskError> {
        let id = wire.task;
        let carried: Vec<u64> = wire.tensors.iter().filter(|t| t.carried).map(|t| t.id).collect();
        let announced = self.announce(wire);
        match announced {
            Ok(whole) => {
                whole.into_iter().for_each(|task| self.submit(task));
                Ok(())
            }
            Err(error) => {
                carried.into_iter().for_each(|tensor| self.arrivals.discard(tensor));
                self.fail((id, error)).await
            }
        }
    }

    fn fetch(&mut self, fetch: Fetch) {
        let (homes, handler) = (self.shared.homes.clone(), Arc::clone(&self.shared.handler));
        self.fetches.spawn(async move {
            let fetched = tokio::select! {
                biased;
                () = fetch.given_up.cancelled() => return None,
                fetched = homes.fetch(&fetch.header, fetch.tokens) => fetched,
            };
            let slices = fetched.map(|Fetched { k, v, received, claims }| {
                handler.count_bytes(received, 0);
                ([k, v], claims)
            });
            Some((fetch, slices))
        });
    }

    async fn fetched(&mut self, fetched: Result<Option<FetchEnd>, JoinError>) -> Result<(), TaskError> {
        let fetched =
            fetched.map_err(|error| TaskError::internal(format!("fetching keys failed: {error}")))?;
        let Some((fetch, slices)) = fetched else { return Ok(()) };
        match self.arrivals.fetched(&fetch, slices) {
            Ok(whole) => whole.into_iter().for_each(|task| self.submit(task)),
            Err(failed) => {
                for failed in failed {
                    self.fail(failed).await?;
                }
            }
        }
        Ok(())
    }

    fn announce(&mut self, wire: v1::TaskHeader) -> Result<Option<WholeTask>, TaskError> {
        let id = wire.task;
        // The client may know of their ends already.
        while let Some(ended) = self.tasks.try_join_next() {
            self.ended(ended);
        }
        if self.arrivals.holds(id) || self.running.contains_key(&id) {
            let message = format!(
                "task id {id} is taken by a task of the stream that has not ended; both are given up"
            );
            return Err(TaskError::invalid(message));
        }
        let task = WireTask::try_from(wire)?;
        let name = task.header.name();
        let named = |error: TaskError| error.context(&name);
        // First of all, so that a task that is refused fails its sum.
        let member = self.sums.member(&task.header, self.shared.config.max_tasks).map_err(named)?;
        self.arrivals.check(&task).map_err(named)?;
        let leases = self.account.spend(&costs(&task)).map_err(named)?;
        let room = self.arrivals.check_room(self.running.len());
        let given = room.and_then(|()| self.arrivals.check_given(&task));
        let refused = given.and_then(|()| refuse(&*self.shared.handler, &task.header));
        // Even a refused task spends its credit, which comes back to the client, and its tensors are taken in where later
        // tasks may name them.
        let (fetch, whole) = self.arrivals.announce(task, leases, member);
        fetch.into_iter().for_each(|fetch| self.fetch(fetch));
        if let Err(error) = refused {
            self.arrivals.cancel(id);
            return Err(named(error));
        }
        Ok(whole)
    }

    fn submit(&mut self, task: WholeTask) {
        let WholeTask { id, header, inputs, lease, results, member } = task;
        let (reply, pending) = Pending::new();
        let sending = Sending {
            id,
            header: header.clone(),
            lease: results,
            member,
            homes: self.shared.homes.clone(),
            handler: Arc::clone(&self.shared.handler),
            control: self.control.clone(),
            results: self.results.clone(),
        };
        let forward = forward(sending, pending);
        self.running.insert(id, self.tasks.spawn(forward));
        self.shared.handler.submit(ArrivedTask { header, inputs, origin: Origin::Remote, lease, reply });
    }

    /// Notes that a task has left the handler, and its result the stream.
    fn ended(&mut self, ended: Result<u64, JoinError>) {
        // A cancelled task has left `running` already.
        if let Ok(id) = ended {
            self.running.remove(&id);
        }
    }

    /// Ends a task with an error. A task that the stream does not know ends at the client only.
    async fn fail(&mut self, (id, error): Failed) -> Result<(), TaskError> {
        self.forget(id);
        self.shared.handler.count_failed(&error);
        send_failure(&self.control, id, &error).await;
        Ok(())
    }

    fn forget(&mut self, id: u64) {
        if !self.arrivals.cancel(id)
            && let Some(task) = self.running.remove(&id)
        {
            task.abort();
        }
    }

    /// Gives up the tasks whose client ended the stream half-way. Those that wait for their homes alone go on.
    async fn give_up_arriving(&mut self) -> Result<(), TaskError> {
        self.sums.end();
        for (id, header) in self.arrivals.end() {
            let error = TaskError::new(
                ErrorKind::Corrupt,
                "the stream ended before all tensors of the task had come",
            );
            self.fail((id, error.context(header.name()))).await?;
        }
        Ok(())
    }
}

/// What passing a task's result on takes.
struct Sending {
    id: u64,
    header: TaskHeader,
    lease: crate::ByteLease,
    member: Option<Member>,
    homes: Homes,
    handler: Arc<dyn TaskHandler>,
    control: mpsc::Sender<Answer>,
    results: mpsc::Sender<FinishedTask>,
}

/// Awaits a task's end at the handler and passes it on. Dropping this cancels the task.
async fn forward(sending: Sending, pending: Pending) -> u64 {
    let Sending { id, header, lease, member, homes, handler, control, results } = sending;
    let finish = async {
        let outcome = deliver(&homes, &*handler, &header, member, pending.await?).await?;
        outgoing(id, &header, outcome)
    };
    match finish.await {
        // The queues are gone only when the client is.
        Ok(result) => drop(results.send(FinishedTask { result, _lease: lease }).await),
        Err(error) => send_failure(&control, id, &error.context(header.name())).await,
    }
    id
}

async fn send_failure(control: &mpsc::Sender<Answer>, task: u64, error: &TaskError) {
    let failure = Answer::Failure(TaskFailure { task, failure: Some(Failure::from(error)) });
    // The queue is gone only when the client is.
    let _ = control.send(failure).await;
}
