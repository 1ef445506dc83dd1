//! Attention sinks: one learned logit per query head that takes part in the softmax of every row and adds no value.
//!
//! A sink is in no task. It enters once, at home, after the last output is merged; the backward pass then takes it
//! from LSE and D, which are those with the sink.

use super::{Corner, TensorViewMut};
use crate::math::{exp, ln};
use crate::{InvalidAttention, TensorView};

/// Sinks that cannot be applied, or tensors that they do not fit.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidSinks {
    /// Not one logit for each query head.
    #[error(
        "there are {actual} sink logits for {q_heads} query heads; each head needs one (-inf for no sink)"
    )]
    Count {
        /// Logits given.
        actual: usize,
        /// Query heads of the tensors.
        q_heads: usize,
    },
    /// A logit that is NaN or `+inf`.
    #[error("the sink logit of query head {q_head} is {logit}; it must be a number below infinity")]
    Logit {
        /// The query head.
        q_head: usize,
        /// What was given.
        logit: f32,
    },
    /// Tensors that do not fit each other.
    #[error(transparent)]
    Tensor(#[from] InvalidAttention),
}

/// Lets the sinks take part in every row of the final O `[rows, q heads, v_head_dim]` and LSE `[rows, q heads, 1]`:
/// LSE becomes `log(exp(LSE) + exp(z))` and O is weighed by `exp(LSE - new LSE)`, where `z` is the head's logit of
/// `sinks`, on the scale of scaled scores (natural logarithm).
///
/// To be called once, since each call adds the sinks again. O stays zero in a row without keys, and its LSE becomes
/// `z`. A logit of `-inf` means no sink and leaves its head as it is, bit by bit.
///
/// # Errors
/// [`InvalidSinks::Count`] unless there is one logit for each query head, [`InvalidSinks::Logit`] for NaN or `+inf`,
/// [`InvalidSinks::Tensor`] when O and LSE differ in rows or heads. Nothing is changed then.
pub fn apply_sinks(
    o: &mut TensorViewMut<'_>,
    lse: &mut TensorViewMut<'_>,
    sinks: &[f32],
) -> Result<(), InvalidSinks> {
    let [rows, q_heads, _] = o.shape;
    check(sinks, q_heads)?;
    let expected = [rows, q_heads, 1];
    if lse.shape != expected {
        let actual = lse.shape;
        return Err(InvalidAttention::ShapeMismatch { tensor: "lse", actual, expected }.into());
    }
    for row in 0..rows {
        for (head, sink) in sinks.iter().enumerate() {
            let at = Corner { row, head };
            apply(o.row_mut(at, 1), &mut lse.row_mut(at, 1)[0], *sink);
        }
    }
    Ok(())
}

/// Gradient of each sink logit: `-sum of exp(z - LSE) * D` over all rows of its head, summed in f64 in row order.
/// `lse` `[rows, q heads, 1]` is that with the sink, as [`apply_sinks`] leaves it, and `d` of the same shape is
/// `rowsum(dO * O)` of the O with the sink. Zero for a logit of `-inf`.
///
/// # Errors
/// [`InvalidSinks::Count`] unless there is one logit for each query head, [`InvalidSinks::Logit`] for NaN or `+inf`,
/// [`InvalidSinks::Tensor`] unless LSE and D are of the shape given above.
pub fn sink_gradient(
    lse: TensorView<'_>,
    d: TensorView<'_>,
    sinks: &[f32],
) -> Result<Vec<f32>, InvalidSinks> {
    let [rows, q_heads, _] = lse.shape();
    check(sinks, q_heads)?;
    lse.expect("lse", [rows, q_heads, 1])?;
    d.expect("d", [rows, q_heads, 1])?;
    let mut sums = vec![0.0f64; q_heads];
    for row in 0..rows {
        let values = lse.token(row).iter().zip(d.token(row));
        for ((sum, sink), (lse, d)) in sums.iter_mut().zip(sinks).zip(values) {
            if *sink != f32::NEG_INFINITY {
                *sum -= exp(f64::from(*sink) - f64::from(*lse)) * f64::from(*d);
            }
        }
    }
    Ok(sums.into_iter().map(|sum| sum as f32).collect())
}

fn check(sinks: &[f32], q_heads: usize) -> Result<(), InvalidSinks> {
    if sinks.len() != q_heads {
        return Err(InvalidSinks::Count { actual: sinks.len(), q_heads });
    }
    match sinks.iter().position(|z| z.is_nan() || *z == f32::INFINITY) {
        Some(q_head) => Err(InvalidSinks::Logit { q_head, logit: sinks[q_head] }),
        None => Ok(()),
    }
}

fn apply(o: &mut [f32], lse: &mut f32, sink: f32) {
    if sink == f32::NEG_INFINITY {
        return;
    }
    if *lse == f32::NEG_INFINITY {
        *lse = sink;
        return;
    }
    let (keys, sink) = (f64::from(*lse), f64::from(sink));
    // Not f64::max, which would lose a NaN.
    let max = if sink > keys { sink } else { keys };
    let (keys, sink) = (exp(keys - max), exp(sink - max));
    let sum = keys + sink;
    *lse = (max + ln(sum)) as f32;
    for o in o {
        *o = (f64::from(*o) * keys / sum) as f32;
    }
}
