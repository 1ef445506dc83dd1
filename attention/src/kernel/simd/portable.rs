//! The portable form: plain arrays, which any compiler can vectorise, and the model that other forms are tested by.

use half::bf16;

use super::{Vector, Words, exp2_for_bf16, pair, pairs_of_row, pairs_of_rows};
use crate::kernel::row::Row;

/// Lanes in a plain array.
#[derive(Clone, Copy)]
pub(in crate::kernel) struct Portable([f32; 4]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut out = self.0;
        for (out, other) in out.iter_mut().zip(other.0) {
            *out = f(*out, other);
        }
        Portable(out)
    }
}

/// Adding and subtracting it rounds an f32 of magnitude below 2^22 to an integer, which the sum's low bits hold.
const ROUNDER: f32 = 12_582_912.0;

impl Vector for Portable {
    const LANES: usize = 4;
    type Mask = [bool; 4];

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Portable([x; 4])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for 4 readable elements; an array of f32 has f32's alignment.
        Portable(unsafe { from.cast::<[f32; 4]>().read() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for 4 writable elements; an array of f32 has f32's alignment.
        unsafe { to.cast::<[f32; 4]>().write(self.0) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    // Rounded twice: a fused multiply-add without hardware is a slow library call, and the bits must not depend on it.
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        self.mul(b).add(c)
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn round(self) -> Self {
        self.add(Portable([ROUNDER; 4])).sub(Portable([ROUNDER; 4]))
    }

    #[inline(always)]
    fn scale_pow2(self, n: Self, x: Self) -> Self {
        let power = n.zip(n, |n, _| {
            let n = if n < 128.0 { n } else { 128.0 };
            f32::from_bits((n + ROUNDER).to_bits().wrapping_add(127) << 23)
        });
        Self::select(x.lt(Self::splat(-126.0)), Self::splat(0.0), self.mul(power))
    }

    #[inline(always)]
    fn lt(self, other: Self) -> [bool; 4] {
        let mut mask = [false; 4];
        for (mask, (a, b)) in mask.iter_mut().zip(self.0.iter().zip(other.0)) {
            *mask = *a < b;
        }
        mask
    }

    #[inline(always)]
    fn and(mut a: [bool; 4], b: [bool; 4]) -> [bool; 4] {
        for (a, b) in a.iter_mut().zip(b) {
            *a &= b;
        }
        a
    }

    #[inline(always)]
    fn or(mut a: [bool; 4], b: [bool; 4]) -> [bool; 4] {
        for (a, b) in a.iter_mut().zip(b) {
            *a |= b;
        }
        a
    }

    #[inline(always)]
    fn all(mask: [bool; 4]) -> bool {
        !mask.contains(&false)
    }

    #[inline(always)]
    fn select(mask: [bool; 4], yes: Self, no: Self) -> Self {
        let mut out = no.0;
        for (out, (mask, yes)) in out.iter_mut().zip(mask.iter().zip(yes.0)) {
            *out = if *mask { yes } else { *out };
        }
        Portable(out)
    }

    #[inline(always)]
    unsafe fn transpose(from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
        for row in 0..4 {
            for column in 0..4 {
                // SAFETY: the caller vouches for both 4 x 4 squares.
                unsafe { *to.add(column * to_row + row) = *from.add(row * from_row + column) }
            }
        }
    }

    #[inline(always)]
    fn prefetch(_at: *const f32) {}
}

/// Words of two bf16, with the arithmetic of a dot-product instruction: both products enter the lane's sum, the second
/// first, each rounded.
pub(in crate::kernel) struct PortablePairs;

/// The first and the second elements of words.
#[inline(always)]
fn split(words: Portable) -> (Portable, Portable) {
    let first = words.0.map(|word| f32::from_bits(word.to_bits() << 16));
    let second = words.0.map(|word| f32::from_bits(word.to_bits() & 0xffff_0000));
    (Portable(first), Portable(second))
}

impl Words for PortablePairs {
    type V = Portable;
    const PER_WORD: usize = 2;

    #[inline(always)]
    fn dot(left: Portable, right: Portable, sum: Portable) -> Portable {
        let ((left, left_second), (right, right_second)) = (split(left), split(right));
        left.fma(right, left_second.fma(right_second, sum))
    }

    #[inline(always)]
    fn sanitise(words: Portable, by: Portable) -> Portable {
        words.zip(by, |word, by| {
            let mut kept = word.to_bits();
            for half in [0xffff, 0xffff_0000] {
                let exponent = 0x7f80_7f80 & half;
                let weightless = by.to_bits() & 0x7fff_7fff & half == 0;
                if weightless && kept & exponent == exponent {
                    kept &= !half;
                }
            }
            f32::from_bits(kept)
        })
    }

    #[inline(always)]
    fn exp2(x: Portable) -> Portable {
        exp2_for_bf16(x)
    }

    #[inline(always)]
    fn join(first: Portable, second: Portable) -> Portable {
        first.zip(second, |first, second| pair(bf16::from_f32(first), bf16::from_f32(second)))
    }

    #[inline(always)]
    unsafe fn store_run(lanes: Portable, to: *mut f32, at: usize) {
        let (pairs, _) = lanes.0.as_chunks::<2>();
        for (n, [first, second]) in pairs.iter().enumerate() {
            let word = pair(bf16::from_f32(*first), bf16::from_f32(*second));
            // SAFETY: the caller vouches for the elements, two of which fill a word.
            unsafe { *to.add(at / 2 + n) = word }
        }
    }

    #[inline(always)]
    fn of_row(row: Row<'_>, to: &mut [f32]) {
        pairs_of_row(row, to);
    }

    #[inline(always)]
    fn of_rows(first: Row<'_>, second: Row<'_>, to: &mut [f32]) {
        pairs_of_rows(first, second, to);
    }
}
