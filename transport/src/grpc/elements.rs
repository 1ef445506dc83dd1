//! Elements to chunks and back, as bytes: only here does a tensor's memory count as such. On the wire elements are
//! little-endian.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use outboard_attention::{AnyTensor, DType, Elements, TensorSlice};
use outboard_proto::v1::Chunk;
use outboard_proto::{ErrorKind, MAX_CHUNK_BYTES, TaskError};

/// A tensor to send, in chunks. Where its memory is laid out as on the wire, the chunks are that memory.
#[derive(Debug)]
pub(super) struct Outgoing {
    slice: TensorSlice,
    as_is: Option<Bytes>,
}

struct Contiguous(TensorSlice);

impl AsRef<[u8]> for Contiguous {
    fn as_ref(&self) -> &[u8] {
        memory(self.0.view()).get(..self.0.bytes()).unwrap_or_default()
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
            None => packed(self.slice.view(), offset, end),
        };
        Some(Chunk { task, tensor, offset: offset as u64, crc32c: crc32c::crc32c(&data), data })
    }
}

/// The memory of a view, from its first element on.
fn memory(view: AnyTensor<'_>) -> &[u8] {
    match view {
        AnyTensor::F32(view) => bytemuck::cast_slice(view.data()),
        AnyTensor::Bf16(view) => bytemuck::cast_slice(view.data()),
        AnyTensor::F16(view) => bytemuck::cast_slice(view.data()),
    }
}

/// The bytes `[start, end)` of a view, counted as if it were contiguous; whole elements.
fn packed(view: AnyTensor<'_>, start: usize, end: usize) -> Bytes {
    let ([_, heads, dim], element) = (view.shape(), view.dtype().bytes());
    let (row, stride) = (heads * dim * element, view.stride() * element);
    let memory = memory(view);
    let mut bytes = BytesMut::with_capacity(end - start);
    let mut at = start;
    while at < end {
        let (token, skip) = (at / row, at % row);
        let left = &memory[token * stride + skip..];
        let part = &left[..(row - skip).min(end - at)];
        bytes.extend_from_slice(part);
        at += part.len();
    }
    turn(&mut bytes, element);
    bytes.freeze()
}

/// Copies a whole view, as it travels, to memory of its size.
pub(super) fn copy_memory(view: AnyTensor<'_>, to: &mut [u8]) {
    let ([_, heads, dim], element) = (view.shape(), view.dtype().bytes());
    let (row, stride) = (heads * dim * element, view.stride() * element);
    let from = memory(view);
    for (token, to) in to.chunks_exact_mut(row).enumerate() {
        to.copy_from_slice(&from[token * stride..][..row]);
    }
    turn(to, element);
}

/// Turns elements of `size` bytes from this machine's order to that of the wire, or back.
pub(super) fn turn(bytes: &mut [u8], size: usize) {
    if cfg!(target_endian = "big") {
        bytes.chunks_exact_mut(size).for_each(<[u8]>::reverse);
    }
}

/// A tensor on its way in. Its memory is taken when the first chunk comes.
#[derive(Debug)]
pub(super) struct Destination {
    data: Elements,
    bytes: usize,
    received: usize,
}

impl Destination {
    /// Room for `bytes`, which must be whole elements.
    pub(super) fn new(dtype: DType, bytes: usize) -> Destination {
        Destination { data: Elements::empty(dtype), bytes, received: 0 }
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
        let end = check_next(chunk, self.received, self.bytes, self.data.dtype())?;
        if self.data.is_empty() {
            self.data = zeroed(self.data.dtype(), self.bytes);
        }
        memory_mut(&mut self.data)[self.received..end].copy_from_slice(&chunk.data);
        self.received = end;
        Ok(())
    }

    /// The elements, once whole.
    pub(super) fn into_elements(mut self) -> Elements {
        let size = self.data.dtype().bytes();
        turn(memory_mut(&mut self.data), size);
        self.data
    }
}

/// Checks that a chunk is the next one of a tensor of `bytes`, of which `received` have come. Gives back how many have
/// come with it.
///
/// # Errors
/// [`ErrorKind::Corrupt`] when it is not, reaches beyond the tensor, or fails its checksum.
pub(super) fn check_next(
    chunk: &Chunk,
    received: usize,
    bytes: usize,
    dtype: DType,
) -> Result<usize, TaskError> {
    let Chunk { tensor, offset, data, .. } = chunk;
    let length = data.len();
    let corrupt = |what: String| Err(TaskError::new(ErrorKind::Corrupt, format!("tensor {tensor}: {what}")));
    if data.is_empty() || length > MAX_CHUNK_BYTES {
        return corrupt(format!("a chunk has {length} bytes; it must have 1 to {MAX_CHUNK_BYTES}"));
    }
    if *offset != received as u64 {
        let what = if *offset < received as u64 { "overlaps what has come" } else { "leaves a gap" };
        return corrupt(format!("a chunk at byte {offset} {what}; byte {received} is next"));
    }
    let end = received + length;
    if end > bytes {
        return corrupt(format!("a chunk ends at byte {end}, beyond the tensor's {bytes} bytes of {dtype}"));
    }
    let crc = crc32c::crc32c(data);
    if crc != chunk.crc32c {
        let said = chunk.crc32c;
        return corrupt(format!(
            "the chunk at byte {offset} has CRC-32C {crc:#010x}, its header says {said:#010x}; send the task again"
        ));
    }
    Ok(end)
}

