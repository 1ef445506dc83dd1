//! The CPU kernel against the f64 reference, for every instruction set of this machine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::*;
use outboard_attention::kernel::{CpuKernel, Isa, KernelConfig, KernelError, KernelTask, Results, fma_loop};
use outboard_attention::{
    BandSlice, DType, Direction, HeadGeometry, HeadShape, InvalidAttention, Mask, MaskPart, Span, Task,
};

const TOLERANCE: f64 = 3e-6;

#[test]
fn random_tasks_agree_with_the_reference() {
    let mut random = Random(1);
    for _ in 0..90 {
        let geometry = random_geometry(&mut random);
        // Keep the reference affordable: long documents for small heads.
        let work = geometry.q_heads() * (geometry.head_dim() + geometry.v_head_dim());
        let longest = ((4e7 / work as f64).sqrt() as usize).clamp(20, 700);
        let tokens = random.within(1..=longest);
        let task = random_task(&mut random, &geometry, tokens);
        let case = Case::new(&mut random, geometry, task, 1.0);
        for isa in Isa::available() {
            check(isa, &case, TOLERANCE);
        }
    }
}

#[test]
fn every_head_dim_works() {
    let mut random = Random(2);
    for dim in 1..=256 {
        let v_head_dim = 1 + (dim * 37) % 256;
        let shape =
            HeadShape { q_heads: 2, kv_heads: 1, head_dim: dim, v_head_dim, scale: 0.1, dtype: DType::F32 };
        let case = Case::new(&mut random, shape.try_into().unwrap(), causal_task(19, 1), 1.0);
        for isa in Isa::available() {
            check(isa, &case, TOLERANCE);
        }
    }
}

#[test]
fn short_shards_of_every_row_count_work() {
    let mut random = Random(3);
    let geometry = HeadGeometry::standard(1, 1, 16).unwrap();
    for rows in 1..70 {
        let mask = Mask::causal(400, 1);
        let task =
            Task::new(DOCUMENT, Span::at(400 - rows, rows), Span::to(400), Span::to(1), &mask).unwrap();
        let case = Case::new(&mut random, geometry, task, 1.0);
        for isa in Isa::available() {
            check(isa, &case, TOLERANCE);
        }
    }
}

#[test]
fn a_head_cut_into_backward_chunks_agrees() {
    let mut random = Random(4);
    let geometry = HeadGeometry::standard(8, 1, 8).unwrap();
    let all = Span::to(700);
    let slices = [
        BandSlice::new(all, all, Some(-90), Some(0)).unwrap(),
        BandSlice::new(Span::at(500, 100), Span::at(0, 64), None, Some(-91)).unwrap(),
    ];
    let parts = slices.map(|slice| MaskPart { kv_heads: Span::to(1), slice });
    let task = Task::new(DOCUMENT, all, all, Span::to(1), &Mask::new(parts.to_vec()).unwrap()).unwrap();
    let case = Case::new(&mut random, geometry, task, 1.0);
    for isa in Isa::available() {
        check(isa, &case, TOLERANCE);
    }
}

#[test]
fn rows_without_keys_give_zero_and_minus_infinity() {
    let mut random = Random(5);
    let geometry = HeadGeometry::standard(4, 2, 24).unwrap();
    let slice = BandSlice::new(Span::at(40, 30), Span::at(10, 90), None, Some(-20)).unwrap();
    let mask = Mask::new(vec![MaskPart { kv_heads: Span::at(1, 1), slice }]).unwrap();
    let task = Task::new(DOCUMENT, Span::to(100), Span::to(100), Span::to(2), &mask).unwrap();
    let case = Case::new(&mut random, geometry, task, 1.0);
    for isa in Isa::available() {
        check(isa, &case, TOLERANCE);
        let forward = run_one(isa, &case, Direction::Forward);
        let backward = run_one(isa, &case, Direction::Backward);
        assert!(forward[0][..40 * 4 * 24].iter().all(|x| x.to_bits() == 0));
        assert!(forward[1][..40 * 4].iter().all(|x| *x == f32::NEG_INFINITY));
        assert!(backward[0][..40 * 4 * 24].iter().all(|x| *x == 0.0));
        assert!(backward[1].chunks(2 * 24).all(|key| key[..24].iter().all(|x| *x == 0.0)));
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let mut random = Random(6);
    for (size, tolerance) in [(30.0, 2e-4), (1e3, 0.2)] {
        let geometry = HeadGeometry::standard(2, 1, 64).unwrap();
        let case = Case::new(&mut random, geometry, causal_task(300, 1), size);
        for isa in Isa::available() {
            // Weights depend on differences of scores in the thousands or millions, so f32 leaves little accuracy;
            // the reference's LSE tells where a row's weight lies all the same.
            let actual = run_one(isa, &case, Direction::Forward);
            let expected = case.reference(Direction::Forward);
            check_close("lse", &actual[1], &expected[1], 1e-5);
            check_close("o", &actual[0], &expected[0], tolerance);
            for gradient in run_one(isa, &case, Direction::Backward) {
                assert!(gradient.iter().all(|x| x.is_finite()));
            }
        }
    }
}

#[test]
fn nan_and_infinity_neither_panic_nor_stay_hidden() {
    let mut random = Random(7);
    let geometry = HeadGeometry::standard(4, 2, 40).unwrap();
    let clean = Case::new(&mut random, geometry, causal_task(260, 2), 1.0);
    for isa in Isa::available() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for tensor in 0..6 {
                let mut case = clean.clone();
                let Case { q, k, v, d_o, lse, d, .. } = &mut case;
                let data = &mut [q, k, v, d_o, lse, d][tensor].data;
                let middle = data.len() / 2;
                data[middle..][..3].fill(value);
                let forward = run_one(isa, &case, Direction::Forward);
                run_one(isa, &case, Direction::Backward);
                if tensor < 3 && value.is_nan() {
                    assert!(forward[0].iter().any(|x| x.is_nan()), "{isa} hides a NaN of tensor {tensor}");
                }
            }
        }
    }
}

