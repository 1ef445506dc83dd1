//! Logarithms by basic operations alone, so that every machine finds the same one.

use std::f64::consts::LN_2;

/// Bits of a double's fraction, and what is added to its exponent.
const FRACTION: u32 = 52;
const BIAS: u64 = 1023;
/// Terms of the series: each is less than a ninth of the one before.
const TERMS: u32 = 18;

/// The logarithm to base 2 of a positive whole number, to about 15 digits; 0 of zero.
pub(crate) fn log2(n: usize) -> f64 {
    if n <= 1 {
        return 0.0;
    }
    let bits = (n as f64).to_bits();
    let exponent = (bits >> FRACTION) - BIAS;
    let mantissa = f64::from_bits((BIAS << FRACTION) | (bits & ((1 << FRACTION) - 1)));
    // ln(m) = 2 (s + s^3 / 3 + s^5 / 5 + ...) with s = (m - 1) / (m + 1), which is at most a third.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let (mut sum, mut power) = (0.0, s);
    for term in 0..TERMS {
        sum += power / f64::from(2 * term + 1);
        power *= s * s;
    }
    exponent as f64 + 2.0 * sum / LN_2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_logarithm() {
        assert_eq!((log2(0), log2(1), log2(2), log2(1 << 40)), (0.0, 0.0, 1.0, 40.0));
        for n in [3, 5, 7, 127, 1000, 16383, 131_073, usize::MAX / 3, usize::MAX] {
            let (ours, theirs) = (log2(n), (n as f64).log2());
            assert!((ours - theirs).abs() < 1e-13 * theirs, "{n}: {ours} {theirs}");
        }
    }
}
