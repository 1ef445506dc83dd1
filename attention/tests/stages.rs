//! Forward tasks whose keys arrive in parts, results in the place of operands, and the working memory that a batch takes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::*;
use outboard_attention::kernel::{
    CpuKernel, Isa, KEY_BLOCK, KernelConfig, KernelError, KernelTask, Operands, QueryInput, Results,
    task_workspace,
};
use outboard_attention::{Direction, HeadGeometry, HeadShape, Span};

/// Computes a case in stages that end at the given positions.
fn run_in_stages(kernel: &mut CpuKernel, case: &Case, ends: &[usize]) -> Vec<Vec<f32>> {
    let mut state = kernel.start(&case.geometry, &case.task).unwrap();
    let heads = Span::to(case.task.kv_heads().len());
    for end in ends {
        let keys = Span::new(state.next_key(), *end).unwrap();
        let there = Span::at(keys.start() - case.task.kv().start(), keys.len());
        // Only what has arrived is handed over.
        let (k, v) = (case.k.part(there, heads), case.v.part(there, heads));
        let operands = Operands::Stage { q: case.q.any(), keys, k: k.any(), v: v.any() };
        let results = Results::Stage(state);
        let task = KernelTask { geometry: case.geometry, task: &case.task, operands, results };
        match compute(kernel, task) {
            Results::Stage(next) => state = next,
            Results::Forward { o, lse } => {
                assert_eq!(*end, case.task.kv().end(), "only the last stage finishes");
                return vec![o, lse];
            }
            Results::Backward { .. } => panic!("a stage is forward"),
        }
    }
    panic!("the last stage did not finish")
}

fn compute(kernel: &mut CpuKernel, task: KernelTask<'_>) -> Results {
    let slot = std::sync::Mutex::new(None);
    kernel.run(vec![task], &|_, results| *slot.lock().unwrap() = Some(results)).unwrap();
    slot.into_inner().unwrap().expect("the task is done")
}

/// Some of the block borders within the task's keys, and their end.
fn random_ends(random: &mut Random, kv: Span) -> Vec<usize> {
    let borders = (kv.start() + 1..kv.end()).filter(|end| end.is_multiple_of(KEY_BLOCK));
    let mut ends: Vec<usize> = borders.filter(|_| random.below(2) == 0).collect();
    ends.push(kv.end());
    ends
}

#[test]
fn arrival_leaves_no_trace() {
    let mut random = Random(31);
    for _ in 0..cases(60) {
        let geometry = random_geometry(&mut random);
        let tokens = random.within(1..=900);
        let task = random_task(&mut random, &geometry, tokens);
        let size = random.pick(&[1.0, 8.0]);
        let case = Case::new(&mut random, geometry, task, size);
        let ends = random_ends(&mut random, case.task.kv());
        for isa in isas() {
            let whole = bits(&run_one(isa, &case, Direction::Forward));
            for threads in [1, 2] {
                let staged = run_in_stages(&mut kernel(isa, threads), &case, &ends);
                assert!(bits(&staged) == whole, "{isa}, stages to {ends:?} of {:?}", case.task);
            }
        }
    }
}

#[test]
fn stages_must_follow_each_other() {
    let mut random = Random(32);
    let geometry = HeadGeometry::standard(2, 1, 16).unwrap();
    let case = Case::new(&mut random, geometry, causal_task(400, 1), 1.0);
    let mut kernel = kernel(Isa::Portable, 1);
    for (start, end, good) in
        [(0, 128, true), (0, 384, true), (0, 400, true), (0, 100, false), (128, 256, false), (0, 0, false)]
    {
        let keys = Span::new(start, end).unwrap();
        let part = |tensor: &Tensor| tensor.part(keys, Span::to(1));
        let (k, v) = (part(&case.k), part(&case.v));
        let state = kernel.start(&geometry, &case.task).unwrap();
        let operands = Operands::Stage { q: case.q.any(), keys, k: k.any(), v: v.any() };
        let results = Results::Stage(state);
        let task = KernelTask { geometry, task: &case.task, operands, results };
        let outcome = kernel.run(vec![task], &|_, _| {});
        match outcome {
            Ok(()) => assert!(good, "{keys}"),
            Err(KernelError::BadStage { expected: 0, .. }) => assert!(!good, "{keys}"),
            Err(error) => panic!("{keys}: {error}"),
        }
    }
    let state = kernel.start(&geometry, &case.task).unwrap();
    let mut task = case.kernel_task(Direction::Forward);
    task.results = Results::Stage(state);
    let error = kernel.run(vec![task], &|_, _| {}).unwrap_err();
    assert_eq!(error, KernelError::MixedStages { index: 0 });

    let other = Case::new(&mut random, geometry, causal_task(401, 1), 1.0);
    let results = Results::Stage(kernel.start(&geometry, &other.task).unwrap());
    let keys = case.task.kv();
    let operands = Operands::Stage { q: case.q.any(), keys, k: case.k.any(), v: case.v.any() };
    let task = KernelTask { geometry, task: &case.task, operands, results };
    let error = kernel.run(vec![task], &|_, _| {}).unwrap_err();
    assert_eq!(error, KernelError::OtherStage { index: 0 });
}

