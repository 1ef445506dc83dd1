//! The client's end: ships to one attention server over one or more streams.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use outboard_proto::v1::{self, GetServerStatsRequest, GetServerStatsResponse};
use outboard_proto::{ErrorKind, TaskError, WireTask};
use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};

use super::ClientConfig;
use super::link::{Link, Shared, Shipped, connect, endpoint, run};
use crate::guard::{Deadline, guard};
use crate::sizes::{Input, check, input_kinds, input_of, task_bytes};
use crate::{Pending, TaskRequest, Traffic, Transport};

/// A [`Transport`] to an attention server elsewhere.
#[derive(Debug)]
pub struct GrpcTransport {
    shared: Arc<Shared>,
    streams: Vec<Stream>,
    runtime: Handle,
    /// A permit for each task under way.
    tasks: Arc<Semaphore>,
}

#[derive(Debug)]
struct Stream {
    queue: mpsc::Sender<Vec<Shipped>>,
    /// Bytes of tasks under way.
    outstanding: Arc<AtomicU64>,
    cancelled: Arc<Notify>,
}

/// What a task under way takes of its transport.
struct UnderWay {
    outstanding: Arc<AtomicU64>,
    bytes: u64,
    _permit: OwnedSemaphorePermit,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.outstanding.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl GrpcTransport {
    /// A transport to the server of `config`, whose streams run on `runtime`. Connects at the first shipment, and again
    /// at the next one after a connection was lost.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when the address is none, or no stream or task is allowed.
    pub fn new(config: ClientConfig, runtime: Handle) -> Result<GrpcTransport, TaskError> {
        for (field, value) in [("streams", config.streams), ("max_tasks", config.max_tasks)] {
            if !(1..=Semaphore::MAX_PERMITS).contains(&value) {
                return Err(TaskError::invalid(format!("{field} is {value}; it must be 1 or more")));
            }
        }
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let (job, rank, process) = (&config.job, config.rank, std::process::id());
        let shared = Arc::new(Shared {
            endpoint: endpoint(&config)?,
            session: format!("{job}/{rank}/{process}/{}", since_1970.as_nanos()),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            numerics_ids: Mutex::default(),
            config,
        });
        let stream = |_| {
            // One place for each task. Shipments whose tasks were given up keep theirs until the stream comes to them.
            let (queue, shipments) = mpsc::channel(shared.config.max_tasks);
            let cancelled = Arc::new(Notify::new());
            let link =
                Link { shared: Arc::clone(&shared), queue: shipments, cancelled: Arc::clone(&cancelled) };
            runtime.spawn(run(link));
            Stream { queue, outstanding: Arc::default(), cancelled }
        };
        let streams = (0..shared.config.streams).map(stream).collect();
        let tasks = Arc::new(Semaphore::new(shared.config.max_tasks));
        Ok(GrpcTransport { shared, streams, runtime, tasks })
    }

    /// Makes the two ends of a task that was checked.
    fn prepare(&self, stream: &Stream, request: TaskRequest) -> Result<(Shipped, Pending), TaskError> {
        let name = || request.header.name();
        // What a server would refuse unread is refused here, before it costs credit.
        let wire = WireTask { id: 0, header: request.header.clone(), tensors: Vec::new() };
        WireTask::try_from(v1::TaskHeader::from(&wire))?;
        let permit = Arc::clone(&self.tasks).try_acquire_owned().map_err(|_| {
            let (address, max) = (&self.shared.config.address, self.shared.config.max_tasks);
            let message =
                format!("{max} tasks are under way to the attention server at {address} already; ship later");
            TaskError::new(ErrorKind::Busy, message).context(name())
        })?;
        let bytes = bytes_of(&request);
        let outstanding = Arc::clone(&stream.outstanding);
        outstanding.fetch_add(bytes, Ordering::Relaxed);
        let held = UnderWay { outstanding, bytes, _permit: permit };
        let deadline = Deadline::of(&request.header);
        let cancelled = Arc::clone(&stream.cancelled);
        let (reply, pending) =
            guard(&self.runtime, &request.header, deadline, held, move || cancelled.notify_one());
        Ok((Shipped { request, deadline, reply }, pending))
    }
}

fn bytes_of(request: &TaskRequest) -> u64 {
    let inputs = input_kinds(request.header.direction).iter().filter_map(|&kind| input_of(request, kind));
    let bytes = |input: Input<'_>| match input {
        Input::Here(slice) => slice.bytes() as u64,
        Input::AtHomes(_) => 0,
    };
    inputs.map(bytes).fold(task_bytes(&request.header), u64::saturating_add)
}

impl Transport for GrpcTransport {
    fn ship(&self, shipment: Vec<TaskRequest>) -> Vec<Pending> {
        let idlest = self.streams.iter().min_by_key(|stream| stream.outstanding.load(Ordering::Relaxed));
        // There is a stream: `new` saw to it.
        let Some(stream) = idlest else { return Vec::new() };
        let mut shipped = Vec::with_capacity(shipment.len());
        let mut pendings = Vec::with_capacity(shipment.len());
        let checked = check(&shipment);
        for (request, checked) in shipment.into_iter().zip(checked) {
            let checked = checked.map_err(|error| error.context(request.header.name()));
            match checked.and_then(|()| self.prepare(stream, request)) {
                Ok((task, pending)) => {
                    shipped.push(task);
                    pendings.push(pending);
                }
                Err(error) => pendings.push(Pending::failed(error)),
            }
        }
        if !shipped.is_empty()
            && let Err(refused) = stream.queue.try_send(shipped)
        {
            let (shipment, error) = match refused {
                mpsc::error::TrySendError::Full(shipment) => {
                    let (address, max) = (&self.shared.config.address, self.shared.config.max_tasks);
                    let message = format!(
                        "{max} shipments wait for a stream to the attention server at {address} already; ship later"
                    );
                    (shipment, TaskError::new(ErrorKind::Busy, message))
                }
                mpsc::error::TrySendError::Closed(shipment) => {
                    (shipment, TaskError::unavailable("the runtime of this transport has shut down"))
                }
            };
            shipment.into_iter().for_each(|task| task.fail(&error));
        }
        pendings
    }

    fn traffic(&self) -> Traffic {
        Traffic {
            sent: self.shared.sent.load(Ordering::Relaxed),
            received: self.shared.received.load(Ordering::Relaxed),
        }
    }

    fn numerics_ids(&self) -> Vec<String> {
        self.shared.numerics_ids.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Asks the attention server at `address` ("host:port") for its counters.
///
/// # Errors
/// [`ErrorKind::Unavailable`] or [`ErrorKind::DeadlineExceeded`] naming the address.
pub async fn server_stats(address: &str, timeout: Duration) -> Result<GetServerStatsResponse, TaskError> {
    let ask = async {
        let config = ClientConfig::new(address);
        let mut client = connect(&endpoint(&config)?, address, config.connect_timeout).await?;
        let answer = client.get_server_stats(GetServerStatsRequest {}).await;
        answer.map(tonic::Response::into_inner).map_err(|status| TaskError::from(status).context(address))
    };
    let late = |_| TaskError::deadline(&format!("asking {address} for its counters"), timeout);
    tokio::time::timeout(timeout, ask).await.map_err(late)?
}
