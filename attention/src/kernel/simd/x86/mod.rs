//! Vectors of x86-64.

mod avx2;
mod avx512;

pub(in crate::kernel) use avx2::Avx2;
pub(in crate::kernel) use avx512::{Avx512, Avx512Pairs};
