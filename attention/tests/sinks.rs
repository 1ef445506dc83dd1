//! Attention sinks against a softmax in f64 that has one more logit.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::*;
use outboard_attention::merge::{
    Corner, InvalidSinks, OutputMerge, TensorViewMut, apply_sinks, row_dots, sink_gradient,
};
use outboard_attention::reference::{self, Inputs, OutputGradient};
use outboard_attention::{HeadGeometry, InvalidAttention, Span, Task, TensorView};

const INF: f32 = f32::INFINITY;

/// Attention with sinks, written out: Q, K, V and the logits as plain numbers.
#[derive(Clone)]
struct Naive {
    geometry: HeadGeometry,
    task: Task,
    /// Q, K, V, contiguous.
    tensors: [Vec<f64>; 3],
    sinks: Vec<f64>,
}

impl Naive {
    /// O and LSE.
    fn forward(&self) -> (Vec<f64>, Vec<f64>) {
        let shapes = self.task.shapes(&self.geometry);
        let ([rows, q_heads, dim], [keys, kv_heads, v_dim]) = (shapes.q, shapes.v);
        let [q, k, v] = &self.tensors;
        let (mut o, mut lse) = (vec![0.0; rows * q_heads * v_dim], vec![0.0; rows * q_heads]);
        for at in 0..rows * q_heads {
            let (row, head) = (at / q_heads, at % q_heads);
            let kv_head = head / (q_heads / kv_heads);
            let visible = |key: usize| {
                let (i, j) = (self.task.q().start() + row, self.task.kv().start() + key);
                let mut slices = self.task.mask().slices_of(self.task.kv_heads().start() + kv_head);
                slices.any(|slice| slice.keys_of(i).contains(j))
            };
            let mut sum = self.sinks[head].exp();
            for key in (0..keys).filter(|key| visible(*key)) {
                let of_key = key * kv_heads + kv_head;
                let product: f64 = (0..dim).map(|d| q[at * dim + d] * k[of_key * dim + d]).sum();
                let weight = (product * f64::from(self.geometry.scale())).exp();
                sum += weight;
                (0..v_dim).for_each(|d| o[at * v_dim + d] += weight * v[of_key * v_dim + d]);
            }
            if sum > 0.0 {
                o[at * v_dim..][..v_dim].iter_mut().for_each(|o| *o /= sum);
            }
            lse[at] = sum.ln();
        }
        (o, lse)
    }

    /// `sum(dO * O)`.
    fn loss(&self, d_o: &Tensor) -> f64 {
        d_o.data.iter().zip(self.forward().0).map(|(d, o)| f64::from(*d) * o).sum()
    }

    /// Derivative of the loss by one number, from differences on both sides.
    fn slope(&self, d_o: &Tensor, number: impl Fn(&mut Naive) -> &mut f64) -> f64 {
        let at = |step: f64| {
            let mut moved = self.clone();
            *number(&mut moved) += step;
            moved.loss(d_o)
        };
        (at(1e-5) - at(-1e-5)) / 2e-5
    }
}

fn view_mut(data: &mut [f32], shape: [usize; 3]) -> TensorViewMut<'_> {
    TensorViewMut::contiguous("home", data, shape).unwrap()
}

/// O and LSE with sinks, as home computes them from a result without.
fn with_sinks(o: &[f64], lse: &[f64], shape: [usize; 3], sinks: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let narrow = |x: &[f64]| x.iter().map(|x| *x as f32).collect::<Vec<f32>>();
    let (mut o, mut lse) = (narrow(o), narrow(lse));
    let row = [shape[0], shape[1], 1];
    apply_sinks(&mut view_mut(&mut o, shape), &mut view_mut(&mut lse, row), sinks).unwrap();
    (o, lse)
}

