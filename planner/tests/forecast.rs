//! What a plan is predicted to make of a step, and when attention is not worth disaggregating.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test fails by panicking")]

use outboard_planner::{Doubt, Fault, Forecast, Policy, Problem, Rates, Slot, StepCosts, plan, plan_by};
use proptest::prelude::*;

mod common;

use common::steps::{any_problem, document, geometry, in_place};

/// Floating point's share in sums of a few times.
const ROUNDING: f64 = 1e-9;

const FAST_LINKS: f64 = 1e15;

fn costs(rest_seconds_per_token: f64, bytes_per_second: f64) -> StepCosts {
    let rates = Rates { flops_per_second: 1e9, bytes_per_second };
    StepCosts { layers: 2, rates, rest_seconds_per_token }
}

fn forecast(problem: &Problem, costs: &StepCosts) -> Forecast {
    Forecast::of_step(problem, &plan(problem).expect("a sound problem"), costs).expect("sound costs")
}

/// Seconds of both passes of both layers of [`costs`]: 14 FLOPs a cell, query head of the group and element of a head.
fn attention(cells: f64) -> f64 {
    2.0 * cells * 14.0 * 4.0 * 64.0 / 1e9
}

fn causal(tokens: usize, kv_heads: usize) -> f64 {
    (tokens * (tokens + 1) / 2 * kv_heads) as f64
}

/// Two ranks of one document each.
fn two_ranks(a: usize, b: usize) -> Problem {
    Problem::new(geometry(2), vec![document(0, 0, a), document(1, 0, b)], in_place(2))
}

fn assert_close(a: f64, b: f64) {
    assert!((a - b).abs() <= ROUNDING * b.abs(), "{a} {b}");
}

fn any_costs() -> impl Strategy<Value = StepCosts> {
    let exponent = |range| (range, 1.0f64..10.0).prop_map(|(e, m): (i32, f64)| m * 10f64.powi(e));
    (1u32..100, exponent(-3..16), exponent(-3..16), prop_oneof![Just(0.0), exponent(-12..6)]).prop_map(
        |(layers, flops_per_second, bytes_per_second, rest_seconds_per_token)| StepCosts {
            layers,
            rates: Rates { flops_per_second, bytes_per_second },
            rest_seconds_per_token,
        },
    )
}

proptest! {
    #[test]
    fn no_gain_is_predicted_above_the_ideal(problem in any_problem(), costs in any_costs(), policy in 0usize..5) {
        let policy: Policy = Policy::NAMES[policy].parse().unwrap();
        let plan = plan_by(&problem, policy).unwrap();
        let forecast = Forecast::of_step(&problem, &plan, &costs).unwrap();
        let figures = [
            forecast.gain(), forecast.ideal_gain(), forecast.imbalance(), forecast.attention_share(),
            forecast.local_seconds, forecast.planned_seconds, forecast.unlinked_seconds, forecast.ideal_seconds,
        ];
        prop_assert!(figures.iter().all(|figure| figure.is_finite()), "{figures:?}");
        prop_assert!(forecast.gain() <= forecast.ideal_gain() + ROUNDING, "{forecast:?}");
        prop_assert!(forecast.unlinked_seconds <= forecast.planned_seconds, "{forecast:?}");
        prop_assert!(forecast.gain() < 1.0 && forecast.imbalance() >= 1.0 - ROUNDING, "{forecast:?}");
        prop_assert!((0.0..=1.0).contains(&forecast.attention_share()), "{forecast:?}");
        prop_assert_eq!(forecast.doubt().is_none(), forecast.gain() >= Forecast::LEAST_GAIN);
    }

    #[test]
    fn faster_links_never_make_a_step_longer(problem in any_problem(), costs in any_costs()) {
        let slow = forecast(&problem, &costs);
        let rates = Rates { bytes_per_second: costs.rates.bytes_per_second * 3.0, ..costs.rates };
        let fast = forecast(&problem, &StepCosts { rates, ..costs });
        prop_assert!(fast.planned_seconds <= slow.planned_seconds);
        prop_assert_eq!(fast.local_seconds, slow.local_seconds);
    }

    #[test]
    fn one_rank_gains_nothing(tokens in prop::collection::vec(1usize..20_000, 1..6), costs in any_costs()) {
        let documents = (0..).zip(&tokens).map(|(n, &tokens)| document(0, n, tokens)).collect();
        let forecast = forecast(&Problem::new(geometry(2), documents, in_place(1)), &costs);
        prop_assert!(forecast.gain().abs() < ROUNDING, "{forecast:?}");
        prop_assert_eq!(forecast.doubt(), Some(Doubt::OneRank));
    }

    #[test]
    fn a_step_twice_gains_what_it_gains_once(problem in any_problem(), costs in any_costs()) {
        let once = forecast(&problem, &costs);
        let twice = once.then(once);
        prop_assert!((twice.gain() - once.gain()).abs() <= ROUNDING * once.gain().abs().max(1.0));
        prop_assert!((twice.imbalance() - once.imbalance()).abs() < ROUNDING * once.imbalance());
    }
}