#[test]
fn results_may_lie_over_operands() {
    let mut random = Random(33);
    for _ in 0..cases(40) {
        let shape = random_geometry(&mut random).shape();
        let dtype = outboard_attention::DType::F32;
        let shape = HeadShape { v_head_dim: shape.head_dim, dtype, ..shape };
        let geometry = shape.try_into().unwrap();
        let tokens = random.within(1..=600);
        let task = random_task(&mut random, &geometry, tokens);
        let case = Case::new(&mut random, geometry, task, 1.0);
        let dense = |tensor: &Tensor| -> Vec<f32> {
            (0..tensor.shape[0]).flat_map(|t| tensor.view().token(t).to_vec()).collect()
        };
        for isa in isas() {
            for direction in [Direction::Forward, Direction::Backward] {
                let apart = bits(&run_one(isa, &case, direction));
                let mut task = case.kernel_task(direction);
                match (&mut task.operands, &mut task.results) {
                    (Operands::Forward { q, .. }, Results::Forward { o, .. }) => {
                        *q = QueryInput::InPlace;
                        *o = dense(&case.q);
                    }
                    (Operands::Backward { d_o, .. }, Results::Backward { dq, .. }) => {
                        *d_o = QueryInput::InPlace;
                        *dq = dense(&case.d_o);
                    }
                    _ => unreachable!(),
                }
                let in_place = run(&mut kernel(isa, 2), vec![task]).remove(0);
                assert!(bits(&in_place) == apart, "{direction} on {isa} of {:?}", case.task);
            }
        }
    }
}

#[test]
fn unequal_dims_do_not_lie_in_place() {
    let mut random = Random(34);
    let geometry = HeadGeometry::standard(2, 1, 16).unwrap();
    let geometry = HeadShape { v_head_dim: 24, ..geometry.shape() }.try_into().unwrap();
    let case = Case::new(&mut random, geometry, causal_task(20, 1), 1.0);
    let mut task = case.kernel_task(Direction::Forward);
    if let Operands::Forward { q, .. } = &mut task.operands {
        *q = QueryInput::InPlace;
    }
    let error = kernel(Isa::Portable, 1).run(vec![task], &|_, _| {}).unwrap_err();
    assert!(error.to_string().contains("head_dim 16 and v_head_dim 24"), "{error}");
}

#[test]
fn the_workspace_is_known_before_the_call_and_bounded() {
    let mut random = Random(35);
    for round in 0..cases(12) {
        let geometry = random_geometry(&mut random);
        // Some long enough for several tiles, row blocks and chunks.
        let geometry = match round {
            0..3 => HeadGeometry::standard(8, 1, 8).unwrap(),
            _ => geometry,
        };
        let cases: Vec<Case> = (0..random.within(1..=5))
            .map(|_| {
                let task = random_task(&mut random, &geometry, if round < 3 { 700 } else { 300 });
                Case::new(&mut random, geometry, task, 1.0)
            })
            .collect();
        for isa in isas() {
            for threads in [1, 3] {
                for direction in [Direction::Forward, Direction::Backward] {
                    let needs = |case: &Case| task_workspace(isa, threads, &geometry, direction, &case.task);
                    let needed = cases.iter().map(needs).max().unwrap();
                    let batch = || cases.iter().map(|case| case.kernel_task(direction)).collect::<Vec<_>>();
                    let alone = |case: &Case| bits(&run_one(isa, case, direction));
                    let config = KernelConfig { isa, threads, workspace_bytes: 2 * needed };
                    let mut kernel = CpuKernel::new(config).unwrap();
                    // However little memory there is, and whatever is there from before, results are the same.
                    for _ in 0..2 {
                        let results = run(&mut kernel, batch());
                        for (results, case) in results.iter().zip(&cases) {
                            assert_eq!(bits(results), alone(case), "{isa}, {threads} threads, {direction}");
                        }
                        let held = kernel.workspace_bytes();
                        assert!(held <= 2 * needed, "{held} bytes held, {needed} foretold");
                        for case in &cases {
                            run(&mut kernel, vec![case.kernel_task(direction)]);
                            let held = kernel.workspace_bytes();
                            assert!(held <= 2 * needed, "{held} bytes held, {needed} foretold");
                        }
                    }
                    let config = KernelConfig { workspace_bytes: 100, ..config };
                    let error = CpuKernel::new(config)
                        .unwrap()
                        .run(batch(), &|_, _| panic!("too small"))
                        .unwrap_err();
                    assert!(matches!(error, KernelError::WorkspaceTooSmall { limit: 100, .. }), "{error}");
                }
            }
        }
    }
}
