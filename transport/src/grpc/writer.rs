//! What a server's stream sends: grants, failures and results, one message at a time, bounded by what the client reads.

use std::sync::Arc;
use std::time::Duration;

use outboard_proto::v1::AttendResponse;
use outboard_proto::v1::attend_response::Message;
use outboard_proto::{MAX_CHUNK_BYTES, TaskError};
use tokio::sync::mpsc;
use tonic::Status;

use super::account::Account;
use super::results::OutgoingResult;
use crate::{ByteLease, TaskHandler};

/// What the client's end of the stream reads.
pub(super) type Outbound = mpsc::Sender<Result<AttendResponse, Status>>;

/// A result and the memory that it takes until it has been sent.
#[derive(Debug)]
pub(super) struct FinishedTask {
    pub(super) result: OutgoingResult,
    pub(super) _lease: ByteLease,
}

/// The writing half of a stream.
pub(super) struct Writer {
    pub(super) handler: Arc<dyn TaskHandler>,
    pub(super) account: Arc<Account>,
    /// Greeting and failures, which go between the chunks of a result.
    pub(super) control: mpsc::Receiver<Message>,
    pub(super) results: mpsc::Receiver<FinishedTask>,
    pub(super) outbound: Outbound,
    pub(super) stall_timeout: Duration,
}

/// A result being sent.
struct Current {
    finished: FinishedTask,
    tensor: usize,
    offset: usize,
}

impl Current {
    fn next_chunk(&mut self) -> Option<Message> {
        let OutgoingResult { header, tensors } = &self.finished.result;
        while let Some(outgoing) = tensors.get(self.tensor) {
            if let Some(chunk) = outgoing.chunk(header.task, self.tensor as u64, self.offset) {
                self.offset += MAX_CHUNK_BYTES;
                return Some(Message::Chunk(chunk));
            }
            (self.tensor, self.offset) = (self.tensor + 1, 0);
        }
        None
    }
}

/// Sends until both queues are closed and empty.
///
/// # Errors
/// When the client reads nothing for the stall timeout. A client that has gone is no error.
pub(super) async fn write(mut writer: Writer) -> Result<(), TaskError> {
    let mut current: Option<Current> = None;
    let (mut control_open, mut results_open) = (true, true);
    while control_open || results_open || current.is_some() {
        let message = tokio::select! {
            biased;
            message = writer.control.recv(), if control_open => match message {
                Some(message) => message,
                None => {
                    control_open = false;
                    continue;
                }
            },
            () = writer.account.changed() => match writer.account.take_owed() {
                Some(grant) => Message::Credit(grant),
                None => continue,
            },
            finished = writer.results.recv(), if results_open && current.is_none() => {
                let Some(finished) = finished else {
                    results_open = false;
                    continue;
                };
                let header = finished.result.header.clone();
                current = Some(Current { finished, tensor: 0, offset: 0 });
                Message::Result(header)
            }
            chunk = async { current.as_mut().and_then(Current::next_chunk) }, if current.is_some() => match chunk {
                Some(chunk) => chunk,
                None => {
                    current = None;
                    continue;
                }
            },
        };
        let bytes = match &message {
            Message::Chunk(chunk) => chunk.data.len(),
            _ => 0,
        };
        let send = writer.outbound.send(Ok(AttendResponse { message: Some(message) }));
        match tokio::time::timeout(writer.stall_timeout, send).await {
            Ok(Ok(())) if bytes > 0 => writer.handler.count_bytes(0, bytes as u64),
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Ok(()),
            Err(_) => return Err(TaskError::deadline("reading the stream's results", writer.stall_timeout)),
        }
    }
    Ok(())
}
