//! A tensor whose tokens come from several homes at once.

use outboard_attention::{Elements, Span, TensorSlice};
use outboard_proto::v1::Chunk;
use outboard_proto::{ErrorKind, TaskError};

use super::elements::{check_next, copy_memory, memory_mut, turn, zeroed};
use crate::sizes::Row;

/// Memory of a whole tensor, filled part by part.
#[derive(Debug)]
pub(super) struct Assembly {
    data: Elements,
    tokens: Span,
    row: Row,
    parts: Vec<Part>,
}

/// Bytes `[base, base + bytes)` of the tensor.
#[derive(Debug)]
struct Part {
    base: usize,
    bytes: usize,
    received: usize,
}

impl Assembly {
    /// Room for `tokens`, which `parts` cover one after another.
    pub(super) fn new(row: Row, tokens: Span, parts: &[Span]) -> Assembly {
        let bytes = |tokens: usize| row.tensor_bytes(tokens) as usize;
        let part = |span: &Span| Part {
            base: bytes(span.start().saturating_sub(tokens.start())),
            bytes: bytes(span.len()),
            received: 0,
        };
        let data = zeroed(row.dtype, bytes(tokens.len()));
        Assembly { data, tokens, row, parts: parts.iter().map(part).collect() }
    }

    /// Takes the next chunk of a part.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when it is not the next one, reaches beyond the part, or fails its checksum.
    pub(super) fn put(&mut self, part: usize, chunk: &Chunk) -> Result<(), TaskError> {
        let unknown = || TaskError::internal(format!("the tensor has no part {part}"));
        let Part { base, bytes, received } = self.parts.get_mut(part).ok_or_else(unknown)?;
        let end = check_next(chunk, *received, *bytes, self.row.dtype)?;
        memory_mut(&mut self.data)[*base + *received..*base + end].copy_from_slice(&chunk.data);
        *received = end;
        Ok(())
    }

    /// Copies a part that is in this process.
    ///
    /// # Errors
    /// [`ErrorKind::Internal`] when it is of another shape.
    pub(super) fn fill(&mut self, part: usize, slice: &TensorSlice) -> Result<(), TaskError> {
        let unfit = || TaskError::internal(format!("keys that do not fit part {part} of the tensor"));
        let Part { base, bytes, received } = self.parts.get_mut(part).ok_or_else(unfit)?;
        if slice.bytes() != *bytes || self.row != Row::of(slice) {
            return Err(unfit());
        }
        copy_memory(slice.view(), &mut memory_mut(&mut self.data)[*base..*base + *bytes]);
        *received = *bytes;
        Ok(())
    }

    /// Checks that all of a part has come.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when it has not.
    pub(super) fn check_whole(&self, part: usize) -> Result<(), TaskError> {
        match self.parts.get(part) {
            Some(Part { bytes, received, .. }) if received < bytes => {
                let message = format!("{received} of {bytes} bytes came");
                Err(TaskError::new(ErrorKind::Corrupt, message))
            }
            _ => Ok(()),
        }
    }

    /// The tensor, once every part is whole.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when one is not.
    pub(super) fn into_slice(mut self) -> Result<TensorSlice, TaskError> {
        (0..self.parts.len()).try_for_each(|part| self.check_whole(part))?;
        turn(memory_mut(&mut self.data), self.row.dtype.bytes());
        Ok(TensorSlice::contiguous("keys", self.data, self.tokens, self.row.heads, self.row.dim)?)
    }
}
