//! f32 elements to chunks and back. On the wire elements are little-endian.

use bytes::{Bytes, BytesMut};
use outboard_attention::{TensorSlice, TensorView};
use outboard_proto::v1::Chunk;
use outboard_proto::{ErrorKind, MAX_CHUNK_BYTES, TaskError};

const ELEMENT: usize = size_of::<f32>();

/// A tensor to send, in chunks. Where its memory is laid out as on the wire, the chunks are that memory.
#[derive(Debug)]
pub(super) struct Outgoing {
    slice: TensorSlice,
    as_is: Option<Bytes>,
}

struct Contiguous(TensorSlice);

impl AsRef<[u8]> for Contiguous {
    fn as_ref(&self) -> &[u8] {
        let elements = self.0.bytes() / ELEMENT;
        bytemuck::cast_slice(self.0.view().data().get(..elements).unwrap_or_default())
    }
}

impl Outgoing {
    pub(super) fn new(slice: TensorSlice) -> Outgoing {
        let contiguous = slice.view().stride() == slice.heads() * slice.dim();
        let as_is = (cfg!(target_endian = "little") && contiguous)
            .then(|| Bytes::from_owner(Contiguous(slice.clone())));
        Outgoing { slice, as_is }
    }

    /// All bytes of the tensor.
    pub(super) fn bytes(&self) -> usize {
        self.slice.bytes()
    }

    /// The chunk that begins at byte `offset`, a multiple of [`MAX_CHUNK_BYTES`]; `None` at the end.
    pub(super) fn chunk(&self, task: u64, tensor: u64, offset: usize) -> Option<Chunk> {
        let end = self.bytes().min(offset.saturating_add(MAX_CHUNK_BYTES));
        if offset >= end {
            return None;
        }
        let data = match &self.as_is {
            Some(bytes) => bytes.slice(offset..end),
            None => packed(&self.slice.view(), offset / ELEMENT, end / ELEMENT),
        };
        Some(Chunk { task, tensor, offset: offset as u64, crc32c: crc32c::crc32c(&data), data })
    }
}

/// The elements `[start, end)` of a view, counted as if it were contiguous.
fn packed(view: &TensorView<'_>, start: usize, end: usize) -> Bytes {
    let [_, heads, dim] = view.shape();
    let row = heads * dim;
    let mut bytes = BytesMut::with_capacity((end - start) * ELEMENT);
    let mut at = start;
    while at < end {
        let (token, skip) = (at / row, at % row);
        let elements = &view.token(token)[skip..];
        let elements = &elements[..elements.len().min(end - at)];
        if cfg!(target_endian = "little") {
            bytes.extend_from_slice(bytemuck::cast_slice(elements));
        } else {
            elements.iter().for_each(|x| bytes.extend_from_slice(&x.to_le_bytes()));
        }
        at += elements.len();
    }
    bytes.freeze()
}

/// A tensor on its way in. Its memory is taken when the first chunk comes.
#[derive(Debug)]
pub(super) struct Destination {
    data: Vec<f32>,
    bytes: usize,
    received: usize,
}

impl Destination {
    /// Room for `bytes`, which must be whole elements.
    pub(super) fn new(bytes: usize) -> Destination {
        Destination { data: Vec::new(), bytes, received: 0 }
    }

    /// True when every byte has come.
    pub(super) fn is_whole(&self) -> bool {
        self.received == self.bytes
    }

