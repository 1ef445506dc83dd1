//! `exp` and `ln` from basic arithmetic alone, so that their bits do not depend on the machine's math library.

use std::f64::consts::{LN_2, LOG2_E, SQRT_2};

/// Natural logarithm, to about 1e-13. Zero gives `-inf`, a negative number NaN.
pub(crate) fn ln(x: f64) -> f64 {
    if x.is_nan() || x < 0.0 {
        return f64::NAN;
    }
    if x == 0.0 || x.is_infinite() {
        return if x == 0.0 { f64::NEG_INFINITY } else { x };
    }
    let (bits, bias) =
        if x < f64::MIN_POSITIVE { ((x * 2f64.powi(54)).to_bits(), 1077) } else { (x.to_bits(), 1023) };
    let mut exponent = (bits >> 52) as i64 - bias;
    let mut mantissa = f64::from_bits(bits & 0x000f_ffff_ffff_ffff | 0x3ff0_0000_0000_0000);
    if mantissa > SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    // ln m = 2 atanh t with |t| < 0.172, so each further term shrinks by 34.
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let series = (0..9).rev().fold(0.0, |sum, n| sum * (t * t) + 1.0 / f64::from(2 * n + 1));
    exponent as f64 * LN_2 + 2.0 * t * series
}

/// `e^x` for `x <= 0`, to about 1e-14 relative; zero below -700.
pub(crate) fn exp(x: f64) -> f64 {
    if x < -700.0 {
        return 0.0;
    }
    let n = (x * LOG2_E).round();
    let f = (x * LOG2_E - n) * LN_2;
    let series = (1..15).rev().fold(1.0, |sum, k| 1.0 + sum * f / f64::from(k));
    series * 2f64.powi(n as i32)
}

#[cfg(test)]
mod tests {
    use super::{exp, ln};

    #[test]
    fn agrees_with_the_library() {
        for n in 1..4000 {
            let x = f64::from(n) * 0.173;
            assert!((ln(x) - x.ln()).abs() < 1e-13, "ln {x}");
            assert!((ln(1.0 / (x * x)) + 2.0 * x.ln()).abs() < 1e-12, "ln 1/{x}^2");
            let e = exp(-x);
            assert!((e - (-x).exp()).abs() <= 1e-12 * (-x).exp(), "exp -{x}");
        }
    }

    #[test]
    fn has_the_right_edges() {
        assert_eq!(ln(0.0), f64::NEG_INFINITY);
        assert_eq!(ln(1.0), 0.0);
        assert_eq!(ln(f64::INFINITY), f64::INFINITY);
        assert!((ln(5e-324) - 5e-324f64.ln()).abs() < 1e-9);
        assert!(ln(-1.0).is_nan() && ln(f64::NAN).is_nan() && exp(f64::NAN).is_nan());
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f64::NEG_INFINITY), 0.0);
    }
}