#[test]
fn a_step_takes_what_its_slowest_rank_does() {
    let (rest, problem) = (1e-3, two_ranks(8192, 1024));
    let forecast = forecast(&problem, &costs(rest, FAST_LINKS));
    let (long, short) = (causal(8192, 2), causal(1024, 2));
    assert_close(forecast.local_seconds, 8192.0 * rest + attention(long));
    assert_close(forecast.local_attention_seconds, attention(long));
    assert_close(forecast.imbalance(), long / ((long + short) / 2.0));
    assert_close(forecast.ideal_seconds, 8192.0 * rest + attention((long + short) / 2.0));
    let planned = forecast.planned_seconds - 8192.0 * rest;
    let mean = attention((long + short) / 2.0);
    assert!(planned > mean * (1.0 - ROUNDING) && planned < mean * 1.0101, "{planned} {mean}");
    assert_eq!((forecast.ranks, forecast.weight, forecast.doubt()), (2, 2.0, None));
}

#[test]
fn what_stands_against_a_pool_is_named() {
    let slow = Rates { flops_per_second: 1e12, bytes_per_second: 1e3 };
    let cases = [
        (two_ranks(8192, 1024), 0.0, 1e3, Doubt::SlowLinks),
        // A plan for slow links moves nothing that these could slow down.
        (Problem { rates: Some(slow), ..two_ranks(8192, 1024) }, 0.0, 1e3, Doubt::SlowLinks),
        // What memory, and not links, keeps at home.
        (
            Problem {
                slots: vec![Slot::in_place(0), Slot { memory: Some(0), ..Slot::in_place(1) }],
                ..two_ranks(8192, 1024)
            },
            0.0,
            FAST_LINKS,
            Doubt::Balanced,
        ),
        (two_ranks(8192, 8192), 0.0, FAST_LINKS, Doubt::Balanced),
        (two_ranks(8192, 8150), 1e-9, FAST_LINKS, Doubt::Balanced),
        (two_ranks(8192, 1024), 1e3, FAST_LINKS, Doubt::LittleAttention),
        (
            Problem { slots: vec![Slot::dedicated()], ..two_ranks(8192, 8192) },
            0.0,
            FAST_LINKS,
            Doubt::TooFewSlots,
        ),
        (Problem::new(geometry(2), Vec::new(), in_place(2)), 0.0, FAST_LINKS, Doubt::Balanced),
    ];
    for (problem, rest, links, doubt) in cases {
        let forecast = forecast(&problem, &costs(rest, links));
        assert_eq!(forecast.doubt(), Some(doubt), "{forecast:?}");
    }
}

#[test]
fn costs_that_make_no_sense_are_refused() {
    let problem = two_ranks(6000, 600);
    let plan = plan(&problem).unwrap();
    let refused = |costs: StepCosts| match Forecast::of_step(&problem, &plan, &costs) {
        Err(Fault::BadProblem(error)) => error.to_string(),
        other => format!("{other:?}"),
    };
    for rest in [-1.0, f64::NAN, f64::INFINITY] {
        let message = refused(costs(rest, 1e9));
        assert!(
            message.contains("rest_seconds_per_token") && message.contains(&rest.to_string()),
            "{message}"
        );
    }
    for rate in [0.0, -1.0, f64::NAN] {
        assert!(refused(costs(0.0, rate)).contains("bytes_per_second"));
    }
    assert!(refused(costs(0.0, f64::MIN_POSITIVE)).contains("inf"), "nothing takes forever");
    assert!(refused(costs(f64::MAX, 1e9)).contains("inf"));
}
