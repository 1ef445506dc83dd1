//! The reference itself: its gradients against finite differences of its outputs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::*;
use outboard_attention::reference::{self, Inputs, OutputGradient};
use outboard_attention::{DType, HeadGeometry, HeadShape, Span, Task};

/// `sum(dO * O)`, whose gradients dQ, dK and dV are.
fn loss(geometry: &HeadGeometry, task: &Task, tensors: [&Tensor; 3], d_o: &Tensor) -> f64 {
    let [q, k, v] = tensors.map(Tensor::view);
    let out = reference::forward(geometry, task, Inputs { q, k, v }).unwrap();
    reference::row_dots(d_o.view(), &out.o).iter().sum()
}

#[test]
fn gradients_are_finite_differences() {
    let mut random = Random(41);
    for _ in 0..12 {
        let shape = HeadShape {
            q_heads: 4,
            kv_heads: 2,
            head_dim: 3,
            v_head_dim: 5,
            scale: 0.6,
            dtype: DType::F32,
            softcap: None,
        };
        let geometry = HeadGeometry::try_from(shape).unwrap();
        let task = random_task(&mut random, &geometry, 9);
        let shapes = task.shapes(&geometry);
        let [mut q, mut k, mut v, d_o] =
            [shapes.q, shapes.k, shapes.v, shapes.o].map(|s| Tensor::random(&mut random, s, 0, 1.0));
        let inputs = Inputs { q: q.view(), k: k.view(), v: v.view() };
        let out = reference::forward(&geometry, &task, inputs).unwrap();
        let d = reference::row_dots(d_o.view(), &out.o);
        let gradient = OutputGradient { d_o: d_o.view(), lse: &out.lse, d: &d };
        let back = reference::backward(&geometry, &task, inputs, gradient).unwrap();
        for (n, gradient) in [back.dq, back.dk, back.dv].into_iter().enumerate() {
            for (index, expected) in gradient.into_iter().enumerate() {
                let mut at = |step: f32| {
                    let x = &mut [&mut q, &mut k, &mut v][n].data[index];
                    let before = *x;
                    *x += step;
                    let moved = *x;
                    let loss = loss(&geometry, &task, [&q, &k, &v], &d_o);
                    [&mut q, &mut k, &mut v][n].data[index] = before;
                    (f64::from(moved), loss)
                };
                let ((x0, low), (x1, high)) = (at(-1e-3), at(1e-3));
                let slope = (high - low) / (x1 - x0);
                assert!((slope - expected).abs() < 1e-5, "tensor {n} at {index}: {slope} against {expected}");
            }
        }
    }
}

#[test]
fn one_key_is_its_own_value() {
    let mut random = Random(42);
    let geometry = HeadGeometry::standard(2, 1, 4).unwrap();
    let mask = outboard_attention::Mask::causal(5, 1);
    let task = Task::new(DOCUMENT, Span::to(5), Span::to(1), Span::to(1), &mask).unwrap();
    let case = Case::new(&mut random, geometry, task, 1.0);
    let o = &case.reference(outboard_attention::Direction::Forward)[0];
    for (n, o) in o.iter().enumerate() {
        assert_eq!(*o, f64::from(case.v.view().row(0, 0)[n % 4]));
    }
}
