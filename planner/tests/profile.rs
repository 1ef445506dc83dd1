//! What profiles predict, and what they change in a plan.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use common::checks::check_tasks;
use common::steps::{any_problem, document, geometry, in_place};
use outboard_attention::{DType, Direction, HeadGeometry};
use outboard_planner::{Grid, Policy, Problem, Profile, Rates, Slot, TaskShape, Times, judge, plan, plan_by};
use proptest::prelude::*;

const BOTH: [Direction; 2] = [Direction::Forward, Direction::Backward];

fn grid(direction: Direction, dtype: DType, head_dim: usize, efficiency: f64) -> Grid {
    Grid { direction, dtype, head_dim, rows: vec![1], keys: vec![1], efficiency: vec![vec![efficiency]] }
}

/// A device of 1 TFLOP/s that reaches so much of it on tasks of any shape.
fn even(efficiency: f64, overhead: f64) -> Profile {
    let grids = BOTH.map(|direction| grid(direction, DType::F32, 64, efficiency));
    Profile::new(1e12, overhead, grids.to_vec()).expect("a sound profile")
}

/// A device of 1 TFLOP/s that short documents use badly.
fn steep() -> Profile {
    let grid = |direction| Grid {
        rows: vec![64, 16_384],
        keys: vec![64, 16_384],
        efficiency: vec![vec![0.01, 0.1], vec![0.1, 1.0]],
        ..grid(direction, DType::F32, 64, 1.0)
    };
    Profile::new(1e12, 1e-6, BOTH.map(grid).to_vec()).expect("a sound profile")
}

/// Short documents take longer for their cells: their rank is given less.
#[test]
fn work_of_slow_shapes_counts_more() {
    let mut documents = vec![document(0, 0, 60_000)];
    documents.extend((0..300).map(|n| document(1, n, 2_000)));
    let problem = Problem::new(geometry(2), documents, in_place(2));
    let over_mean = |profile| {
        let told = Problem { profile, ..problem.clone() };
        let times = Times::planned(&plan(&told).expect("a plan"), &problem, &steep()).totals();
        2.0 * times[0].max(times[1]) / (times[0] + times[1])
    };
    let (cells, time) = (over_mean(None), over_mean(Some(steep())));
    assert!(cells > 1.1 && time < 1.03, "{cells} {time}");
}

#[test]
fn a_task_takes_its_flops_at_its_efficiency_and_the_overhead() {
    let geometry = geometry(2);
    let shape = TaskShape { rows: 400, keys: 100, cells: 10_000 };
    let seconds = even(0.5, 1e-3).seconds(&geometry, Direction::Forward, shape);
    // Four query heads share a kv head: 4 x 64 FLOPs a cell and query head.
    assert!((seconds - (10_000.0 * 4.0 * 256.0 / 0.5e12 + 1e-3)).abs() < 1e-15, "{seconds}");
    let backward = even(0.5, 0.0).seconds(&geometry, Direction::Backward, shape);
    let forward = even(0.5, 0.0).seconds(&geometry, Direction::Forward, shape);
    assert!((backward / forward - 2.5).abs() < 1e-12);
}

#[test]
fn the_nearest_grid_stands_in_for_one_that_is_missing() {
    let profile = |grids: &[(DType, usize, f64)]| {
        let both = |&(dtype, dim, efficiency): &(DType, usize, f64)| {
            BOTH.map(|direction| grid(direction, dtype, dim, efficiency))
        };
        Profile::new(1e12, 0.0, grids.iter().flat_map(both).collect()).expect("a sound profile")
    };
    let chosen = |profile: &Profile, dtype, head_dim| {
        let geometry = HeadGeometry::standard(1, 1, head_dim).expect("sound heads").with_dtype(dtype);
        let shape = TaskShape { rows: 1, keys: 1, cells: 1000 };
        let seconds = profile.seconds(&geometry, Direction::Forward, shape);
        (geometry.forward_flops(1000) / 1e12 / seconds * 100.0).round()
    };
    let by_dim = profile(&[(DType::F32, 128, 0.2), (DType::F32, 32, 0.1), (DType::F32, 64, 0.3)]);
    for (dim, expected) in
        [(1, 10.0), (32, 10.0), (44, 10.0), (47, 30.0), (64, 30.0), (96, 20.0), (256, 20.0)]
    {
        assert_eq!(chosen(&by_dim, DType::F32, dim), expected, "head dim {dim}");
    }
    let tie = profile(&[(DType::F32, 128, 0.2), (DType::F32, 32, 0.1)]);
    assert_eq!(chosen(&tie, DType::F32, 64), 10.0, "of two as near the smaller");
    // The element type comes before the head dim.
    let by_type = profile(&[(DType::F32, 64, 0.1), (DType::Bf16, 8, 0.2)]);
    let chosen = [DType::F32, DType::Bf16, DType::F16].map(|dtype| chosen(&by_type, dtype, 64));
    assert_eq!(chosen, [10.0, 20.0, 20.0]);
}

