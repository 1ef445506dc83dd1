//! Merges and sums at home.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::*;
use outboard_attention::merge::{
    Corner, GradientPartial, OutputMerge, TensorViewMut, add_gradients, row_dots, sum_group,
};
use outboard_attention::{InvalidAttention, TensorView};

const INF: f32 = f32::INFINITY;

/// Merges partial rows `(o, lse)` of one head of two dimensions.
fn merged(parts: &[([f32; 2], f32)]) -> ([f32; 2], f32) {
    let (mut o, mut lse) = ([f32::NAN; 2], [f32::NAN]);
    let mut merge = OutputMerge::new(
        TensorViewMut::contiguous("o", &mut o, [1, 1, 2]).unwrap(),
        TensorViewMut::contiguous("lse", &mut lse, [1, 1, 1]).unwrap(),
    )
    .unwrap();
    for (o, lse) in parts {
        let lse = [*lse];
        let o = TensorView::contiguous("o", o, [1, 1, 2]).unwrap();
        merge.add(Corner::default(), o, TensorView::contiguous("lse", &lse, [1, 1, 1]).unwrap()).unwrap();
    }
    (o, lse[0])
}

#[test]
fn rows_without_keys_are_neutral() {
    assert_eq!(merged(&[]), ([0.0, 0.0], -INF));
    assert_eq!(merged(&[([0.0, 0.0], -INF), ([0.0, 0.0], -INF)]), ([0.0, 0.0], -INF));
    let row = ([0.1, -3.7], 1.3);
    assert_eq!(merged(&[row]), row);
    assert_eq!(merged(&[([0.0, 0.0], -INF), row, ([0.0, 0.0], -INF)]), row);
}

#[test]
fn a_single_output_is_copied_bit_by_bit() {
    let (o, lse) = merged(&[([-0.0, f32::from_bits(1)], -900.0)]);
    assert_eq!((o.map(f32::to_bits), lse), ([(-0.0f32).to_bits(), 1], -900.0));
}

#[test]
fn outputs_weigh_by_their_lse() {
    let (o, lse) = merged(&[([1.0, 0.0], 2.0), ([0.0, 1.0], 2.0)]);
    assert_eq!(o, [0.5, 0.5]);
    assert!((lse - (2.0 + std::f32::consts::LN_2)).abs() < 1e-6);
    let (o, lse) = merged(&[([1.0, 2.0], 3e4), ([5.0, 5.0], -3e4)]);
    assert_eq!((o, lse), ([1.0, 2.0], 3e4));
    let (o, _) = merged(&[([1.0, f32::NAN], 0.0), ([1.0, 1.0], 0.0)]);
    assert!(o[1].is_nan() && o[0] == 1.0);
}

#[test]
fn outputs_land_where_they_belong() {
    let mut o = vec![0.0; 5 * 3 * 2];
    let mut lse = vec![0.0; 5 * 3];
    let mut merge = OutputMerge::new(
        TensorViewMut::contiguous("o", &mut o, [5, 3, 2]).unwrap(),
        TensorViewMut::contiguous("lse", &mut lse, [5, 3, 1]).unwrap(),
    )
    .unwrap();
    let (part, part_lse) = ([1.0, 2.0, 3.0, 4.0], [7.0, 8.0]);
    let part = TensorView::contiguous("o", &part, [2, 1, 2]).unwrap();
    let part_lse = TensorView::contiguous("lse", &part_lse, [2, 1, 1]).unwrap();
    merge.add(Corner { row: 3, head: 1 }, part, part_lse).unwrap();
    let outside = merge.add(Corner { row: 4, head: 1 }, part, part_lse).unwrap_err();
    assert_eq!(
        outside.to_string(),
        "rows of the partial result [4, 6) reaches outside rows of the home buffer [0, 5)"
    );
    assert!(merge.add(Corner { row: 0, head: 3 }, part, part_lse).is_err());
    assert_eq!((&o[20..22], &o[26..28]), (&[1.0, 2.0][..], &[3.0, 4.0][..]));
    assert_eq!((lse[10], lse[13], lse[14]), (7.0, 8.0, -INF));
    assert_eq!(o.iter().sum::<f32>(), 10.0);
}

