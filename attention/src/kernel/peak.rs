//! The ceilings to measure the kernel against.

use std::hint::black_box;

use super::Isa;
use super::simd::{Program, Vector, Words, dispatch};
use crate::DType;

struct PeakLoop {
    iterations: u64,
}

impl Program for PeakLoop {
    type Output = f64;

    #[inline(always)]
    fn run<W: Words, const MR: usize, const NV: usize>(self) -> f64 {
        // As many independent chains as any machine needs to hide the latency, and any has registers for.
        const CHAINS: usize = 12;
        let mut sums = [W::V::splat(0.0); CHAINS];
        // Read as a pair of bf16 they are small numbers too.
        let (a, b) = (W::V::splat(black_box(0.999_999)), W::V::splat(black_box(1e-6)));
        for _ in 0..self.iterations {
            for sum in &mut sums {
                *sum = W::dot(a, b, *sum);
            }
        }
        let mut total = W::V::splat(0.0);
        for sum in sums {
            total = total.add(sum);
        }
        let mut lanes = [0.0f32; 16];
        // SAFETY: no vector has more than 16 lanes.
        unsafe { total.store(lanes.as_mut_ptr()) }
        black_box(lanes);
        (2 * W::PER_WORD * CHAINS * W::V::LANES) as f64 * self.iterations as f64
    }
}

/// Does nothing but the multiply-adds that `isa` computes `dtype` with, in registers, and returns how many FLOPs it
/// did: timed by the caller, one core's peak.
///
/// # Panics
/// When this machine lacks `isa`.
pub fn peak_loop(isa: Isa, dtype: DType, iterations: u64) -> f64 {
    dispatch(isa, dtype, PeakLoop { iterations })
}

/// Does one simple integer operation after the other, each waiting for the one before: at one a cycle, as on every
/// current core, timed by the caller it is the core's clock. Returns how many.
pub fn clock_loop(iterations: u64) -> u64 {
    const STEPS: u64 = 16;
    let key = black_box(0x9e37_79b9_7f4a_7c15);
    let mut x = black_box(1u64);
    for _ in 0..iterations {
        for _ in 0..STEPS {
            x = x.rotate_left(7) ^ key;
        }
    }
    black_box(x);
    2 * iterations * STEPS
}