fn refusal(task: KernelTask<'_>) -> KernelError {
    let mut kernel = kernel(Isa::Portable, 1);
    kernel.run(vec![task], &|_, _| unreachable!("nothing may be computed")).unwrap_err()
}

#[test]
fn errors_name_the_field() {
    let mut random = Random(8);
    let geometry = HeadGeometry::standard(2, 1, 8).unwrap();
    let case = Case::new(&mut random, geometry, causal_task(10, 1), 1.0);

    let mut task = case.kernel_task(Direction::Forward);
    task.geometry = HeadShape { dtype: DType::Bf16, ..geometry.shape() }.try_into().unwrap();
    let error = refusal(task);
    assert_eq!(error, KernelError::UnsupportedDType { index: 0, dtype: DType::Bf16 });
    assert!(error.to_string().contains("geometry.dtype bf16"), "{error}");

    let other = Case::new(&mut random, geometry, causal_task(11, 1), 1.0);
    for (direction, name) in [(Direction::Forward, "q"), (Direction::Backward, "q")] {
        let mut task = case.kernel_task(direction);
        task.operands = other.operands(direction);
        let error = refusal(task);
        let KernelError::Invalid { source: InvalidAttention::ShapeMismatch { tensor, .. }, .. } = error
        else {
            panic!("{error}");
        };
        assert_eq!(tensor, name);
    }

    let mut task = case.kernel_task(Direction::Backward);
    task.results = Results::zeroed(&case.task, &geometry, Direction::Forward);
    assert!(refusal(task).to_string().contains("operands are backward, results are forward"));

    let mut task = case.kernel_task(Direction::Forward);
    if let Results::Forward { lse, .. } = &mut task.results {
        lse.pop();
    }
    assert!(refusal(task).to_string().contains("results.lse holds 19 elements; the task needs 20"));

    let config = KernelConfig { isa: Isa::Portable, threads: 0 };
    assert_eq!(CpuKernel::new(config).unwrap_err(), KernelError::NoThreads);
}

#[test]
fn one_bad_task_stops_the_batch() {
    let mut random = Random(9);
    let geometry = HeadGeometry::standard(2, 1, 8).unwrap();
    let case = Case::new(&mut random, geometry, causal_task(10, 1), 1.0);
    let good = case.kernel_task(Direction::Forward);
    let mut bad = case.kernel_task(Direction::Forward);
    bad.geometry = HeadGeometry::standard(1, 1, 8).unwrap();
    let mut kernel = kernel(Isa::Portable, 1);
    let error = kernel.run(vec![good, bad], &|_, _| unreachable!("nothing may be computed")).unwrap_err();
    assert!(error.to_string().starts_with("task 1 of the batch: q has shape"), "{error}");
    kernel.run(Vec::new(), &|_, _| unreachable!("there is nothing")).unwrap();
}

#[test]
fn isas_have_names_and_do_their_flops() {
    for isa in Isa::available() {
        assert_eq!(isa.to_string().parse::<Isa>().unwrap(), isa);
        assert!(fma_loop(isa, 10) >= 10.0 * 2.0 * 4.0 * 8.0);
        assert_eq!(kernel(isa, 1).numerics_id(), format!("cpu-{isa}-f32-r1"));
    }
    assert!("sse9".parse::<Isa>().unwrap_err().to_string().contains("sse9"));
    assert!(Isa::detect().is_available());
}