    /// Takes the next chunk.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when it is not the next one, reaches beyond the tensor, or fails its checksum.
    pub(super) fn put(&mut self, chunk: &Chunk) -> Result<(), TaskError> {
        let Chunk { tensor, offset, data, .. } = chunk;
        let (bytes, received, length) = (self.bytes, self.received, data.len());
        let corrupt =
            |what: String| Err(TaskError::new(ErrorKind::Corrupt, format!("tensor {tensor}: {what}")));
        if data.is_empty() || length > MAX_CHUNK_BYTES {
            return corrupt(format!("a chunk has {length} bytes; it must have 1 to {MAX_CHUNK_BYTES}"));
        }
        if *offset != received as u64 {
            let what = if *offset < received as u64 { "overlaps what has come" } else { "leaves a gap" };
            return corrupt(format!("a chunk at byte {offset} {what}; byte {received} is next"));
        }
        let end = received + length;
        if end > bytes {
            return corrupt(format!("a chunk ends at byte {end}, beyond the tensor's {bytes} bytes"));
        }
        let crc = crc32c::crc32c(data);
        if crc != chunk.crc32c {
            let said = chunk.crc32c;
            return corrupt(format!(
                "the chunk at byte {offset} has CRC-32C {crc:#010x}, its header says {said:#010x}; send the task again"
            ));
        }
        if self.data.is_empty() {
            self.data = vec![0.0; bytes / ELEMENT];
        }
        bytemuck::cast_slice_mut::<f32, u8>(&mut self.data)[received..end].copy_from_slice(data);
        self.received = end;
        Ok(())
    }

    /// The elements, once whole.
    pub(super) fn into_elements(mut self) -> Vec<f32> {
        if cfg!(target_endian = "big") {
            self.data.iter_mut().for_each(|x| *x = f32::from_bits(u32::from_le(x.to_bits())));
        }
        self.data
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use outboard_attention::{Span, TensorLayout};
    use proptest::prelude::*;

    use super::*;

    fn slice(offset: usize, stride: usize, tokens: usize, heads: usize, dim: usize) -> TensorSlice {
        let storage: Vec<f32> = (0..offset + tokens * stride).map(|x| x as f32).collect();
        let layout = TensorLayout { offset, stride, tokens: Span::at(7, tokens), heads, dim };
        TensorSlice::new("test", Arc::new(storage), layout).unwrap()
    }

    fn chunks(outgoing: &Outgoing) -> Vec<Chunk> {
        (0..).map_while(|n| outgoing.chunk(1, 2, n * MAX_CHUNK_BYTES)).collect()
    }

    fn sample() -> Vec<Chunk> {
        chunks(&Outgoing::new(slice(0, 1024, 700, 4, 256)))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn chunks_carry_every_element(offset in 0..50usize, pad in 0..70usize, heads in 1..5usize, dim in 1..300usize) {
            let tokens = 1 + 600_000 / (heads * dim);
            let slice = slice(offset, heads * dim + pad, tokens, heads, dim);
            let mut destination = Destination::new(slice.bytes());
            for chunk in chunks(&Outgoing::new(slice.clone())) {
                prop_assert!(!destination.is_whole());
                destination.put(&chunk).unwrap();
            }
            prop_assert!(destination.is_whole());
            let view = slice.view();
            let expected: Vec<f32> = (0..tokens).flat_map(|t| view.token(t).iter().copied()).collect();
            prop_assert_eq!(destination.into_elements(), expected);
        }
    }

    #[track_caller]
    fn refused(change: impl FnOnce(&mut Vec<Chunk>), expected: &str) {
        let mut chunks = sample();
        change(&mut chunks);
        let mut destination = Destination::new(700 * 1024 * ELEMENT);
        let error = chunks.iter().find_map(|chunk| destination.put(chunk).err()).expect("a chunk is refused");
        assert_eq!(error.kind, ErrorKind::Corrupt);
        assert!(error.message.contains(expected), "{}", error.message);
    }

    #[test]
    fn what_is_not_the_next_chunk_is_refused() {
        refused(|c| c[1].crc32c ^= 1, "CRC-32C");
        refused(|c| c.swap(0, 1), "leaves a gap");
        refused(|c| c[1].offset = 0, "overlaps");
        refused(|c| c[1].data = Bytes::new(), "has 0 bytes");
        refused(|c| c[1].data = Bytes::from(vec![0; MAX_CHUNK_BYTES + 1]), "it must have");
        refused(|c| c[2].data = Bytes::from(vec![0; MAX_CHUNK_BYTES]), "beyond the tensor");
        refused(|c| c[1].offset = u64::MAX, "leaves a gap");
    }
}
