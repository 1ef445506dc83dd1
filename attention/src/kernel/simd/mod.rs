//! Instruction sets: the few operations that the kernel's algorithms are written over, their forms, and the one place
//! that enters code compiled for one of them.
//!
//! An operand of a product is made of 32-bit words. A word is one f32, or two bf16 that follow each other along the
//! product's depth; [`Words`] says which, and everything else is the same code.

mod dispatch;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(super) use dispatch::{MAX_TILE_ROWS, Program, dispatch};

use std::marker::PhantomData;

use half::bf16;

use super::row::Row;
use crate::Element;

/// A register of f32 lanes. Values of a type that needs an instruction set exist only in code that
/// [`dispatch`](dispatch::dispatch) has entered after finding it.
pub(in crate::kernel) trait Vector: Copy {
    /// Number of lanes.
    const LANES: usize;
    /// One boolean a lane.
    type Mask: Copy;

    fn splat(x: f32) -> Self;
    /// # Safety
    /// `from` must be readable for `LANES` elements. No alignment is needed.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// `to` must be writable for `LANES` elements. No alignment is needed.
    unsafe fn store(self, to: *mut f32);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// `self * b + c`, rounded once where the instruction set can.
    fn fma(self, b: Self, c: Self) -> Self;
    /// The larger; `other` where either is NaN.
    fn max(self, other: Self) -> Self;
    /// Nearest integer, ties to even, for magnitudes below 2^22; anything beyond.
    fn round(self) -> Self;
    /// `self * 2^n` for integral `n = round(x)`; +0 where `x < -126`, so that no subnormal arises.
    fn scale_pow2(self, n: Self, x: Self) -> Self;
    fn lt(self, other: Self) -> Self::Mask;
    fn and(a: Self::Mask, b: Self::Mask) -> Self::Mask;
    fn or(a: Self::Mask, b: Self::Mask) -> Self::Mask;
    fn all(mask: Self::Mask) -> bool;
    fn select(mask: Self::Mask, yes: Self, no: Self) -> Self;
    /// Transposes a square of `LANES` x `LANES`: `to[c * to_row + r] = from[r * from_row + c]`.
    ///
    /// # Safety
    /// Both squares must lie within their buffers and not overlap.
    unsafe fn transpose(from: *const f32, from_row: usize, to: *mut f32, to_row: usize);
    /// Hints that the cache line at `at` will be read soon. Any address will do.
    fn prefetch(at: *const f32);
}

/// What a 32-bit word of a product's operand holds.
pub(in crate::kernel) trait Words {
    /// The registers that words, and f32 sums of products, lie in.
    type V: Vector;
    /// Elements of a word: they follow each other along the product's depth.
    const PER_WORD: usize;

    /// `sum + left * right`, word by word; a word's products are added to its lane.
    fn dot(left: Self::V, right: Self::V, sum: Self::V) -> Self::V;
    /// `words` with every non-finite element replaced by zero whose partner in `by` is zero, so that what has no weight
    /// leaves no trace. It changes no finite element.
    fn sanitise(words: Self::V, by: Self::V) -> Self::V;
    /// `2^x` as precisely as the words deserve; +0 below 2^-126.
    fn exp2(x: Self::V) -> Self::V;
    /// Words of elements that follow each other along the depth.
    fn join(first: Self::V, second: Self::V) -> Self::V;
    /// Stores lanes that follow each other along the depth, from element `at`, a multiple of the lanes, of `to` on.
    ///
    /// # Safety
    /// `to` must be writable for `at + LANES` elements.
    unsafe fn store_run(lanes: Self::V, to: *mut f32, at: usize);
    /// A row's elements in words along the row, zeros up to the end of `to`.
    fn of_row(row: Row<'_>, to: &mut [f32]);
    /// Words across rows that follow each other along the depth, zeros up to the end of `to`. Where a word holds one
    /// element there is no second row.
    fn of_rows(first: Row<'_>, second: Row<'_>, to: &mut [f32]);
}

/// Words of one f32.
pub(in crate::kernel) struct Single<V>(PhantomData<V>);

impl<V: Vector> Words for Single<V> {
    type V = V;
    const PER_WORD: usize = 1;

