//! The kernel on a GPU against the f64 reference. Without a GPU these tests do nothing but say so; with
//! OUTBOARD_REQUIRE_GPU=1 they fail instead.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../../../attention/tests/common/mod.rs"]
mod common;

use std::sync::Mutex;

use common::{Case, DOCUMENT, Random, bits, check_close, random_geometry, random_mask, random_task, tensors};
use outboard_attention::kernel::{KernelTask, Results};
use outboard_attention::{BandSlice, DType, Direction, HeadGeometry, HeadShape, Mask, MaskPart, Span, Task};
use outboard_cuda::{CudaConfig, CudaError, CudaKernel};

/// The device that OUTBOARD_TEST_DEVICE names, or the first.
fn config() -> CudaConfig {
    let device = std::env::var("OUTBOARD_TEST_DEVICE").map_or(0, |n| n.parse().unwrap());
    let libraries = std::env::var_os("OUTBOARD_CUDA_LIBRARIES");
    let libraries = libraries.map(|all| std::env::split_paths(&all).collect()).unwrap_or_default();
    CudaConfig { libraries, ..CudaConfig::new(device) }
}

fn kernel(config: CudaConfig) -> Option<CudaKernel> {
    match CudaKernel::new(config) {
        Ok(kernel) => Some(kernel),
        Err(error) if std::env::var_os("OUTBOARD_REQUIRE_GPU").is_none() => {
            println!("not run: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn run(kernel: &mut CudaKernel, batch: Vec<KernelTask<'_>>) -> Vec<Vec<Vec<f32>>> {
    let slots: Mutex<Vec<Option<Results>>> = Mutex::new(batch.iter().map(|_| None).collect());
    let done = |index: usize, results| {
        assert!(slots.lock().unwrap()[index].replace(results).is_none(), "task {index} was done twice");
    };
    kernel.run(batch, &done).unwrap();
    slots.into_inner().unwrap().into_iter().map(|r| tensors(r.expect("every task is done"))).collect()
}

fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2e-3,
        _ => 1.2e-2,
    }
}

fn check(case: &Case, direction: Direction, actual: &[Vec<f32>]) {
    let names: &[_] = if direction == Direction::Forward { &["o", "lse"] } else { &["dq", "dk", "dv"] };
    for ((name, actual), expected) in names.iter().zip(actual).zip(case.reference(direction)) {
        let tolerance = if *name == "lse" { 1e-5 } else { tolerance(case.geometry.dtype()) };
        check_close(&format!("{name} of {:?} {:?}", case.geometry, case.task), actual, &expected, tolerance);
    }
}

fn geometry(group: usize, kv_heads: usize, dim: usize, dtype: DType) -> HeadGeometry {
    let shape = HeadGeometry::standard(group * kv_heads, kv_heads, dim).unwrap().shape();
    HeadShape { dtype, ..shape }.try_into().unwrap()
}

/// Checks both directions, in one batch and alone, and that bits do not depend on it.
fn check_all(kernel: &mut CudaKernel, cases: &[Case]) {
    for direction in [Direction::Forward, Direction::Backward] {
        let batch = run(kernel, cases.iter().map(|case| case.kernel_task(direction)).collect());
        for (case, actual) in cases.iter().zip(&batch) {
            check(case, direction, actual);
            let alone = run(kernel, vec![case.kernel_task(direction)]).remove(0);
            if direction == Direction::Forward || kernel.is_deterministic() {
                assert!(
                    bits(&alone) == bits(actual),
                    "{direction} bits depend on the batch: {:?}",
                    case.task
                );
            } else {
                check(case, direction, &alone);
            }
        }
    }
}

#[test]
fn random_tasks_agree_with_the_reference() {
    let Some(mut kernel) = kernel(config()) else { return };
    let mut random = Random(21);
    let mut cases = Vec::new();
    while cases.len() < 40 {
        let shape = random_geometry(&mut random).shape();
        let dtype = if shape.dtype == DType::F32 { DType::Bf16 } else { shape.dtype };
        let group = random.pick(&[1, 4, 8]);
        let geometry =
            HeadShape { dtype, softcap: None, q_heads: shape.kv_heads * group, ..shape }.try_into().unwrap();
        let tokens = random.within(1..=400);
        let task = random_task(&mut random, &geometry, tokens);
        cases.push(Case::new(&mut random, geometry, task, 1.0));
    }
    check_all(&mut kernel, &cases);
}

#[test]
fn masks_of_every_kind_agree_with_the_reference() {
    let Some(mut kernel) = kernel(config()) else { return };
    let mut random = Random(22);
    let mut cases = Vec::new();
    for round in 0..24 {
        let geometry = geometry(2, 2, 64, DType::Bf16);
        let tokens = random.within(200..=900);
        let mask = random_mask(&mut random, tokens, 2);
        let all = Span::to(tokens);
        let q = if round % 2 == 0 { all } else { random.span(all) };
        if let Ok(task) = Task::new(DOCUMENT, q, all, Span::to(2), &mask) {
            cases.push(Case::new(&mut random, geometry, task, 1.0));
        }
    }
    check_all(&mut kernel, &cases);
}

#[test]
fn long_tails_agree_with_the_reference() {
    let Some(mut kernel) = kernel(config()) else { return };
    let mut random = Random(23);
    let cases: Vec<Case> = [(1, 9000), (64, 4032), (130, 6000), (300, 300), (5000, 5000), (4500, 4700)]
        .into_iter()
        .map(|(rows, keys)| {
            let geometry = geometry(1, 1, 64, DType::Bf16);
            let mask = Mask::causal(keys, 1);
            let task =
                Task::new(DOCUMENT, Span::at(keys - rows, rows), Span::to(keys), Span::to(1), &mask).unwrap();
            Case::new(&mut random, geometry, task, 1.0)
        })
        .collect();
    check_all(&mut kernel, &cases);
}

/// Scores about -200 let LSE fall below the logarithm of the smallest float; with such keys a kernel of cuDNN has given
/// NaN.
#[test]
fn very_negative_scores_give_no_nan() {
    let Some(mut kernel) = kernel(config()) else { return };
    let mut random = Random(24);
    let mut cases = Vec::new();
    for (rows, keys) in [(64, 448), (192, 192), (448, 448), (10, 64), (64, 64)] {
        let geometry = geometry(4, 1, 128, DType::Bf16);
        let mask = Mask::causal(keys, 1);
        let task =
            Task::new(DOCUMENT, Span::at(keys - rows, rows), Span::to(keys), Span::to(1), &mask).unwrap();
        let mut case = Case::new(&mut random, geometry, task, 1.0);
        // The first element of every query and key makes each score about -226.
        for (tensor, value) in [(&mut case.q, 50.0), (&mut case.k, -51.0)] {
            let (stride, dim) = (tensor.stride, tensor.shape[2]);
            for head in tensor.data.chunks_mut(stride).flat_map(|token| token.chunks_mut(dim)) {
                head[0] = value;
            }
            *tensor = tensor.clone().rounded(DType::Bf16);
        }
        let case = case.with_own_lse();
        assert!(case.lse.data.iter().all(|lse| *lse < -88.7));
        cases.push(case);
    }
    check_all(&mut kernel, &cases);
}

#[test]
fn rows_without_keys_give_zero_and_minus_infinity() {
    let Some(mut kernel) = kernel(config()) else { return };
    let mut random = Random(25);
    let geometry = geometry(2, 2, 64, DType::Bf16);
    let slice = BandSlice::new(Span::at(40, 30), Span::at(10, 90), None, Some(-20)).unwrap();
    let mask = Mask::new(vec![MaskPart { kv_heads: Span::at(1, 1), slice }]).unwrap();
    let task = Task::new(DOCUMENT, Span::to(100), Span::to(100), Span::to(2), &mask).unwrap();
    let case = Case::new(&mut random, geometry, task, 1.0);
    let forward = run(&mut kernel, vec![case.kernel_task(Direction::Forward)]).remove(0);
    assert!(forward[0][..40 * 4 * 64].iter().all(|x| x.to_bits() == 0));
    assert!(forward[1][..40 * 4].iter().all(|x| *x == f32::NEG_INFINITY));
    check_all(&mut kernel, &[case]);
}

#[test]
fn a_batch_beyond_the_memory_goes_in_waves() {
    let Some(mut kernel) = kernel(CudaConfig { batch_bytes: 64 << 20, ..config() }) else { return };
    let mut random = Random(26);
    let geometry = geometry(4, 2, 64, DType::Bf16);
    let cases: Vec<Case> = (0..30)
        .map(|_| {
            let task = random_task(&mut random, &geometry, 500);
            Case::new(&mut random, geometry, task, 1.0)
        })
        .collect();
    check_all(&mut kernel, &cases);

    let tokens = 100_000;
    let task = Task::new(DOCUMENT, Span::to(tokens), Span::to(tokens), Span::to(2), &Mask::causal(tokens, 2))
        .unwrap();
    let needed = kernel.task_bytes(&geometry, Direction::Forward, &task);
    assert!(needed > 64 << 20);
}

/// Where tensors lie decides no bit.
#[test]
fn tensors_in_place_and_moved_give_equal_bits() {
    let Some(mut in_place) = kernel(config()) else { return };
    let Some(mut moved) = kernel(CudaConfig { in_place: false, ..config() }) else { return };
    let mut random = Random(28);
    for (group, kv_heads, dim, dtype) in
        [(4, 2, 128, DType::Bf16), (1, 3, 64, DType::F16), (8, 1, 64, DType::Bf16), (2, 4, 128, DType::Bf16)]
    {
        let geometry = geometry(group, kv_heads, dim, dtype);
        let cases: Vec<Case> = [(300, 300), (128, 900), (1, 77), (513, 640)]
            .into_iter()
            .map(|(rows, keys)| {
                let heads = Span::to(kv_heads);
                let q = Span::at(keys - rows, rows);
                let task =
                    Task::new(DOCUMENT, q, Span::to(keys), heads, &Mask::causal(keys, kv_heads)).unwrap();
                Case::new(&mut random, geometry, task, 1.0)
            })
            .collect();
        for direction in [Direction::Forward, Direction::Backward] {
            let batch = |kernel: &mut CudaKernel| {
                run(kernel, cases.iter().map(|case| case.kernel_task(direction)).collect())
            };
            let (a, b) = (batch(&mut in_place), batch(&mut moved));
            for ((case, a), b) in cases.iter().zip(&a).zip(&b) {
                check(case, direction, a);
                let ordered = direction == Direction::Forward || in_place.is_deterministic();
                assert!(!ordered || bits(a) == bits(b), "{direction} bits differ for {:?}", case.task);
            }
        }
    }
}

#[test]
fn what_is_not_computed_is_refused() {
    let Some(mut kernel) = kernel(config()) else { return };
    let mut random = Random(27);
    let good = geometry(2, 1, 64, DType::Bf16);
    for bad in
        [HeadShape { dtype: DType::F32, ..good.shape() }, HeadShape { softcap: Some(5.0), ..good.shape() }]
    {
        let geometry: HeadGeometry = bad.try_into().unwrap();
        let case = Case::new(&mut random, geometry, common::causal_task(20, 1), 1.0);
        let error = kernel.run(vec![case.kernel_task(Direction::Forward)], &|_, _| panic!("nothing is done"));
        assert!(matches!(error, Err(CudaError::DType { .. } | CudaError::Softcap { .. })), "{error:?}");
    }
    let case = Case::new(&mut random, good, common::causal_task(20, 1), 1.0);
    check_all(&mut kernel, &[case]);
}
