//! Vectors of AVX-512F, and words of bf16 pairs with AVX512_BF16.

use std::arch::x86_64::*;
use std::mem::transmute;

use super::super::{Vector, Words, exp2_for_bf16, pairs_of_row, pairs_of_rows};
use crate::kernel::row::Row;

/// Sixteen lanes.
#[derive(Clone, Copy)]
pub(in crate::kernel) struct Avx512(__m512);

impl Vector for Avx512 {
    const LANES: usize = 16;
    type Mask = __mmask16;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: code over this type runs only where dispatch found AVX-512F.
        Avx512(unsafe { _mm512_set1_ps(x) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: as in splat; the caller vouches for 16 readable elements.
        Avx512(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as in splat; the caller vouches for 16 writable elements.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: as in splat.
        Avx512(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: as in splat.
        Avx512(unsafe { _mm512_sub_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: as in splat.
        Avx512(unsafe { _mm512_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        // SAFETY: as in splat.
        Avx512(unsafe { _mm512_div_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: as in splat.
        Avx512(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: as in splat.
        Avx512(unsafe { _mm512_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: as in splat.
        Avx512(unsafe { _mm512_roundscale_ps::<0>(self.0) })
    }

    #[inline(always)]
    fn scale_pow2(self, n: Self, x: Self) -> Self {
        // SAFETY: as in splat.
        unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, _mm512_set1_ps(-126.0));
            Avx512(_mm512_maskz_scalef_ps(keep, self.0, n.0))
        }
    }

    #[inline(always)]
    fn lt(self, other: Self) -> __mmask16 {
        // SAFETY: as in splat.
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, other.0) }
    }

    #[inline(always)]
    fn and(a: __mmask16, b: __mmask16) -> __mmask16 {
        a & b
    }

    #[inline(always)]
    fn or(a: __mmask16, b: __mmask16) -> __mmask16 {
        a | b
    }

    #[inline(always)]
    fn all(mask: __mmask16) -> bool {
        mask == u16::MAX
    }

    #[inline(always)]
    fn select(mask: __mmask16, yes: Self, no: Self) -> Self {
        // SAFETY: as in splat.
        Avx512(unsafe { _mm512_mask_mov_ps(no.0, mask, yes.0) })
    }

    #[inline(always)]
    unsafe fn transpose(from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
        // SAFETY: as in splat; the caller vouches for both 16 x 16 squares.
        unsafe {
            let mut r = [_mm512_setzero_ps(); 16];
            for (row, r) in r.iter_mut().enumerate() {
                *r = _mm512_loadu_ps(from.add(row * from_row));
            }
            // Pairs, then quadruples of rows within 128-bit lanes, then the lanes themselves.
            let mut t = r;
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            let mut u = t;
            for b in [0, 4, 8, 12] {
                for half in 0..2 {
                    let (x, y) = (_mm512_castps_pd(t[b + half]), _mm512_castps_pd(t[b + half + 2]));
                    u[b + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
                    u[b + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
                }
            }
            for i in 0..4 {
                t[i] = _mm512_shuffle_f32x4::<0x88>(u[i], u[i + 4]);
                t[i + 4] = _mm512_shuffle_f32x4::<0xdd>(u[i], u[i + 4]);
                t[i + 8] = _mm512_shuffle_f32x4::<0x88>(u[i + 8], u[i + 12]);
                t[i + 12] = _mm512_shuffle_f32x4::<0xdd>(u[i + 8], u[i + 12]);
            }
            for i in 0..8 {
                r[i] = _mm512_shuffle_f32x4::<0x88>(t[i], t[i + 8]);
                r[i + 8] = _mm512_shuffle_f32x4::<0xdd>(t[i], t[i + 8]);
            }
            for (column, r) in r.iter().enumerate() {
                _mm512_storeu_ps(to.add(column * to_row), *r);
            }
        }
    }

    #[inline(always)]
    fn prefetch(at: *const f32) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

/// Words of two bf16 for the dot-product instruction.
pub(in crate::kernel) struct Avx512Pairs;

impl Words for Avx512Pairs {
    type V = Avx512;
    const PER_WORD: usize = 2;

    #[inline(always)]
    fn dot(left: Avx512, right: Avx512, sum: Avx512) -> Avx512 {
        // SAFETY: code over this type runs only where dispatch found AVX-512F, BW, VL and BF16; 512 bits are 512 bits.
        unsafe {
            let left = transmute::<__m512, __m512bh>(left.0);
            let right = transmute::<__m512, __m512bh>(right.0);
            Avx512(_mm512_dpbf16_ps(sum.0, left, right))
        }
    }

    #[inline(always)]
    fn sanitise(words: Avx512, by: Avx512) -> Avx512 {
        // SAFETY: as in dot.
        unsafe {
            let (words, by) = (_mm512_castps_si512(words.0), _mm512_castps_si512(by.0));
            let exponent = _mm512_set1_epi16(0x7f80);
            let finite = _mm512_cmpneq_epi16_mask(_mm512_and_si512(words, exponent), exponent);
            let weighed = _mm512_test_epi16_mask(by, _mm512_set1_epi16(0x7fff));
            Avx512(_mm512_castsi512_ps(_mm512_maskz_mov_epi16(finite | weighed, words)))
        }
    }

    #[inline(always)]
    fn exp2(x: Avx512) -> Avx512 {
        exp2_for_bf16(x)
    }

    #[inline(always)]
    fn join(first: Avx512, second: Avx512) -> Avx512 {
        // SAFETY: as in dot.
        unsafe {
            let first = _mm512_cvtepu16_epi32(transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(first.0)));
            let second = _mm512_cvtepu16_epi32(transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(second.0)));
            Avx512(_mm512_castsi512_ps(_mm512_or_si512(first, _mm512_slli_epi32::<16>(second))))
        }
    }

    #[inline(always)]
    unsafe fn store_run(lanes: Avx512, to: *mut f32, at: usize) {
        // SAFETY: as in dot; the caller vouches for 16 writable elements of 2 bytes.
        unsafe {
            let words = transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(lanes.0));
            _mm256_storeu_si256(to.cast::<u16>().add(at).cast(), words);
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