/// Zeros of `bytes` from the allocator, which often has them without writing any.
pub(super) fn zeroed(dtype: DType, bytes: usize) -> Elements {
    let count = bytes / dtype.bytes();
    let mut elements = Elements::empty(dtype);
    match &mut elements {
        Elements::F32(data) => *data = Arc::new(bytemuck::zeroed_vec(count)),
        Elements::Bf16(data) => *data = Arc::new(bytemuck::zeroed_vec(count)),
        Elements::F16(data) => *data = Arc::new(bytemuck::zeroed_vec(count)),
    }
    elements
}

/// The memory of elements that nobody else holds yet.
pub(super) fn memory_mut(elements: &mut Elements) -> &mut [u8] {
    match elements {
        Elements::F32(data) => bytemuck::cast_slice_mut(Arc::make_mut(data).as_mut_slice()),
        Elements::Bf16(data) => bytemuck::cast_slice_mut(Arc::make_mut(data).as_mut_slice()),
        Elements::F16(data) => bytemuck::cast_slice_mut(Arc::make_mut(data).as_mut_slice()),
    }
}

#[cfg(test)]
mod tests {
    use outboard_attention::{Span, TensorLayout};
    use proptest::prelude::*;

    use super::*;

    fn slice(
        dtype: DType,
        offset: usize,
        stride: usize,
        tokens: usize,
        heads: usize,
        dim: usize,
    ) -> TensorSlice {
        // Few of them, so that each type holds them exactly, and not in step with any row or chunk.
        let storage = Elements::rounded(dtype, (0..offset + tokens * stride).map(|x| (x % 251) as f32));
        let layout = TensorLayout { offset, stride, tokens: Span::at(7, tokens), heads, dim };
        TensorSlice::new("test", storage, layout).unwrap()
    }

    fn chunks(outgoing: &Outgoing) -> Vec<Chunk> {
        (0..).map_while(|n| outgoing.chunk(1, 2, n * MAX_CHUNK_BYTES)).collect()
    }

    fn sample() -> Vec<Chunk> {
        chunks(&Outgoing::new(slice(DType::F32, 0, 1024, 700, 4, 256)))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn chunks_carry_every_element(
            dtype in prop::sample::select(DType::ALL.to_vec()),
            offset in 0..50usize,
            pad in 0..70usize,
            heads in 1..5usize,
            dim in 1..300usize,
        ) {
            let tokens = 1 + 600_000 / (heads * dim);
            let stride = heads * dim + pad;
            let slice = slice(dtype, offset, stride, tokens, heads, dim);
            let mut destination = Destination::new(dtype, slice.bytes());
            for chunk in chunks(&Outgoing::new(slice.clone())) {
                prop_assert!(!destination.is_whole());
                destination.put(&chunk).unwrap();
            }
            prop_assert!(destination.is_whole());
            let elements = destination.into_elements();
            prop_assert_eq!(elements.dtype(), dtype);
            let element = |n: usize| ((offset + n / (heads * dim) * stride + n % (heads * dim)) % 251) as f32;
            let expected: Vec<f32> = (0..tokens * heads * dim).map(element).collect();
            prop_assert!(*elements.values() == expected[..]);
        }
    }

    /// On the wire every element is little-endian, and where the memory is so too, it is what goes out.
    #[test]
    fn elements_travel_as_they_lie_in_memory() {
        let bytes_of = |dtype, pad: usize| {
            let chunk = Outgoing::new(slice(dtype, 1, 2 + pad, 2, 1, 2)).chunk(1, 2, 0).unwrap();
            chunk.data.to_vec()
        };
        // Elements 1, 2, 3, 4, and with a gap 1, 2, 4, 5.
        assert_eq!(bytes_of(DType::Bf16, 0), [0x80, 0x3f, 0x00, 0x40, 0x40, 0x40, 0x80, 0x40]);
        assert_eq!(bytes_of(DType::F16, 1), [0x00, 0x3c, 0x00, 0x40, 0x00, 0x44, 0x00, 0x45]);
        assert_eq!(bytes_of(DType::F32, 1)[4..12], [0x00, 0x00, 0x00, 0x40, 0x00, 0x00, 0x80, 0x40]);
        let outgoing = Outgoing::new(slice(DType::Bf16, 1, 2, 2, 1, 2));
        let chunk = outgoing.chunk(1, 2, 0).unwrap();
        let in_place = memory(outgoing.slice.view()).as_ptr() == chunk.data.as_ptr();
        assert!(in_place || cfg!(target_endian = "big"), "a contiguous tensor is copied");
    }

    #[track_caller]
    fn refused(change: impl FnOnce(&mut Vec<Chunk>), expected: &str) {
        let mut chunks = sample();
        change(&mut chunks);
        let mut destination = Destination::new(DType::F32, 700 * 1024 * 4);
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