    #[inline(always)]
    fn dot(left: V, right: V, sum: V) -> V {
        left.fma(right, sum)
    }

    #[inline(always)]
    fn sanitise(words: V, by: V) -> V {
        let (zero, infinity) = (V::splat(0.0), V::splat(f32::INFINITY));
        let finite = V::and(zero.sub(infinity).lt(words), words.lt(infinity));
        let weighed = V::or(by.lt(zero), zero.lt(by));
        V::select(V::or(finite, weighed), words, zero)
    }

    #[inline(always)]
    fn exp2(x: V) -> V {
        exp2(x)
    }

    #[inline(always)]
    fn join(first: V, _second: V) -> V {
        first
    }

    #[inline(always)]
    unsafe fn store_run(lanes: V, to: *mut f32, at: usize) {
        // SAFETY: the caller vouches for the elements.
        unsafe { lanes.store(to.add(at)) }
    }

    #[inline(always)]
    fn of_row(row: Row<'_>, to: &mut [f32]) {
        match row {
            Row::F32(row) => copy_padded::<V>(row, to),
            Row::Bf16(row) => widen_padded(row, to, |x| f32::from_bits(u32::from(x.to_bits()) << 16)),
            Row::F16(row) => widen_padded(row, to, |x| widen_f16(x.to_bits())),
        }
    }

    #[inline(always)]
    fn of_rows(first: Row<'_>, _second: Row<'_>, to: &mut [f32]) {
        Self::of_row(first, to);
    }
}

/// Copies `from` to the start of `to` and zeroes the rest. Short rows are common, and a call to copy each is not cheap.
#[inline(always)]
pub(super) fn copy_padded<V: Vector>(from: &[f32], to: &mut [f32]) {
    let whole = from.len().min(to.len()) / V::LANES * V::LANES;
    for at in (0..whole).step_by(V::LANES) {
        // SAFETY: both hold `whole` elements, a multiple of a vector.
        unsafe { V::load(from.as_ptr().add(at)).store(to.as_mut_ptr().add(at)) }
    }
    for (at, to) in to.iter_mut().enumerate().skip(whole) {
        *to = from.get(at).copied().unwrap_or(0.0);
    }
}

#[inline(always)]
fn widen_padded<E: Element>(from: &[E], to: &mut [f32], widen: impl Fn(E) -> f32) {
    let len = from.len().min(to.len());
    let (to, rest) = to.split_at_mut(len);
    for (to, from) in to.iter_mut().zip(from) {
        *to = widen(*from);
    }
    rest.fill(0.0);
}

/// Half precision to single without a branch, so that it vectorises: shifted into place, the exponent is off by 112.
#[inline(always)]
fn widen_f16(bits: u16) -> f32 {
    const BIAS: f32 = f32::from_bits((127 + 112) << 23);
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let value = (f32::from_bits(magnitude) * BIAS).to_bits();
    // Infinities and NaNs had the largest exponent, and must have it again.
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 | magnitude } else { value };
    f32::from_bits(special | (u32::from(bits & 0x8000) << 16))
}

/// Two bf16 in a word, the first in the low half.
#[inline(always)]
fn pair(first: bf16, second: bf16) -> f32 {
    f32::from_bits(u32::from(first.to_bits()) | (u32::from(second.to_bits()) << 16))
}

/// The elements of a row as bf16, those of other types rounded.
#[inline(always)]
fn bf16_at(row: Row<'_>, at: usize) -> bf16 {
    match row {
        Row::Bf16(row) => row.get(at).copied().unwrap_or_default(),
        Row::F32(row) => bf16::from_f32(row.get(at).copied().unwrap_or_default()),
        Row::F16(row) => bf16::from_f32(row.get(at).copied().unwrap_or_default().to_f32()),
    }
}

