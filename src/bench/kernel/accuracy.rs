//! How far results lie from the f64 reference.

use anyhow::bail;
use outboard_attention::kernel::{CpuKernel, Results};
use outboard_attention::reference::{self, Inputs, OutputGradient};
use outboard_attention::{Direction, TensorView};

use super::subject::{Batch, Subject};

/// Relative Frobenius distances from the reference on the same inputs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Errors {
    pub(crate) o: f64,
    /// The largest of those of dQ, dK and dV.
    pub(crate) gradients: f64,
}

/// Computes a subject both ways: forward, and backward from what forward gave each of them.
pub(crate) fn errors(kernel: &mut CpuKernel, subject: &Subject) -> anyhow::Result<Errors> {
    let (geometry, task, shapes) = (&subject.geometry, &subject.task, subject.shapes);
    let (q, k, v) = (subject.q.values(), subject.k.values(), subject.v.values());
    let d_o = subject.d_o.values();
    let inputs = Inputs {
        q: TensorView::contiguous("q", &q, shapes.q)?,
        k: TensorView::contiguous("k", &k, shapes.k)?,
        v: TensorView::contiguous("v", &v, shapes.v)?,
    };
    let d_o = TensorView::contiguous("d_o", &d_o, shapes.o)?;
    let forward = reference::forward(geometry, task, inputs)?;
    let d = reference::row_dots(d_o, &forward.o);
    let gradient = OutputGradient { d_o, lse: &forward.lse, d: &d };
    let backward = reference::backward(geometry, task, inputs, gradient)?;

    let mut both = [Batch::new(Direction::Forward, [subject]), Batch::new(Direction::Backward, [subject])];
    for batch in &mut both {
        batch.run(kernel)?;
    }
    match [both[0].results(), both[1].results()] {
        [[Results::Forward { o, .. }], [Results::Backward { dq, dk, dv }]] => {
            let gradients = [(dq, &backward.dq), (dk, &backward.dk), (dv, &backward.dv)];
            let gradients = gradients.map(|(actual, expected)| distance(actual, expected));
            Ok(Errors { o: distance(o, &forward.o), gradients: largest(&gradients) })
        }
        _ => bail!("the kernel gave results of another kind"),
    }
}

/// Frobenius norm of the difference over that of `expected`.
fn distance(actual: &[f32], expected: &[f64]) -> f64 {
    let squares = actual.iter().zip(expected).map(|(a, e)| (f64::from(*a) - e).powi(2));
    let difference: f64 = squares.sum();
    let size: f64 = expected.iter().map(|e| e * e).sum();
    (difference / size).sqrt()
}

/// NaN when one of them is.
fn largest(distances: &[f64]) -> f64 {
    distances.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_relative() {
        assert_eq!(distance(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert!((distance(&[3.0, 4.5], &[3.0, 4.0]) - 0.1).abs() < 1e-12);
        assert!(distance(&[f32::NAN], &[1.0]).is_nan());
        assert_eq!(largest(&[0.1, 0.3, 0.2]), 0.3);
        assert!(largest(&[0.1, f64::NAN, -f64::NAN, 0.2]).is_nan());
    }
}
