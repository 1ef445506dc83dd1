//! Copies between tensors and pinned memory, by several threads where it pays.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use outboard_attention::{AnyTensor, DType, TensorView};

use crate::batch::OperandPlace;

/// Bytes for which a thread is worth its start.
const THREAD_BYTES: usize = 8 << 20;

/// A tensor to be copied.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source<'a> {
    F32(TensorView<'a, f32>),
    Bf16(TensorView<'a, bf16>),
    F16(TensorView<'a, f16>),
    Nothing,
}

impl<'a> From<AnyTensor<'a>> for Source<'a> {
    fn from(tensor: AnyTensor<'a>) -> Self {
        match tensor {
            AnyTensor::F32(view) => Source::F32(view),
            AnyTensor::Bf16(view) => Source::Bf16(view),
            AnyTensor::F16(view) => Source::F16(view),
        }
    }
}

/// Some tokens of a tensor, and the bytes they go to.
struct Part<'a, 'b> {
    source: Source<'a>,
    first: usize,
    target: &'b mut [u8],
}

/// Writes each source without gaps to its place in `target`. Places ascend and do not overlap.
pub(crate) fn gather(sources: Vec<(Source<'_>, OperandPlace)>, target: &mut [u8], threads: usize) {
    let total: usize = sources.iter().map(|(_, place)| place.bytes).sum();
    let part_bytes = part_bytes(total, threads);
    let mut parts = Vec::new();
    let (mut rest, mut passed) = (target, 0);
    for (source, place) in sources {
        let (_, after) = rest.split_at_mut(place.start - passed);
        let (mut own, after) = after.split_at_mut(place.bytes);
        (rest, passed) = (after, place.start + place.bytes);
        let token = source.token_bytes();
        let tokens = part_bytes.div_ceil(token.max(1)).max(1);
        let mut first = 0;
        while !own.is_empty() && token > 0 {
            let (head, tail) = own.split_at_mut((tokens * token).min(own.len()));
            parts.push(Part { source, first, target: head });
            (own, first) = (tail, first + tokens);
        }
    }
    each(parts, total, threads, |part| part.source.copy(part.first, part.target));
}

/// Elements of any type as bytes, and where they go in f32: as many.
pub(crate) struct Widened<'a, 'b> {
    pub(crate) dtype: DType,
    /// Aligned for the type.
    pub(crate) from: &'a [u8],
    pub(crate) to: &'b mut [f32],
}

/// Copies each source to its target, widened to f32.
pub(crate) fn scatter(copies: Vec<Widened<'_, '_>>, threads: usize) {
    let total: usize = copies.iter().map(|copy| size_of_val(copy.to)).sum();
    let elements = part_bytes(total, threads).div_ceil(size_of::<f32>()).max(1);
    let parts = copies
        .into_iter()
        .flat_map(|Widened { dtype, from, to }| {
            let parts = from.chunks(elements * dtype.bytes()).zip(to.chunks_mut(elements));
            parts.map(move |(from, to)| Widened { dtype, from, to })
        })
        .collect();
    each(parts, total, threads, |Widened { dtype, from, to }| match dtype {
        DType::Bf16 => bytemuck::cast_slice::<u8, bf16>(from).convert_to_f32_slice(to),
        DType::F16 => bytemuck::cast_slice::<u8, f16>(from).convert_to_f32_slice(to),
        _ => to.copy_from_slice(bytemuck::cast_slice(from)),
    });
}

fn part_bytes(total: usize, threads: usize) -> usize {
    // A few parts for each thread, so that none waits long for another.
    (total / (4 * threads.max(1))).max(THREAD_BYTES / 8)
}

/// Calls `work` for each part, on up to `threads` threads.
fn each<P: Send>(parts: Vec<P>, bytes: usize, threads: usize, work: impl Fn(P) + Sync) {
    let threads = threads.min(bytes / THREAD_BYTES);
    if threads < 2 {
        parts.into_iter().for_each(work);
        return;
    }
    let parts = std::sync::Mutex::new(parts.into_iter());
    let take = || parts.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
    let run = || {
        while let Some(part) = take() {
            work(part);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(run);
        }
        run();
    });
}

impl Source<'_> {
    fn token_bytes(&self) -> usize {
        let elements = |[_, heads, dim]: [usize; 3]| heads * dim;
        match self {
            Source::F32(view) => elements(view.shape()) * 4,
            Source::Bf16(view) => elements(view.shape()) * 2,
            Source::F16(view) => elements(view.shape()) * 2,
            Source::Nothing => 0,
        }
    }

    /// Writes the tokens from `first` on that fill `target`.
    fn copy(&self, first: usize, target: &mut [u8]) {
        match self {
            Source::F32(view) => copy(view, first, target),
            Source::Bf16(view) => copy(view, first, target),
            Source::F16(view) => copy(view, first, target),
            Source::Nothing => {}
        }
    }
}

fn copy<T: bytemuck::Pod>(view: &TensorView<'_, T>, first: usize, target: &mut [u8]) {
    let [_, heads, dim] = view.shape();
    let token = heads * dim * size_of::<T>();
    if view.stride() == heads * dim {
        let start = first * view.stride();
        let source = &view.data()[start..start + target.len() / size_of::<T>()];
        target.copy_from_slice(bytemuck::cast_slice(source));
        return;
    }
    for (i, out) in target.chunks_exact_mut(token).enumerate() {
        out.copy_from_slice(bytemuck::cast_slice(view.token(first + i)));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn tensors_are_gathered_and_results_scattered_by_any_number_of_threads() {
        let tokens = 70_001;
        let wide: Vec<bf16> = (0..tokens * 100).map(|i| bf16::from_bits(i as u16)).collect();
        let strided = TensorView::new("strided", &wide, [tokens, 3, 30], 100).unwrap();
        let floats: Vec<f32> = (0..5 * tokens).map(|i| i as f32).collect();
        let narrow: Vec<bf16> = floats[..1234].iter().map(|x| bf16::from_f32(*x)).collect();
        let whole = TensorView::contiguous("whole", &floats, [tokens, 5, 1]).unwrap();
        let first = OperandPlace { start: 16, bytes: tokens * 90 * 2 };
        let second = OperandPlace { start: first.start + first.bytes + 12, bytes: tokens * 20 };
        let mut expected = vec![0xaa; second.start + second.bytes + 7];
        for token in 0..tokens {
            let bytes: &[u8] = bytemuck::cast_slice(&wide[token * 100..][..90]);
            expected[first.start + token * 180..][..180].copy_from_slice(bytes);
        }
        expected[second.start..][..second.bytes].copy_from_slice(bytemuck::cast_slice(&floats));
        for threads in [0, 1, 3] {
            let mut target = vec![0xaa; expected.len()];
            let sources = vec![(Source::Bf16(strided), first), (Source::F32(whole), second)];
            gather(sources, &mut target, threads);
            assert!(target == expected, "{threads} threads");

            let mut out = vec![0.0; floats.len()];
            let (a, b) = out.split_at_mut(1234);
            let from = |part: &'static str| match part {
                "narrow" => bytemuck::cast_slice::<bf16, u8>(&narrow),
                _ => bytemuck::cast_slice(&floats[1234..]),
            };
            let first = Widened { dtype: DType::Bf16, from: from("narrow"), to: a };
            scatter(vec![first, Widened { dtype: DType::F32, from: from("wide"), to: b }], threads);
            assert!(out[1234..] == floats[1234..], "{threads} threads");
            assert!(out[..1234].iter().zip(&narrow).all(|(a, b)| *a == b.to_f32()), "{threads} threads");
        }
    }
}