/// [`Words::of_row`] for pairs of bf16.
#[inline(always)]
fn pairs_of_row(row: Row<'_>, to: &mut [f32]) {
    if let Row::Bf16(row) = row {
        let (pairs, rest) = row.as_chunks::<2>();
        let len = pairs.len().min(to.len());
        let (to, tail) = to.split_at_mut(len);
        for (to, [first, second]) in to.iter_mut().zip(pairs) {
            *to = pair(*first, *second);
        }
        tail.fill(0.0);
        if let (Some(to), Some(last)) = (tail.first_mut(), rest.first()) {
            *to = pair(*last, bf16::ZERO);
        }
        return;
    }
    for (at, to) in to.iter_mut().enumerate() {
        *to = pair(bf16_at(row, 2 * at), bf16_at(row, 2 * at + 1));
    }
}

/// [`Words::of_rows`] for pairs of bf16.
#[inline(always)]
fn pairs_of_rows(first: Row<'_>, second: Row<'_>, to: &mut [f32]) {
    if let (Row::Bf16(first), Row::Bf16(second)) = (first, second)
        && first.len() == second.len()
    {
        let len = first.len().min(to.len());
        let (to, rest) = to.split_at_mut(len);
        for (to, (first, second)) in to.iter_mut().zip(first.iter().zip(second)) {
            *to = pair(*first, *second);
        }
        rest.fill(0.0);
        return;
    }
    for (at, to) in to.iter_mut().enumerate() {
        *to = pair(bf16_at(first, at), bf16_at(second, at));
    }
}

/// `2^x`, to about 2e-7 relative; +0 below 2^-126.
#[inline(always)]
pub(super) fn exp2<V: Vector>(x: V) -> V {
    power(x, 1.327_647e-3, [9.675_542e-3, 5.550_713_3e-2, 2.402_212e-1, 6.931_469_7e-1, 1.0])
}

/// `2^x`, to about 3e-6 relative: far below what rounding to bf16 leaves.
#[inline(always)]
fn exp2_for_bf16<V: Vector>(x: V) -> V {
    power(x, 9.570_1e-3, [5.591_786_3e-2, 2.402_474_5e-1, 6.931_218e-1, 9.999_993e-1])
}

/// A polynomial for the fraction, minimax on [-1/2, 1/2], and the integral part into the exponent.
#[inline(always)]
fn power<V: Vector, const N: usize>(x: V, leading: f32, coefficients: [f32; N]) -> V {
    let n = x.round();
    let f = x.sub(n);
    let mut p = V::splat(leading);
    for c in coefficients {
        p = p.fma(f, V::splat(c));
    }
    p.scale_pow2(n, x)
}

/// Hyperbolic tangent, to about 3e-7 relative: a polynomial in `x^2` near zero, `1 - 2 / (1 + e^2x)` elsewhere.
#[inline(always)]
pub(super) fn tanh<V: Vector>(x: V) -> V {
    const NEAR: f32 = 0.625;
    const COEFFICIENTS: [f32; 4] = [2.063_908e-2, -5.373_971e-2, 1.333_144_2e-1, -3.333_328e-1];
    let one = V::splat(1.0);
    let z = x.mul(x);
    let mut p = V::splat(-5.704_98e-3);
    for c in COEFFICIENTS {
        p = p.fma(z, V::splat(c));
    }
    let near = p.mul(z).fma(x, x);
    let e = exp2(x.mul(V::splat(2.0 * std::f32::consts::LOG2_E)));
    let far = one.sub(V::splat(2.0).div(e.add(one)));
    // Infinity has no power of two to divide by.
    let far = V::select(V::splat(16.0).lt(x), one, far);
    V::select(z.lt(V::splat(NEAR * NEAR)), near, far)
}