#[test]
fn gradients_with_sinks_are_finite_differences() {
    let mut random = Random(61);
    for _ in 0..20 {
        let geometry = HeadGeometry::standard(4, 2, 3).unwrap();
        let task = random_task(&mut random, &geometry, 9);
        let shapes = task.shapes(&geometry);
        let [q, k, v, d_o] =
            [shapes.q, shapes.k, shapes.v, shapes.o].map(|s| Tensor::random(&mut random, s, 0, 1.0));
        let mut sinks: Vec<f32> = (0..shapes.q[1]).map(|_| 2.0 * random.value()).collect();
        if random.below(3) == 0 {
            sinks[0] = -INF;
        }
        let widen = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
        let tensors = [&q, &k, &v].map(|t| widen(&t.data));
        let naive = Naive { geometry, task: task.clone(), tensors, sinks: widen(&sinks) };

        let inputs = Inputs { q: q.view(), k: k.view(), v: v.view() };
        let out = reference::forward(&geometry, &task, inputs).unwrap();
        let (o, lse) = with_sinks(&out.o, &out.lse, shapes.o, &sinks);
        let (expected_o, expected_lse) = naive.forward();
        check_close("o", &o, &expected_o, 1e-6);
        check_close("lse", &lse, &expected_lse, 1e-6);

        let d = row_dots(d_o.view(), TensorView::contiguous("o", &o, shapes.o).unwrap()).unwrap();
        let row = |data| TensorView::contiguous("row", data, shapes.row).unwrap();
        let d_sinks = sink_gradient(row(&lse), row(&d), &sinks).unwrap();
        for (head, actual) in d_sinks.iter().enumerate() {
            let expected = match sinks[head] == -INF {
                true => 0.0,
                false => naive.slope(&d_o, |naive| &mut naive.sinks[head]),
            };
            assert!((f64::from(*actual) - expected).abs() < 1e-5, "dz {head}: {actual}, not {expected}");
        }

        // A row without keys or sink has no cell that its LSE of -inf could spoil.
        let gradient = OutputGradient { d_o: d_o.view(), lse: &widen(&lse), d: &widen(&d) };
        let back = reference::backward(&geometry, &task, inputs, gradient).unwrap();
        for (n, gradient) in [back.dq, back.dk, back.dv].into_iter().enumerate() {
            for (index, actual) in gradient.into_iter().enumerate() {
                let expected = naive.slope(&d_o, |naive| &mut naive.tensors[n][index]);
                assert!((actual - expected).abs() < 1e-5, "tensor {n} at {index}: {actual}, not {expected}");
            }
        }
    }
}

#[test]
fn sinks_join_after_the_last_output() {
    let mut random = Random(62);
    let geometry = HeadGeometry::standard(2, 1, 4).unwrap();
    let task = causal_task(12, 1);
    let shapes = task.shapes(&geometry);
    let [q, k, v] = [shapes.q, shapes.k, shapes.v].map(|s| Tensor::random(&mut random, s, 0, 1.0));
    let sinks = [0.7, -1.5];
    let (mut o, mut lse) = (vec![0.0; shapes.o.iter().product()], vec![0.0; shapes.row.iter().product()]);
    let mut merge = OutputMerge::new(view_mut(&mut o, shapes.o), view_mut(&mut lse, shapes.row)).unwrap();
    for kv in [Span::to(5), Span::at(5, 7)] {
        let part = Task::new(DOCUMENT, task.q(), kv, Span::to(1), task.mask()).unwrap();
        let [k, v] = [&k, &v].map(|t| t.view().part(kv, Span::to(1)).unwrap());
        let out = reference::forward(&geometry, &part, Inputs { q: q.view(), k, v }).unwrap();
        let narrow = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect::<Vec<f32>>();
        let (o, lse) = (narrow(out.o), narrow(out.lse));
        let o = TensorView::contiguous("o", &o, shapes.o).unwrap();
        merge.add(Corner::default(), o, TensorView::contiguous("lse", &lse, shapes.row).unwrap()).unwrap();
    }
    apply_sinks(&mut view_mut(&mut o, shapes.o), &mut view_mut(&mut lse, shapes.row), &sinks).unwrap();
    let widen = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
    let tensors = [&q, &k, &v].map(|t| widen(&t.data));
    let (expected_o, expected_lse) = Naive { geometry, task, tensors, sinks: widen(&sinks) }.forward();
    check_close("o", &o, &expected_o, 1e-6);
    check_close("lse", &lse, &expected_lse, 1e-6);
}

/// One row of one head of two dimensions.
fn one(o: [f32; 2], lse: f32, sink: f32) -> ([f32; 2], f32) {
    let (o, lse) = with_sinks(&o.map(f64::from), &[f64::from(lse)], [1, 1, 2], &[sink]);
    ([o[0], o[1]], lse[0])
}