#[test]
fn gradients_are_summed_in_two_levels_in_plan_order() {
    // Sums in which the order shows: 1 is lost next to 2^25 of the same sign, and not when 2^25 is taken away first.
    let big = 33_554_432.0f32;
    let values = [[1.0f32], [big], [-big], [1.0]];
    let partial = |n: usize, group, position| GradientPartial {
        group,
        position,
        at: Corner::default(),
        values: TensorView::contiguous("dk", &values[n], [1, 1, 1]).unwrap(),
    };
    let sum = |partials: Vec<GradientPartial<'_>>| {
        let mut home = [0.0];
        let mut view = TensorViewMut::contiguous("dk", &mut home, [1, 1, 1]).unwrap();
        add_gradients(&mut view, partials).unwrap();
        home[0]
    };
    let one_group = [partial(0, 0, 0), partial(1, 0, 1), partial(2, 0, 2), partial(3, 0, 3)];
    assert_eq!(sum(one_group.to_vec()), 1.0);
    let two_groups = [partial(1, 0, 0), partial(2, 0, 1), partial(0, 1, 0), partial(3, 1, 1)];
    assert_eq!(sum(two_groups.to_vec()), 2.0);
    let shuffled = [two_groups[2], two_groups[1], two_groups[3], two_groups[0]];
    assert_eq!(sum(shuffled.to_vec()), 2.0);
}

#[test]
fn a_group_summed_on_the_server_or_at_home_gives_the_same_bits() {
    let mut random = Random(31);
    let shapes_at = [([4, 2, 3], 0, 0), ([6, 1, 3], 2, 1), ([3, 2, 3], 5, 0), ([8, 2, 3], 0, 0)];
    let tensors: Vec<_> = shapes_at.iter().map(|(s, _, _)| Tensor::random(&mut random, *s, 2, 1.0)).collect();
    let partials: Vec<_> = tensors
        .iter()
        .zip(&shapes_at)
        .enumerate()
        .map(|(n, (tensor, (_, row, head)))| GradientPartial {
            group: n as u32 / 3,
            position: n as u32 % 3,
            at: Corner { row: *row, head: *head },
            values: tensor.view(),
        })
        .collect();
    let home = |partials: Vec<GradientPartial<'_>>| {
        let mut home = vec![0.0; 9 * 2 * 4];
        let mut view = TensorViewMut::new("dk", &mut home, [8, 2, 3], 9).unwrap();
        add_gradients(&mut view, partials).unwrap();
        home.iter().map(|x: &f32| x.to_bits()).collect::<Vec<_>>()
    };
    let (at, shape, sum) = sum_group(&partials[..3], 3).unwrap();
    assert_eq!((at, shape), (Corner { row: 0, head: 0 }, [8, 2, 3]));
    let group =
        GradientPartial { at, values: TensorView::contiguous("sum", &sum, shape).unwrap(), ..partials[0] };
    assert_eq!(home(vec![partials[3], group]), home(partials));
}

#[test]
fn gradients_must_fit() {
    let values = [0.0; 6];
    let values = TensorView::contiguous("dk", &values, [1, 2, 3]).unwrap();
    let partial = GradientPartial { group: 0, position: 0, at: Corner { row: 0, head: 1 }, values };
    let mut home = vec![0.0; 12];
    let mut view = TensorViewMut::contiguous("dk", &mut home, [2, 2, 3]).unwrap();
    assert!(matches!(add_gradients(&mut view, vec![partial]), Err(InvalidAttention::OutsideSpan { .. })));
    let mut home = vec![0.0; 16];
    let mut view = TensorViewMut::contiguous("dk", &mut home, [2, 2, 4]).unwrap();
    assert!(matches!(add_gradients(&mut view, vec![partial]), Err(InvalidAttention::ShapeMismatch { .. })));
    assert!(TensorViewMut::new("dk", &mut home, [3, 2, 3], 6).is_err());
}

#[test]
fn row_dots_sum_each_head() {
    let mut random = Random(32);
    for dim in [1, 7, 8, 40, 129] {
        let (a, b) = (
            Tensor::random(&mut random, [3, 2, dim], 5, 1.0),
            Tensor::random(&mut random, [3, 2, dim], 0, 1.0),
        );
        let dots = row_dots(a.view(), b.view()).unwrap();
        for (n, dot) in dots.iter().enumerate() {
            let (a, b) = (a.view().row(n / 2, n % 2), b.view().row(n / 2, n % 2));
            let exact: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            assert!((f64::from(*dot) - exact).abs() < 1e-5 * dim as f64);
        }
    }
}
