//! Rows of tensors of any element type.

use half::{bf16, f16};

use super::simd::Vector;
use crate::AnyTensor;

/// One head of one token.
#[derive(Clone, Copy, Debug)]
pub(super) enum Row<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

impl Default for Row<'_> {
    /// No element, which reads as zeros.
    fn default() -> Self {
        Row::F32(&[])
    }
}

impl<'a> Row<'a> {
    /// # Panics
    /// When either index is out of range.
    #[inline(always)]
    pub(super) fn of(tensor: &AnyTensor<'a>, token: usize, head: usize) -> Self {
        match tensor {
            AnyTensor::F32(view) => Row::F32(view.row(token, head)),
            AnyTensor::Bf16(view) => Row::Bf16(view.row(token, head)),
            AnyTensor::F16(view) => Row::F16(view.row(token, head)),
        }
    }

    /// False when some element is infinite or NaN.
    #[inline(always)]
    pub(super) fn is_finite(&self) -> bool {
        // Without an early end, so that it vectorises.
        match self {
            Row::F32(row) => row.iter().fold(true, |all, x| all & (x.abs() < f32::INFINITY)),
            Row::Bf16(row) => row.iter().fold(true, |all, x| all & (x.to_bits() & 0x7f80 != 0x7f80)),
            Row::F16(row) => row.iter().fold(true, |all, x| all & (x.to_bits() & 0x7c00 != 0x7c00)),
        }
    }

    /// Asks for its elements.
    #[inline(always)]
    pub(super) fn prefetch<V: Vector>(&self) {
        let (first, bytes) = match self {
            Row::F32(row) => (row.as_ptr(), size_of_val(*row)),
            Row::Bf16(row) => (row.as_ptr().cast(), size_of_val(*row)),
            Row::F16(row) => (row.as_ptr().cast(), size_of_val(*row)),
        };
        for at in (0..bytes).step_by(CACHE_LINE) {
            V::prefetch(first.wrapping_byte_add(at));
        }
    }
}

/// Bytes of a cache line, on about every machine.
const CACHE_LINE: usize = 64;