#[test]
fn edges_are_exact() {
    let row = ([0.1, -3.7], 1.3);
    assert_eq!(one(row.0, row.1, -INF), row, "no sink");
    assert_eq!(one([0.0, 0.0], -INF, 0.4), ([0.0, 0.0], 0.4), "no keys");
    assert_eq!(one([0.0, 0.0], -INF, -INF), ([0.0, 0.0], -INF), "neither");
    assert_eq!(one([1.0, -2.0], 3.0, 3.0).0, [0.5, -1.0]);
    assert_eq!(one([1.0, -2.0], f32::MIN, f32::MAX), ([0.0, -0.0], f32::MAX));
    assert_eq!(one([1.0, -2.0], f32::MAX, f32::MIN), ([1.0, -2.0], f32::MAX));
    let (o, lse) = one([1.0, 2.0], f32::NAN, 0.0);
    assert!(o[0].is_nan() && lse.is_nan(), "NaN stays visible");
}

#[test]
fn strided_tensors_keep_what_lies_between() {
    let mut o = vec![7.0; 2 * 6];
    let mut lse = vec![7.0, 7.0, 9.0, 7.0, 7.0, 9.0];
    apply_sinks(
        &mut TensorViewMut::new("o", &mut o, [2, 2, 2], 6).unwrap(),
        &mut TensorViewMut::new("lse", &mut lse, [2, 2, 1], 3).unwrap(),
        &[7.0, -INF],
    )
    .unwrap();
    assert_eq!(o, [3.5, 3.5, 7.0, 7.0, 7.0, 7.0].repeat(2));
    assert_eq!((lse[1], lse[2], lse[0]), (7.0, 9.0, (7.0 + std::f64::consts::LN_2) as f32));
    let (lse, d) = (TensorView::new("lse", &lse, [2, 2, 1], 3).unwrap(), [1.0, 2.0, 3.0, 4.0]);
    let d = TensorView::contiguous("d", &d, [2, 2, 1]).unwrap();
    let gradient = sink_gradient(lse, d, &[7.0, -INF]).unwrap();
    assert!((gradient[0] + 2.0).abs() < 1e-5 && gradient[1] == 0.0);
}

#[test]
fn what_does_not_fit_is_refused() {
    let (mut o, mut lse) = (vec![1.0; 8], vec![1.0; 4]);
    let mut apply = |shape: [usize; 3], sinks: &[f32]| {
        let result = apply_sinks(
            &mut TensorViewMut::new("o", &mut o, [2, 2, 2], 4).unwrap(),
            &mut TensorViewMut::new("lse", &mut lse, shape, shape[1]).unwrap(),
            sinks,
        );
        assert!(o.iter().chain(&lse).all(|x| *x == 1.0), "an error changes nothing");
        result.unwrap_err()
    };
    let count = InvalidSinks::Count { actual: 1, q_heads: 2 };
    assert_eq!(apply([2, 2, 1], &[0.0]), count);
    assert_eq!(apply([2, 2, 1], &[0.0, INF]), InvalidSinks::Logit { q_head: 1, logit: INF });
    assert_eq!(
        apply([2, 2, 1], &[f32::NAN, 0.0]).to_string(),
        "the sink logit of query head 0 is NaN; it must be a number below infinity"
    );
    let shape = InvalidAttention::ShapeMismatch { tensor: "lse", actual: [1, 2, 1], expected: [2, 2, 1] };
    assert_eq!(apply([1, 2, 1], &[0.0; 2]), InvalidSinks::Tensor(shape));

    let rows = [0.0; 4];
    let row = |shape| TensorView::contiguous("row", &rows, shape).unwrap();
    assert_eq!(sink_gradient(row([2, 2, 1]), row([2, 2, 1]), &[0.0]), Err(count));
    assert!(sink_gradient(row([2, 2, 1]), row([4, 1, 1]), &[0.0; 2]).is_err());
    assert!(sink_gradient(row([1, 2, 2]), row([1, 2, 2]), &[0.0; 2]).is_err());
    assert!(sink_gradient(row([2, 2, 1]), row([2, 2, 1]), &[0.0, INF]).is_err());
}