#[test]
fn profiles_must_be_sound() {
    let both = || BOTH.map(|direction| grid(direction, DType::F32, 64, 0.5)).to_vec();
    let refused = |peak, overhead, grids, says: &str| {
        assert_eq!(Profile::new(peak, overhead, grids).expect_err("not sound").to_string(), says);
    };
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let says = format!("profile.peak_flops_per_second is {bad}; it must be finite and above zero");
        refused(bad, 0.0, both(), &says);
    }
    for bad in [-1.0, f64::NAN, f64::INFINITY] {
        let says = format!("profile.task_overhead_seconds is {bad}; it must be finite and not below zero");
        refused(1.0, bad, both(), &says);
    }
    let says = "profile.grids has none of direction backward; it must have one";
    refused(1.0, 0.0, both()[..1].to_vec(), says);
    let says = "profile.grids[2] is forward f32 head dim 64, as grids[0] is; one will do";
    refused(1.0, 0.0, [both(), both()].concat(), says);
    let bad = Grid { keys: vec![2, 1], ..both()[1].clone() };
    let says = "profile.grids[1].keys[1] is 1; it must be above keys[0], 2";
    refused(1.0, 0.0, vec![both()[0].clone(), bad], says);
}

#[test]
fn the_judge_predicts_by_the_profile() {
    let documents = (0..4).map(|rank| document(rank, 0, 4_000 * (rank as usize + 1))).collect();
    let slots = vec![Slot { weight: 2.0, ..Slot::in_place(0) }, Slot::in_place(1), Slot::dedicated()];
    let problem = Problem::new(geometry(2), documents, slots);
    let plan = plan(&problem).expect("a plan");
    let plain = judge(&plan, &problem).expect("a valid plan");
    assert_eq!((plain.forward.predicted, plain.backward.predicted), (None, None));
    // At one efficiency for all and without overhead, times are FLOPs over a rate.
    let told = Problem { profile: Some(even(0.5, 0.0)), ..problem };
    let verdict = judge(&plan, &told).expect("a valid plan");
    let rates = Rates { flops_per_second: 5e11, ..Rates::default() };
    for (ours, plain) in [(verdict.forward, plain.forward), (verdict.backward, plain.backward)] {
        let (ours, plain) = (ours.compute_seconds(rates), plain.compute_seconds(rates));
        assert!((ours / plain - 1.0).abs() < 1e-12, "{ours} {plain}");
    }
    let times = Times::planned(&plan, &told, &even(0.5, 0.0));
    assert!((times.lost() - 0.5).abs() < 1e-12);
    let [forward, backward] = times.busiest();
    assert_eq!((Some(forward), Some(backward)), (verdict.forward.predicted, verdict.backward.predicted));
    let totals = times.totals();
    assert!((totals[0] * 2.0 + totals[1] + totals[2] - times.device_seconds).abs() < 1e-12);
}

#[test]
fn bad_shapes_are_what_is_lost() {
    let lost = |tokens: usize| {
        let documents = (0..64).map(|n| document(0, n, tokens)).collect();
        let problem = Problem::new(geometry(1), documents, in_place(1));
        Times::planned(&plan(&problem).expect("a plan"), &problem, &steep()).lost()
    };
    let lost = [16, 256, 4096, 65_536].map(lost);
    assert!(lost.windows(2).all(|pair| pair[0] > pair[1]), "{lost:?}");
    assert!(lost[0] > 0.95 && lost[3] < 0.1, "{lost:?}");
}

