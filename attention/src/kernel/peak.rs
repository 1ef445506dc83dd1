//! The ceiling to measure the kernel against.

use std::hint::black_box;

use super::Isa;
use super::dispatch::{Program, dispatch};
use super::vector::Vector;

struct FmaLoop {
    iterations: u64,
}

impl Program for FmaLoop {
    type Output = f64;

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NV: usize>(self) -> f64 {
        // The accumulators of a product: as many independent chains as the registers are good for.
        let mut sums = [[V::splat(0.0); NV]; MR];
        let (a, b) = (V::splat(black_box(0.999_999)), V::splat(black_box(1e-6)));
        for _ in 0..self.iterations {
            for sum in sums.as_flattened_mut() {
                *sum = sum.fma(a, b);
            }
        }
        let mut total = V::splat(0.0);
        for sum in sums.as_flattened() {
            total = total.add(*sum);
        }
        let mut lanes = [0.0f32; 16];
        // SAFETY: no vector has more than 16 lanes.
        unsafe { total.store(lanes.as_mut_ptr()) }
        black_box(lanes);
        (2 * MR * NV * V::LANES) as f64 * self.iterations as f64
    }
}

/// Does nothing but multiply-adds in registers, and returns how many FLOPs it did: timed by the caller, one core's
/// peak on `isa`.
///
/// # Panics
/// When this machine lacks `isa`.
pub fn fma_loop(isa: Isa, iterations: u64) -> f64 {
    dispatch(isa, FmaLoop { iterations })
}
