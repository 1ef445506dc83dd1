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
        // Twelve independent chains fit every register file and hide the latency of the multiply-add.
        const CHAINS: usize = 12;
        let mut sums = [V::splat(0.0); CHAINS];
        let (a, b) = (V::splat(black_box(0.999_999)), V::splat(black_box(1e-6)));
        for _ in 0..self.iterations {
            for sum in &mut sums {
                *sum = sum.fma(a, b);
            }
        }
        let mut total = sums[0];
        for sum in &sums[1..] {
            total = total.add(*sum);
        }
        let mut lanes = [0.0f32; 16];
        // SAFETY: no vector has more than 16 lanes.
        unsafe { total.store(lanes.as_mut_ptr()) }
        black_box(lanes);
        (2 * CHAINS * V::LANES) as f64 * self.iterations as f64
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