#[test]
fn links_that_seem_slow_at_the_peak_are_not_beside_what_tasks_take() {
    // The peak alone promises that computing takes less time than moving; real tasks take ten times as long.
    let documents: Vec<_> = (0..8).map(|rank| document(rank, 0, 8_000 * (rank as usize + 1))).collect();
    let rates = Rates { flops_per_second: 1e12, bytes_per_second: 1e7 };
    let problem = Problem { rates: Some(rates), ..Problem::new(geometry(4), documents, in_place(8)) };
    let told = Problem { profile: Some(even(0.1, 0.0)), ..problem.clone() };
    let balance = |problem: &Problem| {
        judge(&plan(problem).expect("a plan"), problem).expect("a valid plan").max_over_mean
    };
    assert!(balance(&told) < balance(&problem) - 0.05, "{} {}", balance(&told), balance(&problem));
    // A profile of one efficiency and no overhead is a rate.
    let rate = Problem { rates: Some(Rates { flops_per_second: 1e11, ..rates }), ..problem };
    assert_eq!(plan(&told), plan(&rate));
}

proptest! {
    #[test]
    fn plans_by_a_profile_are_sound_and_no_slower_than_those_of_even_cells(problem in any_problem()) {
        let documents = problem.documents.iter().map(|d| d.clone().with_tick(0)).collect();
        let told = Problem {
            rates: Some(Rates { bytes_per_second: 1e9, ..Rates::default() }),
            profile: Some(steep()),
            documents,
            ..problem
        };
        let ours = plan(&told).expect("a plan");
        check_tasks(&told, &ours);
        prop_assert_eq!(&ours, &plan(&told).expect("a plan"));
        let time = |plan| {
            let verdict = judge(plan, &told).expect("a valid plan");
            let rates = told.rates.expect("rates");
            verdict.forward.seconds(rates) + verdict.backward.seconds(rates)
        };
        let tight = Problem { rates: None, profile: None, tolerance: 1e-3, ..told.clone() };
        let balanced = plan_by(&tight, Policy::Outboard).expect("a plan");
        prop_assert!(time(&ours) <= time(&balanced) * 1.05, "{} {}", time(&ours), time(&balanced));
    }

    #[test]
    fn what_a_profile_predicts_is_balanced_at_least_as_well_as_cells(problem in any_problem()) {
        let documents = problem.documents.iter().map(|d| d.clone().with_tick(0)).collect();
        let problem = Problem { documents, ..problem };
        let told = Problem { profile: Some(steep()), ..problem.clone() };
        let ours = plan(&told).expect("a plan");
        check_tasks(&told, &ours);
        prop_assert_eq!(&ours, &plan(&told).expect("a plan"));
        let busiest = |plan| Times::planned(plan, &problem, &steep()).busiest().iter().sum::<f64>();
        let cells = plan(&problem).expect("a plan");
        prop_assert!(busiest(&ours) <= busiest(&cells) * (1.0 + 1e-9));
    }

    #[test]
    fn a_profile_makes_nothing_that_fits_no_longer_fit(
        problem in any_problem(), memories in prop::collection::vec(prop::option::of(0u64..5_000_000), 10),
    ) {
        let mut problem = problem;
        for (slot, memory) in problem.slots.iter_mut().zip(memories) {
            slot.memory = memory;
        }
        let told = Problem { profile: Some(steep()), ..problem.clone() };
        prop_assert!(plan(&problem).is_err() || plan(&told).is_ok());
    }

    #[test]
    fn times_are_positive_and_a_larger_task_takes_longer(
        rows in 1usize..1 << 20, keys in 1usize..1 << 20, cells in 1u64..1 << 40, head_dim in 1usize..257, kind in 0usize..3,
    ) {
        for name in Profile::BUILT_IN {
            let profile = Profile::built_in(name).expect("a name that it lists");
            let geometry = HeadGeometry::standard(8, 2, head_dim).expect("sound heads").with_dtype(DType::ALL[kind]);
            for direction in BOTH {
                let seconds = |cells| profile.seconds(&geometry, direction, TaskShape { rows, keys, cells });
                prop_assert!(seconds(cells) > 0.0 && seconds(cells).is_finite());
                prop_assert!(seconds(cells) < seconds(2 * cells));
            }
        }
    }
}
