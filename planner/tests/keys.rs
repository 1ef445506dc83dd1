//! When rows go with some of their keys.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use outboard_attention::{DType, HeadGeometry, HeadShape, PlannedTask, Span};
use outboard_planner::{Policy, Problem, Slot, Verdict, judge, plan, plan_by};

mod common;

use common::checks::check_tasks;
use common::steps::{document, in_place, spanning};

const HEAD_DIM: usize = 128;

fn geometry(group: usize, dtype: DType) -> HeadGeometry {
    let shape = HeadShape {
        q_heads: group,
        kv_heads: 1,
        head_dim: HEAD_DIM,
        v_head_dim: HEAD_DIM,
        scale: 0.1,
        dtype,
        softcap: None,
    };
    HeadGeometry::try_from(shape).expect("sound heads")
}

/// The plan's verdict, and how many tasks lack keys that their rows see.
fn planned(problem: &Problem) -> (Verdict, usize) {
    let plan = plan(problem).expect("a sound problem");
    check_tasks(problem, &plan);
    let some_keys = |task: &PlannedTask| task.kv != Span::to(task.q.end());
    let partial = plan.tasks().filter(|(_, task)| some_keys(task)).count();
    (judge(&plan, problem).expect("a valid plan"), partial)
}

/// A long document on one rank, a short one on the other.
fn two_ranks(group: usize, dtype: DType) -> Problem {
    let documents = vec![document(0, 0, 100_000), document(1, 0, 20_000)];
    Problem::new(geometry(group, dtype), documents, in_place(2))
}

/// Bytes of a row and of a key that others see too, both passes.
fn prices(group: usize, dtype: DType) -> (f64, f64) {
    let (element, partial) = (dtype.bytes(), 4);
    let row = group * (4 * HEAD_DIM * element + 12);
    let key = 2 * HEAD_DIM * (element + partial);
    (row as f64, key as f64)
}

/// The fewest bytes of the slice that `two_ranks` must move, if its rows go with all their keys.
fn least_with_all_keys(group: usize, dtype: DType) -> f64 {
    let cells = |tokens: f64| tokens * (tokens + 1.0) / 2.0;
    let w = (cells(1e5) - cells(2e4)) / 2.0 - 0.01 * (cells(1e5) + cells(2e4)) / 2.0;
    let (row, key) = prices(group, dtype);
    // Rows [p - x, p) hold p x - x^2 / 2 cells.
    let bytes = |p: f64| row * (p - (p * p - 2.0 * w).max(0.0).sqrt()) + key * p;
    let ends = (0..=1000).map(|n| f64::from(n) / 1000.0 * 1e5).filter(|p| p * p >= 2.0 * w);
    ends.map(bytes).fold(f64::INFINITY, f64::min)
}

#[test]
fn near_one_query_head_a_kv_head_some_keys_cost_less() {
    for (group, dtype, saved) in [(1, DType::F32, 0.15), (4, DType::F32, 0.03)] {
        let (verdict, partial) = planned(&two_ranks(group, dtype));
        let bytes = (verdict.forward.bytes + verdict.backward.bytes) as f64;
        let least = least_with_all_keys(group, dtype);
        assert!(bytes < (1.0 - saved) * least, "{group} {dtype:?}: {bytes} bytes, {least} with all keys");
        assert!(partial > 0);
    }
}

#[test]
fn rows_go_with_all_their_keys_where_partial_results_are_dear() {
    for group in [4, 8] {
        let (verdict, partial) = planned(&two_ranks(group, DType::Bf16));
        assert_eq!(partial, 0);
        let bytes = (verdict.forward.bytes + verdict.backward.bytes) as f64;
        let least = least_with_all_keys(group, DType::Bf16);
        // Rows of the document's end leave keys that nobody else sees, and these come back in bf16.
        assert!(bytes > 0.9 * least && bytes < 1.1 * least, "{bytes} bytes, {least} at least");
    }
}

#[test]
fn a_rank_computes_with_the_keys_it_has() {
    // Rank 1 has somewhat too much work, and rank 0 has keys that its rows see; those between are of rank 2.
    let document = spanning(0, 0, &[(0, 50_000), (2, 50_000), (1, 20_000)]);
    let work = [1.25e9, 2.2e9, 3.75e9];
    let slots = (0..).zip([1.45e9, 2.0e9, 3.75e9]);
    let slots = slots.map(|(rank, weight)| Slot { weight, ..Slot::in_place(rank) }).collect();
    let problem = Problem::new(geometry(4, DType::Bf16), vec![document], slots);
    let (verdict, partial) = planned(&problem);
    assert!(partial > 0 && verdict.max_over_mean < 1.011);
    let fixed = plan_by(&problem, Policy::Fixed).expect("a plan");
    let before = judge(&fixed, &problem).expect("a valid plan");
    let more = (verdict.forward.bytes + verdict.backward.bytes) as f64
        - (before.forward.bytes + before.backward.bytes) as f64;
    // Rows with all their keys would need those of rank 2 as well.
    let (row, key) = prices(4, DType::Bf16);
    let moved = work[1] - 2.0e9 * 1.01;
    assert!(more < row * moved / 120_000.0 + key * 50_000.0, "{more} bytes more");
}

/// Of two slots with room, the one that has the document's keys takes its late rows, though the other one fits better.
#[test]
fn slots_that_have_the_keys_take_rows_first() {
    let documents =
        vec![spanning(0, 0, &[(0, 60_000), (1, 40_000)]), document(2, 0, 50_000), document(3, 0, 80_000)];
    // Ranks 1 and 3 have 0.51e9 and 0.50e9 cells too much, ranks 0 and 2 lack 0.52e9 and 0.49e9.
    for kv_heads in [1, 4] {
        let slots = (0..).zip([2.32, 2.69, 1.74, 2.70]);
        let slots = slots.map(|(rank, weight)| Slot { weight, ..Slot::in_place(rank) }).collect();
        let shape = HeadShape { kv_heads, q_heads: 4 * kv_heads, ..geometry(4, DType::Bf16).shape() };
        let geometry = HeadGeometry::try_from(shape).expect("sound heads");
        let problem = Problem::new(geometry, documents.clone(), slots);
        let plan = plan(&problem).expect("a sound problem");
        check_tasks(&problem, &plan);
        let late = |slot: u32| -> usize {
            let tasks = plan.tasks().filter(|(_, t)| t.document == documents[0].id() && t.slot == slot);
            tasks.map(|(_, t)| t.kv_heads.len() * t.q.end().saturating_sub(t.q.start().max(60_000))).sum()
        };
        assert!(late(0) > 10 * late(2).max(late(3)), "{} {} {}", late(0), late(2), late(3));
    }
}
