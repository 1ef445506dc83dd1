//! One error for whatever can befall a task or a call, from any side, and its gRPC status.

use std::time::Duration;

use outboard_attention::InvalidAttention;

/// Whether and where a failed task can be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryHint {
    /// The request itself is at fault: no server will take it.
    Never,
    /// Another server may take it now.
    Elsewhere,
    /// The same server may take it later.
    Later,
}

/// What kind of failure it was. Each kind maps to one gRPC status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request does not hold together (INVALID_ARGUMENT).
    Invalid,
    /// Bytes that do not match their header or checksum (DATA_LOSS).
    Corrupt,
    /// Valid, but not something this server computes (UNIMPLEMENTED).
    Unsupported,
    /// The server's numerics id is not the one required (FAILED_PRECONDITION).
    NumericsMismatch,
    /// Larger than the server can ever hold (OUT_OF_RANGE).
    TooLarge,
    /// No room now (RESOURCE_EXHAUSTED).
    Busy,
    /// The server takes no new work, or is gone (UNAVAILABLE).
    Unavailable,
    /// Not done in time (DEADLINE_EXCEEDED).
    DeadlineExceeded,
    /// Given up by its client (CANCELLED).
    Cancelled,
    /// Named something that does not exist (NOT_FOUND).
    NotFound,
    /// Another rank of the job is lost or at fault (ABORTED).
    Aborted,
    /// A defect (INTERNAL).
    Internal,
}

impl ErrorKind {
    /// The gRPC status code.
    pub fn code(self) -> tonic::Code {
        match self {
            ErrorKind::Invalid => tonic::Code::InvalidArgument,
            ErrorKind::Corrupt => tonic::Code::DataLoss,
            ErrorKind::Unsupported => tonic::Code::Unimplemented,
            ErrorKind::NumericsMismatch => tonic::Code::FailedPrecondition,
            ErrorKind::TooLarge => tonic::Code::OutOfRange,
            ErrorKind::Busy => tonic::Code::ResourceExhausted,
            ErrorKind::Unavailable => tonic::Code::Unavailable,
            ErrorKind::DeadlineExceeded => tonic::Code::DeadlineExceeded,
            ErrorKind::Cancelled => tonic::Code::Cancelled,
            ErrorKind::NotFound => tonic::Code::NotFound,
            ErrorKind::Aborted => tonic::Code::Aborted,
            ErrorKind::Internal => tonic::Code::Internal,
        }
    }

    /// The kind that a gRPC status code stands for.
    pub fn from_code(code: tonic::Code) -> ErrorKind {
        match code {
            tonic::Code::InvalidArgument => ErrorKind::Invalid,
            tonic::Code::DataLoss => ErrorKind::Corrupt,
            tonic::Code::Unimplemented => ErrorKind::Unsupported,
            tonic::Code::FailedPrecondition => ErrorKind::NumericsMismatch,
            tonic::Code::OutOfRange => ErrorKind::TooLarge,
            tonic::Code::ResourceExhausted => ErrorKind::Busy,
            tonic::Code::Unavailable => ErrorKind::Unavailable,
            tonic::Code::DeadlineExceeded => ErrorKind::DeadlineExceeded,
            tonic::Code::Cancelled => ErrorKind::Cancelled,
            tonic::Code::NotFound => ErrorKind::NotFound,
            tonic::Code::Aborted => ErrorKind::Aborted,
            _ => ErrorKind::Internal,
        }
    }

    /// Where a failure of this kind may be tried again, unless it says otherwise.
    pub fn retry(self) -> RetryHint {
        match self {
            ErrorKind::Invalid | ErrorKind::Cancelled | ErrorKind::NotFound | ErrorKind::Aborted => {
                RetryHint::Never
            }
            ErrorKind::Busy => RetryHint::Later,
            // A task too large for one server, or corrupted on one path, may fare better on another.
            ErrorKind::Corrupt
            | ErrorKind::Unsupported
            | ErrorKind::NumericsMismatch
            | ErrorKind::TooLarge
            | ErrorKind::Unavailable
            | ErrorKind::DeadlineExceeded
            | ErrorKind::Internal => RetryHint::Elsewhere,
        }
    }
}

/// Why a task or a call failed: what was wrong with which values, and what to do.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct TaskError {
    /// What kind of failure it was.
    pub kind: ErrorKind,
    /// For people.
    pub message: String,
    /// Whether and where to try again.
    pub retry: RetryHint,
}

impl TaskError {
    /// A failure with its kind's usual retry hint.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        TaskError { kind, message: message.into(), retry: kind.retry() }
    }

    /// The request does not hold together.
    pub fn invalid(message: impl Into<String>) -> Self {
        TaskError::new(ErrorKind::Invalid, message)
    }

    /// The server takes no new work, or is gone.
    pub fn unavailable(message: impl Into<String>) -> Self {
        TaskError::new(ErrorKind::Unavailable, message)
    }

    /// Not done within `limit`.
    pub fn deadline(what: &str, limit: Duration) -> Self {
        let message = format!("{what} was not done within {:.1} s", limit.as_secs_f64());
        TaskError::new(ErrorKind::DeadlineExceeded, message)
    }

    /// A defect of Outboard's own.
    pub fn internal(message: impl Into<String>) -> Self {
        TaskError::new(ErrorKind::Internal, message)
    }

    /// The same error with `context` before its message.
    pub fn context(mut self, context: impl std::fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }
}

impl From<InvalidAttention> for TaskError {
    fn from(error: InvalidAttention) -> Self {
        TaskError::invalid(error.to_string())
    }
}
