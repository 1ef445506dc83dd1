//! The few vector operations that the kernel's algorithms are written over, and their portable form.

/// A register of f32 lanes. Values of a type that needs an instruction set exist only in code that
/// [`dispatch`](super::dispatch) has entered after finding it.
pub(super) trait Vector: Copy {
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
    fn any(mask: Self::Mask) -> bool;
    fn select(mask: Self::Mask, yes: Self, no: Self) -> Self;
    /// Transposes a square of `LANES` x `LANES`: `to[c * to_row + r] = from[r * from_row + c]`.
    ///
    /// # Safety
    /// Both squares must lie within their buffers and not overlap.
    unsafe fn transpose(from: *const f32, from_row: usize, to: *mut f32, to_row: usize);
    /// Hints that the cache line at `at` will be read soon. Any address will do.
    fn prefetch(at: *const f32);
}

/// `2^x`, to about 2e-7 relative; +0 below 2^-126.
#[inline(always)]
pub(super) fn exp2<V: Vector>(x: V) -> V {
    const COEFFICIENTS: [f32; 5] = [9.675_542e-3, 5.550_713_3e-2, 2.402_212e-1, 6.931_469_7e-1, 1.0];
    let n = x.round();
    let f = x.sub(n);
    let mut p = V::splat(1.327_647_2e-3);
    for c in COEFFICIENTS {
        p = p.fma(f, V::splat(c));
    }
    p.scale_pow2(n, x)
}

/// Lanes in a plain array.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; 8]);

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
    const LANES: usize = 8;
    type Mask = [bool; 8];

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Portable([x; 8])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for 8 readable elements; an array of f32 has f32's alignment.
        Portable(unsafe { from.cast::<[f32; 8]>().read() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for 8 writable elements; an array of f32 has f32's alignment.
        unsafe { to.cast::<[f32; 8]>().write(self.0) }
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
        self.add(Portable([ROUNDER; 8])).sub(Portable([ROUNDER; 8]))
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
    fn lt(self, other: Self) -> [bool; 8] {
        let mut mask = [false; 8];
        for (mask, (a, b)) in mask.iter_mut().zip(self.0.iter().zip(other.0)) {
            *mask = *a < b;
        }
        mask
    }

    #[inline(always)]
    fn and(mut a: [bool; 8], b: [bool; 8]) -> [bool; 8] {
        for (a, b) in a.iter_mut().zip(b) {
            *a &= b;
        }
        a
    }

    #[inline(always)]
    fn or(mut a: [bool; 8], b: [bool; 8]) -> [bool; 8] {
        for (a, b) in a.iter_mut().zip(b) {
            *a |= b;
        }
        a
    }

    #[inline(always)]
    fn any(mask: [bool; 8]) -> bool {
        mask.contains(&true)
    }

    #[inline(always)]
    fn select(mask: [bool; 8], yes: Self, no: Self) -> Self {
        let mut out = no.0;
        for (out, (mask, yes)) in out.iter_mut().zip(mask.iter().zip(yes.0)) {
            *out = if *mask { yes } else { *out };
        }
        Portable(out)
    }

    #[inline(always)]
    unsafe fn transpose(from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
        for row in 0..8 {
            for column in 0..8 {
                // SAFETY: the caller vouches for both 8 x 8 squares.
                unsafe { *to.add(column * to_row + row) = *from.add(row * from_row + column) }
            }
        }
    }

    #[inline(always)]
    fn prefetch(_at: *const f32) {}
}
