//! The one place that enters code compiled for an instruction set.

use super::portable::{Portable, PortablePairs};
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512, Avx512Pairs};
use super::{Single, Words};
use crate::DType;
use crate::kernel::Isa;

/// An algorithm written over [`Words`]. Its `run` must be `#[inline(always)]`, as must everything below it that
/// touches vectors, so that it is compiled with the instruction set of the wrapper that calls it.
pub(in crate::kernel) trait Program {
    type Output;

    /// Runs with register tiles of `MR` rows by `NV` vectors: `MR` divides [`MAX_TILE_ROWS`], and `NV` is one or two.
    fn run<W: Words, const MR: usize, const NV: usize>(self) -> Self::Output;
}

/// Rows of a register tile on any instruction set; operands are padded to a multiple of it.
pub(in crate::kernel) const MAX_TILE_ROWS: usize = 8;

/// Runs `program` with the registers of `isa`, and the words that it computes `dtype` with.
///
/// # Panics
/// When this machine lacks `isa`; whoever constructs a kernel checks that first.
#[inline]
pub(in crate::kernel) fn dispatch<P: Program>(isa: Isa, dtype: DType, program: P) -> P::Output {
    assert!(isa.is_available(), "isa {isa} is not available on this machine");
    match (isa, dtype) {
        (Isa::Portable, DType::Bf16) => program.run::<PortablePairs, 8, 1>(),
        (Isa::Portable, _) => program.run::<Single<Portable>, 8, 1>(),
        // SAFETY: the assertion above found the features.
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, _) => unsafe { avx2(program) },
        // SAFETY: the assertion above found the features.
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512Bf16, DType::Bf16) => unsafe { avx512_pairs(program) },
        // SAFETY: the assertion above found the features.
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx512Bf16, _) => unsafe { avx512(program) },
        #[cfg(not(target_arch = "x86_64"))]
        (Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16, _) => unreachable!("not on this architecture"),
    }
}

/// # Safety
/// The machine must have AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<P: Program>(program: P) -> P::Output {
    // Twelve accumulators would fit sixteen registers, but not the compiler's schedule, which then spills one.
    program.run::<Single<Avx2>, 4, 2>()
}

/// # Safety
/// The machine must have AVX-512F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn avx512<P: Program>(program: P) -> P::Output {
    program.run::<Single<Avx512>, 8, 2>()
}

/// # Safety
/// The machine must have AVX-512F, BW, VL and BF16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma")]
unsafe fn avx512_pairs<P: Program>(program: P) -> P::Output {
    program.run::<Avx512Pairs, 8, 2>()
}
