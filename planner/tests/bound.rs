//! Bounds that no plan of any policy may be below.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use outboard_planner::{Policy, Problem, Rates, Verdict, judge, least_bytes, least_seconds, plan, plan_by};
use proptest::prelude::*;

mod common;

use common::steps::{POLICIES, any_problem, document, geometry, in_place, spanning};

fn judged(problem: &Problem, policy: Policy) -> Verdict {
    let plan = plan_by(problem, policy).expect("a sound problem");
    judge(&plan, problem).expect("a valid plan")
}

/// Those whose slots do not both give and take.
const ONE_WAY: [Policy; 5] = [
    Policy::Outboard,
    Policy::Fixed,
    Policy::Distca { tolerance: 0.0 },
    Policy::Distca { tolerance: 0.1 },
    Policy::Distca { tolerance: 1.0 },
];

/// The plan moves no less than any plan as balanced as it is must move.
fn check_bytes(problem: &Problem, policy: Policy) {
    let verdict = judged(problem, policy);
    // More than twice the mean is no tolerance.
    let tolerance = (verdict.worst_tick - 1.0).max(0.0);
    if tolerance > 1.0 {
        return;
    }
    let bounds = least_bytes(&Problem { tolerance, ..problem.clone() }).expect("a sound problem");
    for (pass, bound) in [verdict.forward, verdict.backward].iter().zip(bounds) {
        assert!(
            pass.bytes as f64 >= bound * (1.0 - 1e-9),
            "{policy}: {} bytes, but {bound} at least, at {tolerance}",
            pass.bytes
        );
    }
}

/// No plan takes less time than the bound.
fn check_seconds(problem: &Problem, policy: Policy, rates: Rates, bound: f64) {
    let verdict = judged(problem, policy);
    let seconds = verdict.forward.seconds(rates) + verdict.backward.seconds(rates);
    assert!(seconds >= bound * (1.0 - 1e-9), "{policy}: {seconds} s, but {bound} at least");
}

proptest! {
    #[test]
    fn no_policy_moves_fewer_bytes(problem in any_problem()) {
        for policy in ONE_WAY {
            check_bytes(&problem, policy);
        }
    }

    #[test]
    fn no_policy_takes_less_time(problem in any_problem(), bytes_per_second in prop::sample::select(vec![1e6, 1e8, 1e10, 1e12])) {
        let rates = Rates { flops_per_second: 1e12, bytes_per_second };
        let bound = least_seconds(&problem, rates).expect("a sound problem");
        for policy in POLICIES {
            check_seconds(&problem, policy, rates, bound);
        }
        check_seconds(&Problem { rates: Some(rates), ..problem }, Policy::Outboard, rates, bound);
    }
}

/// One long document beside short ones: what is moved is near the least.
#[test]
fn a_plan_of_one_large_donor_is_near_the_bound() {
    for kv_heads in [1, 8] {
        let mut documents = vec![document(0, 0, 200_000)];
        documents.extend((1..4).map(|rank| document(rank, 0, 50_000)));
        let problem = Problem::new(geometry(kv_heads), documents, in_place(4));
        let verdict = judged(&problem, Policy::Outboard);
        let [forward, _] = least_bytes(&problem).expect("a sound problem");
        let over = verdict.forward.bytes as f64 / forward;
        assert!((1.0..1.15).contains(&over), "{kv_heads} kv heads: {over}");
    }
}

/// Where links are slow, what must be carried bounds the time, and not what is computed alone.
#[test]
fn slow_links_are_part_of_the_bound() {
    let mut documents = vec![document(0, 0, 200_000)];
    documents.extend((1..8).map(|rank| document(rank, 0, 20_000)));
    let problem = Problem::new(geometry(8), documents, in_place(8));
    for bytes_per_second in [1e9, 3e9, 1e10] {
        let rates = Rates { flops_per_second: 1e15, bytes_per_second };
        let told = Problem { rates: Some(rates), ..problem.clone() };
        let reached = judged(&told, Policy::Outboard).seconds(rates);
        let least = least_seconds(&problem, rates).expect("a sound problem");
        let alone =
            least_seconds(&problem, Rates { bytes_per_second: 1e18, ..rates }).expect("a sound problem");
        assert!(least > 1.2 * alone && (1.0..1.6).contains(&(reached / least)), "{reached} {least} {alone}");
    }
}

/// A document that two ranks share moves the rows or the keys of one to the other, whatever else is done.
#[test]
fn documents_that_span_ranks_are_bounded_too() {
    let tokens = 40_000;
    let document = spanning(0, 0, &[(0, tokens / 2), (1, tokens / 2)]);
    let problem = Problem::new(geometry(2), vec![document], in_place(2));
    let [forward, backward] = least_bytes(&problem).expect("a sound problem");
    assert!(forward > 0.0 && backward > 0.0);
    let verdict = judged(&problem, Policy::Fixed);
    assert!(verdict.forward.bytes as f64 >= forward);
}

#[test]
fn balanced_steps_have_no_bound_and_nonsense_is_refused() {
    let documents = (0..3).map(|rank| document(rank, 0, 1000)).collect();
    let problem = Problem::new(geometry(2), documents, in_place(3));
    assert_eq!(least_bytes(&problem).expect("a sound problem"), [0.0; 2]);
    let rates = Rates { flops_per_second: 1e9, bytes_per_second: 1e9 };
    let least = least_seconds(&problem, rates).expect("a sound problem");
    let fixed = judged(&problem, Policy::Fixed);
    let computing = fixed.forward.compute_seconds(rates) + fixed.backward.compute_seconds(rates);
    assert!((least / computing - 1.0).abs() < 1e-9, "{least} {computing}");
    assert!(least_seconds(&problem, Rates { bytes_per_second: f64::NAN, ..rates }).is_err());
    let none = Problem { slots: Vec::new(), ..problem };
    assert!(least_bytes(&none).is_err() && plan(&none).is_err());
}
