//! The one place that enters code compiled for an instruction set.

use super::Isa;
use super::vector::{Portable, Vector};
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};

/// An algorithm written over [`Vector`]. Its `run` must be `#[inline(always)]`, as must everything below it that
/// touches vectors, so that it is compiled with the instruction set of the wrapper that calls it.
pub(super) trait Program {
    type Output;

    /// Runs with register tiles of `MR` rows by `NV` vectors, `NV` one or two.
    fn run<V: Vector, const MR: usize, const NV: usize>(self) -> Self::Output;
}

/// Rows of a register tile on any instruction set; operands are padded to a multiple of it.
pub(super) const MAX_TILE_ROWS: usize = 8;

/// Runs `program` with the vectors of `isa`.
///
/// # Panics
/// When this machine lacks `isa`; whoever constructs a kernel checks that first.
#[inline]
pub(super) fn dispatch<P: Program>(isa: Isa, program: P) -> P::Output {
    assert!(isa.is_available(), "isa {isa} is not available on this machine");
    match isa {
        Isa::Portable => program.run::<Portable, 4, 1>(),
        // SAFETY: the assertion above found the features.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2(program) },
        // SAFETY: the assertion above found the features.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512(program) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 => unreachable!("not on this architecture"),
    }
}

/// # Safety
/// The machine must have AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<P: Program>(program: P) -> P::Output {
    // Twelve accumulators would fit sixteen registers, but not the compiler's schedule, which then spills one.
    program.run::<Avx2, 4, 2>()
}

/// # Safety
/// The machine must have AVX-512F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn avx512<P: Program>(program: P) -> P::Output {
    program.run::<Avx512, 8, 2>()
}
