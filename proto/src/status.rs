//! An error as it travels: a gRPC status whose details hold the encoded [`v1::Failure`].

use bytes::Bytes;
use prost::Message;
use tonic::{Code, Status};

use crate::{ErrorKind, RetryHint, TaskError, v1};

/// Longest message that travels, in characters: statuses travel in HTTP headers, which peers bound.
const MAX_MESSAGE_CHARS: usize = 1500;

fn shortened(message: &str) -> String {
    match message.char_indices().nth(MAX_MESSAGE_CHARS) {
        Some((end, _)) => format!("{} ...", &message[..end]),
        None => message.to_owned(),
    }
}

impl From<&TaskError> for v1::Failure {
    fn from(error: &TaskError) -> v1::Failure {
        let retry = match error.retry {
            RetryHint::Never => v1::RetryHint::Never,
            RetryHint::Elsewhere => v1::RetryHint::Elsewhere,
            RetryHint::Later => v1::RetryHint::Later,
        };
        v1::Failure {
            code: error.kind.code() as i32,
            message: shortened(&error.message),
            retry: retry as i32,
        }
    }
}

impl From<v1::Failure> for TaskError {
    fn from(failure: v1::Failure) -> TaskError {
        let retry = match v1::RetryHint::try_from(failure.retry) {
            Ok(v1::RetryHint::Elsewhere) => RetryHint::Elsewhere,
            Ok(v1::RetryHint::Later) => RetryHint::Later,
            Ok(v1::RetryHint::Never | v1::RetryHint::Unspecified) | Err(_) => RetryHint::Never,
        };
        TaskError {
            kind: ErrorKind::from_code(Code::from_i32(failure.code)),
            message: failure.message,
            retry,
        }
    }
}

impl From<TaskError> for Status {
    fn from(error: TaskError) -> Status {
        let failure = v1::Failure::from(&error);
        Status::with_details(error.kind.code(), failure.message.clone(), Bytes::from(failure.encode_to_vec()))
    }
}

/// A status that carries no [`v1::Failure`], such as one from a proxy, gets its kind's usual retry hint.
impl From<Status> for TaskError {
    fn from(status: Status) -> TaskError {
        match failure_of(&status) {
            Some(failure) => failure.into(),
            None => TaskError::new(ErrorKind::from_code(status.code()), status.message()),
        }
    }
}

/// The failure that an Outboard peer put into the status; `None` when the status comes from elsewhere.
pub fn failure_of(status: &Status) -> Option<v1::Failure> {
    let failure = v1::Failure::decode(status.details()).ok()?;
    (!status.details().is_empty() && failure.code == status.code() as i32).then_some(failure)
}
