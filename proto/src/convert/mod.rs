//! Domain <-> wire. From the wire everything is checked; an error names the field and its values.

mod document;
mod home;
mod plan;
mod task;
mod tensor;
mod types;

pub use home::{GradientHeader, KeyHome, KeyRange, LayerRef, MAX_KEY_HOMES, check_key_homes};
pub use plan::AssignedTask;
pub use task::WireTask;
pub use tensor::{TensorKind, TensorRef};

use outboard_attention::{InvalidAttention, MAX_TOKENS, Span};

use crate::{ErrorKind, PROTOCOL_VERSION, TaskError, v1};

/// Most slices in one mask. Checking that they are disjoint takes time square in their number.
pub const MAX_SLICES: usize = 4096;
/// Longest name (job, numerics id) in bytes.
pub const MAX_NAME_BYTES: usize = 256;

/// Refuses a peer that speaks another version of the protocol.
///
/// # Errors
/// [`ErrorKind::Unsupported`], naming both versions.
pub fn check_protocol_version(peer: u32) -> Result<(), TaskError> {
    if peer == PROTOCOL_VERSION {
        return Ok(());
    }
    let message = format!(
        "protocol_version is {peer}, and {PROTOCOL_VERSION} is spoken here; run one version of Outboard on both sides"
    );
    Err(TaskError::new(ErrorKind::Unsupported, message))
}

/// A message field that must be given.
fn required<T>(field: &'static str, value: Option<T>) -> Result<T, TaskError> {
    value.ok_or_else(|| TaskError::invalid(format!("{field} is missing; it must be given")))
}

/// A required message field, converted.
fn convert<W, D: TryFrom<W, Error = TaskError>>(
    field: &'static str,
    value: Option<W>,
) -> Result<D, TaskError> {
    D::try_from(required(field, value)?).map_err(|error| error.context(field))
}

/// Refuses an empty range.
fn not_empty(field: &'static str, span: Span) -> Result<Span, TaskError> {
    if span.is_empty() { Err(InvalidAttention::EmptySpan { field, span }.into()) } else { Ok(span) }
}

/// Refuses a name that would not fit a message to people.
fn check_name(field: &'static str, name: &str) -> Result<(), TaskError> {
    if name.len() <= MAX_NAME_BYTES {
        return Ok(());
    }
    let bytes = name.len();
    Err(TaskError::invalid(format!("{field} has {bytes} bytes; at most {MAX_NAME_BYTES} are allowed")))
}

/// An index or count that fits this machine's and the domain's bounds.
fn index(field: &'static str, value: u64) -> Result<usize, TaskError> {
    match usize::try_from(value) {
        Ok(index) if index <= MAX_TOKENS => Ok(index),
        _ => Err(InvalidAttention::OutOfRange { field, value, min: 0, max: MAX_TOKENS as u64 }.into()),
    }
}

impl TryFrom<v1::Span> for Span {
    type Error = TaskError;

    fn try_from(span: v1::Span) -> Result<Span, TaskError> {
        let v1::Span { start, end } = span;
        let backwards = || {
            TaskError::invalid(format!("start {start} is above end {end}; a range must not run backwards"))
        };
        Span::new(index("start", start)?, index("end", end)?).ok_or_else(backwards)
    }
}

impl From<&Span> for v1::Span {
    fn from(span: &Span) -> v1::Span {
        v1::Span { start: span.start() as u64, end: span.end() as u64 }
    }
}
