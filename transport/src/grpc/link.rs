//! One stream of a client: connects when there is something to ship, and ends every task of a connection that is lost.

use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use outboard_proto::v1::attend_request::Message;
use outboard_proto::v1::attend_response::Message as Answer;
use outboard_proto::v1::attention_service_client::AttentionServiceClient;
use outboard_proto::v1::{AttendRequest, AttendResponse, ClientGreeting, ServerGreeting};
use outboard_proto::{
    ErrorKind, PROTOCOL_VERSION, RetryHint, TaskError, check_protocol_version, describe, failure_of,
};
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

use super::ClientConfig;
use super::config::FRAME_BYTES;
use super::connection::Connection;
use crate::guard::Deadline;
use crate::sizes::numerics_mismatch;
use crate::{Reply, TaskRequest};

/// Messages that wait for the connection, of at most a chunk each.
const MAX_MESSAGES: usize = 4;

/// A task on its way, and how to end it.
#[derive(Debug)]
pub(super) struct Shipped {
    pub(super) request: TaskRequest,
    pub(super) deadline: Option<Deadline>,
    pub(super) reply: Reply,
}

impl Shipped {
    pub(super) fn fail(self, error: &TaskError) {
        self.reply.send(Err(error.clone().context(self.request.header.name())));
    }
}

/// What the streams of one transport share, and what is told outside.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: ClientConfig,
    pub(super) endpoint: Endpoint,
    pub(super) session: String,
    pub(super) sent: AtomicU64,
    pub(super) received: AtomicU64,
    pub(super) numerics_ids: Mutex<Vec<String>>,
}

/// What a stream's task is given.
pub(super) struct Link {
    pub(super) shared: Arc<Shared>,
    pub(super) queue: mpsc::Receiver<Vec<Shipped>>,
    /// Rung when a task was given up by its caller.
    pub(super) cancelled: Arc<Notify>,
}

/// An open stream.
pub(super) struct Opened {
    pub(super) greeting: ServerGreeting,
    pub(super) outbound: mpsc::Sender<AttendRequest>,
    pub(super) inbound: Streaming<AttendResponse>,
}

/// The endpoint of a configuration.
///
/// # Errors
/// [`ErrorKind::Invalid`] when the address is none.
pub(super) fn endpoint(config: &ClientConfig) -> Result<Endpoint, TaskError> {
    let ClientConfig { address, link, .. } = config;
    let bad = |error| {
        TaskError::invalid(format!("{address:?} is no address of a server ({error}); give \"host:port\""))
    };
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(bad)?;
    Ok(endpoint
        .connect_timeout(config.connect_timeout)
        .tcp_nodelay(true)
        .initial_stream_window_size(link.window_bytes)
        .initial_connection_window_size(link.window_bytes)
        .max_frame_size(FRAME_BYTES)
        .http2_keep_alive_interval(link.keep_alive_interval)
        .keep_alive_timeout(link.keep_alive_timeout)
        .keep_alive_while_idle(true))
}

/// A client of the service on a new connection.
///
/// # Errors
/// [`ErrorKind::Unavailable`] or [`ErrorKind::DeadlineExceeded`], naming the address.
pub(super) async fn connect(
    endpoint: &Endpoint,
    address: &str,
    limit: Duration,
) -> Result<AttentionServiceClient<Channel>, TaskError> {
    match tokio::time::timeout(limit, endpoint.connect()).await {
        Ok(Ok(channel)) => Ok(AttentionServiceClient::new(channel)),
        Ok(Err(error)) => {
            let reason = describe(&error);
            let message = format!(
                "cannot connect to the attention server at {address}: {reason}; see that it runs there"
            );
            Err(TaskError::unavailable(message))
        }
        Err(_) => {
            let seconds = limit.as_secs_f64();
            let message = format!(
                "the attention server at {address} did not accept a connection within {seconds:.1} s"
            );
            Err(TaskError::unavailable(message))
        }
    }
}

/// The error that a status ends a stream with. Without a failure of the server's own, the connection was lost.
pub(super) fn ended(address: &str, status: &Status) -> TaskError {
    match failure_of(status) {
        Some(failure) => {
            let mut error = TaskError::from(failure)
                .context(format_args!("the attention server at {address} ended the stream"));
            // The stream's fault need not be the task's.
            if error.retry == RetryHint::Never {
                error.retry = RetryHint::Elsewhere;
            }
            error
        }
        None => {
            // A status says of itself what its cause says better.
            let reason = status.source().map_or_else(|| status.message().to_owned(), describe);
            let message = format!("the connection to the attention server at {address} was lost: {reason}");
            TaskError::unavailable(message)
        }
    }
}

/// Runs a stream until its transport is dropped and its last task has ended.
pub(super) async fn run(mut link: Link) {
    while let Some(first) = link.queue.recv().await {
        let error = match open(&link.shared).await {
            Ok(opened) => Connection::new(&link, &opened.greeting, first).run(&mut link.queue, opened).await,
            Err(error) => {
                first.into_iter().for_each(|task| task.fail(&error));
                Some(error)
            }
        };
        if let Some(error) = error {
            tracing::warn!(%error, "lost an attention server");
            while let Ok(shipment) = link.queue.try_recv() {
                shipment.into_iter().for_each(|task| task.fail(&error));
            }
        }
    }
}

async fn open(shared: &Shared) -> Result<Opened, TaskError> {
    let ClientConfig { address, connect_timeout, job, rank, streams, .. } = &shared.config;
    let mut client = connect(&shared.endpoint, address, *connect_timeout).await?;
    let (outbound, messages) = mpsc::channel(MAX_MESSAGES);
    let greeting = ClientGreeting {
        protocol_version: PROTOCOL_VERSION,
        job: job.clone(),
        rank: *rank,
        session: shared.session.clone(),
        streams: u32::try_from(*streams).unwrap_or(u32::MAX),
    };
    // The queue is empty and its reader is there, so this cannot fail.
    let _ = outbound.try_send(AttendRequest { message: Some(Message::Greeting(greeting)) });
    let greet = async {
        let lost = |status: Status| ended(address, &status);
        let mut inbound = client.attend(ReceiverStream::new(messages)).await.map_err(lost)?.into_inner();
        match inbound.message().await.map_err(lost)?.and_then(|answer| answer.message) {
            Some(Answer::Greeting(greeting)) => Ok((greeting, inbound)),
            _ => Err(TaskError::unavailable(format!(
                "the attention server at {address} did not answer the greeting"
            ))),
        }
    };
    let silent = |_| {
        let message = format!(
            "the attention server at {address} did not answer the greeting within {connect_timeout:?}"
        );
        TaskError::unavailable(message)
    };
    let (greeting, inbound) = tokio::time::timeout(*connect_timeout, greet).await.map_err(silent)??;
    let at = |error: TaskError| error.context(format_args!("the attention server at {address}"));
    check_protocol_version(greeting.protocol_version).map_err(at)?;
    match &shared.config.numerics_id {
        Some(required) if !greeting.numerics_ids.contains(required) => {
            return Err(at(numerics_mismatch(required, &greeting.numerics_ids)));
        }
        _ => {}
    }
    shared.numerics_ids.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&greeting.numerics_ids);
    Ok(Opened { greeting, outbound, inbound })
}

impl Shared {
    pub(super) fn count(counter: &AtomicU64, bytes: usize) {
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// The error of a stream that ended with tasks on it, and no reason.
pub(super) fn closed(address: &str) -> TaskError {
    let message = format!(
        "the attention server at {address} closed the stream before the task was done (it may be draining); send the task to \
         another server"
    );
    TaskError::new(ErrorKind::Unavailable, message)
}
