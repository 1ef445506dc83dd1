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
    /// Room for `tokens`, which `parts` cover.
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

#[cfg(test)]
mod tests {
    use outboard_attention::{DType, TensorLayout};
    use proptest::prelude::*;

    use super::super::elements::Outgoing;
    use super::*;

    /// A tensor with gaps between its tokens, and spans that partition them.
    fn strided(dtype: DType, row: [usize; 2], pad: usize, lengths: &[usize]) -> (TensorSlice, Vec<Span>) {
        let ([heads, dim], tokens) = (row, lengths.iter().sum());
        let stride = heads * dim + pad;
        let storage = Elements::rounded(dtype, (0..3 + tokens * stride).map(|x| (x % 251) as f32));
        let layout = TensorLayout { offset: 3, stride, tokens: Span::at(7, tokens), heads, dim };
        let mut start = 7;
        let part = |&length: &usize| {
            start += length;
            Span::at(start - length, length)
        };
        (TensorSlice::new("test", storage, layout).unwrap(), lengths.iter().map(part).collect())
    }

    /// The chunks of a part, cut anywhere.
    fn chunks(slice: &TensorSlice, sizes: &[usize]) -> Vec<Chunk> {
        let outgoing = Outgoing::new(slice.clone());
        let data = outgoing.chunk(0, 0, 0).expect("it is less than a chunk").data;
        let (mut chunks, mut at) = (Vec::new(), 0);
        for size in sizes.iter().cycle() {
            let end = data.len().min(at + size);
            let piece = data.slice(at..end);
            let crc32c = crc32c::crc32c(&piece);
            chunks.push(Chunk { task: 0, tensor: 0, offset: at as u64, crc32c, data: piece });
            at = end;
            if at == data.len() {
                break;
            }
        }
        chunks
    }

    fn elements(slice: &TensorSlice) -> Vec<f32> {
        let dim = slice.heads() * slice.dim();
        let mut destination = zeroed(slice.dtype(), slice.bytes());
        copy_memory(slice.view(), memory_mut(&mut destination));
        assert_eq!(destination.len(), slice.tokens().len() * dim);
        destination.values().to_vec()
    }

    proptest! {
        #[test]
        fn parts_make_up_the_tensor_in_whatever_order_they_come(
            dtype in prop::sample::select(DType::ALL.to_vec()),
            row in (1..4usize, 1..40usize),
            pad in 0..20usize,
            parts in prop::collection::vec((1..30usize, any::<bool>()), 1..8),
            sizes in prop::collection::vec(1..3000usize, 1..5),
            mut order in prop::collection::vec(any::<prop::sample::Index>(), 1..40),
        ) {
            let lengths: Vec<usize> = parts.iter().map(|(length, _)| *length).collect();
            let (whole, spans) = strided(dtype, [row.0, row.1], pad, &lengths);
            let mut assembly = Assembly::new(Row::of(&whole), whole.tokens(), &spans);
            let slices: Vec<TensorSlice> = spans.iter().map(|span| whole.with_tokens(*span).unwrap()).collect();
            let mut left: Vec<(usize, Vec<Chunk>)> = Vec::new();
            for (part, (_, is_here)) in parts.iter().enumerate() {
                if *is_here {
                    assembly.fill(part, &slices[part]).unwrap();
                } else {
                    prop_assert!(assembly.check_whole(part).is_err());
                    left.push((part, chunks(&slices[part], &sizes)));
                }
            }
            while !left.is_empty() {
                order.rotate_left(1);
                let n = order[0].index(left.len());
                let (part, chunks) = &mut left[n];
                assembly.put(*part, &chunks.remove(0)).unwrap();
                prop_assert_eq!(assembly.check_whole(*part).is_ok(), chunks.is_empty());
                if chunks.is_empty() {
                    left.remove(n);
                }
            }
            let slice = assembly.into_slice().unwrap();
            prop_assert_eq!((slice.tokens(), Row::of(&slice)), (whole.tokens(), Row::of(&whole)));
            prop_assert!(elements(&slice) == elements(&whole));
        }
    }

    #[track_caller]
    fn refused(error: Result<(), TaskError>, kind: ErrorKind, expected: &str) {
        let error = error.expect_err(expected);
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.message.contains(expected), "{error}");
    }

    #[test]
    fn what_does_not_fit_a_part_is_refused_and_writes_nothing() {
        let (whole, spans) = strided(DType::Bf16, [2, 5], 1, &[4, 6]);
        let [first, second] = [0, 1].map(|n| whole.with_tokens(spans[n]).unwrap());
        let mut assembly = Assembly::new(Row::of(&whole), whole.tokens(), &spans);
        // The second part is longer than the first has room for.
        refused(assembly.put(0, &chunks(&second, &[1000])[0]), ErrorKind::Corrupt, "beyond the tensor");
        refused(assembly.put(1, &chunks(&second, &[50])[1]), ErrorKind::Corrupt, "leaves a gap");
        refused(assembly.put(2, &chunks(&second, &[50])[0]), ErrorKind::Internal, "no part 2");
        refused(assembly.fill(0, &second), ErrorKind::Internal, "do not fit part 0");
        refused(assembly.fill(2, &second), ErrorKind::Internal, "do not fit part 2");
        let (other_type, _) = strided(DType::F16, [2, 5], 0, &[4]);
        refused(assembly.fill(0, &other_type), ErrorKind::Internal, "do not fit part 0");
        // As many bytes, and another row.
        let (other_row, _) = strided(DType::Bf16, [1, 5], 0, &[8]);
        refused(assembly.fill(0, &other_row), ErrorKind::Internal, "do not fit part 0");
        assembly.fill(0, &first).unwrap();
        refused(assembly.put(0, &chunks(&first, &[1000])[0]), ErrorKind::Corrupt, "overlaps");
        refused(assembly.check_whole(1), ErrorKind::Corrupt, "0 of 120 bytes");
        refused(assembly.into_slice().map(drop), ErrorKind::Corrupt, "0 of 120 bytes");
    }
}
