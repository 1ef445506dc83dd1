//! What every outcome must hold, on random jobs.
#![allow(clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use outboard_simulator::{Layout, Mix, Outcome, Policy, Scenario, SimulationError, simulate};
use proptest::prelude::*;
use proptest::strategy::ValueTree;

mod scenarios;

use scenarios::{any_policy, any_scenario};

/// Simulates twice and checks everything that holds whatever the policy. `None` for a job that it cannot do.
fn check(scenario: &Scenario, policy: Policy) -> Option<Outcome> {
    let (outcome, again) = (simulate(scenario, policy), simulate(scenario, policy));
    // Floats are printed with every digit that they have, so equal text is equal bits.
    assert_eq!(format!("{outcome:?}"), format!("{again:?}"), "the same job, the same outcome");
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(SimulationError::Memory { needed, available, part_bytes, .. }) => {
            assert!(needed > available && part_bytes > 0.0 && part_bytes <= needed);
            return None;
        }
        Err(SimulationError::Unsuited { .. }) => return None,
        // Pools that take none of their work: more servers than a step has pieces for.
        Err(error) => panic!("{policy}: {error}, {:?}", std::error::Error::source(&error)),
    };
    let seconds = outcome.seconds;
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b.abs();
    assert!(seconds.is_finite() && seconds > 0.0, "{policy} takes {seconds}");
    assert!(near(outcome.account.total(), seconds), "{policy}: {:?} in {seconds}", outcome.account);
    assert!(outcome.account.parts().iter().all(|part| *part >= 0.0), "{:?}", outcome.account);
    assert!(near(outcome.step_seconds.iter().sum::<f64>() / outcome.step_seconds.len() as f64, seconds));
    assert_eq!(outcome.step_seconds.len(), scenario.steps as usize);
    assert!(outcome.imbalance >= 1.0 - 1e-9, "largest over mean is {}", outcome.imbalance);

    let floor = compute_bound(scenario, outcome.layout);
    assert!(seconds >= floor * (1.0 - 1e-9), "{policy} computes in {seconds} what takes {floor}");
    let tuning = &scenario.tuning;
    let fastest = tuning.link_efficiency.max(tuning.gather_efficiency);
    let network = scenario.network;
    for (bytes, link) in
        [(outcome.carried.most_within, network.within), (outcome.carried.most_between, network.between)]
    {
        let floor = bytes / (link.bytes_per_second * fastest);
        assert!(seconds >= floor * (1.0 - 1e-9), "{policy} sends in {seconds} what takes {floor}");
    }

    let most = outcome.memory.total();
    assert!(most <= scenario.gpu.memory_bytes && outcome.mean_memory <= most * (1.0 + 1e-9));
    let context = scenario.layout.context;
    assert!(context.is_none() || outcome.layout.context == context, "a layout that is named is kept");
    Some(outcome)
}

/// All that must be computed, over all GPUs: what is not attention by those of the model, attention by any.
fn compute_bound(scenario: &Scenario, layout: Layout) -> f64 {
    let cells = |tokens: usize| tokens as f64 * (tokens as f64 + 1.0) / 2.0;
    let batches = scenario.batches();
    let cells: f64 = batches.iter().flatten().flatten().map(|&tokens| cells(tokens)).sum();
    let cells = cells / batches.len() as f64;
    let (gpu, model) = (&scenario.gpu, &scenario.model);
    let dense = model.step_flops(scenario.tokens as f64, 0.0)
        / (gpu.peak_flops_per_second * scenario.tuning.matmul_efficiency);
    let attention = model.step_flops(0.0, cells)
        / (gpu.profile.peak_flops_per_second() * scenario.tuning.attention_efficiency);
    let of_model = f64::from(layout.gpus - layout.dedicated);
    (dense / of_model).max((dense + attention) / f64::from(layout.gpus))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn outcomes_make_sense(scenario in any_scenario(), policy in any_policy()) {
        check(&scenario, policy);
    }
}

#[test]
fn most_random_jobs_can_be_done() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for policy in Policy::ALL {
        let done = (0..40).filter(|_| {
            let mut scenario = any_scenario().new_tree(&mut runner).expect("a scenario").current();
            // Most policies have no dedicated servers, and some no pipeline.
            scenario.layout = Layout {
                gpus: scenario.layout.ranks() * scenario.layout.tensor,
                pipeline: 1,
                dedicated: 0,
                ..scenario.layout
            };
            check(&scenario, policy).is_some()
        });
        let done = done.count();
        assert!(done >= 15, "{policy} does {done} of 40 jobs");
    }
}

/// Changes one entry to something that makes no sense, or next to none.
#[derive(Clone, Copy, Debug)]
enum Entry {
    Whole(fn(&mut Scenario, u32)),
    Real(fn(&mut Scenario, f64)),
}

const ENTRIES: [Entry; 35] = [
    Entry::Whole(|s, value| s.model.layers = value),
    Entry::Whole(|s, value| s.model.hidden = value),
    Entry::Whole(|s, value| s.model.ffn = value),
    Entry::Whole(|s, value| s.model.q_heads = value),
    Entry::Whole(|s, value| s.model.kv_heads = value),
    Entry::Whole(|s, value| s.model.head_dim = value),
    Entry::Whole(|s, value| s.model.vocabulary = value),
    Entry::Whole(|s, value| s.layout.gpus = value),
    Entry::Whole(|s, value| s.layout.tensor = value),
    Entry::Whole(|s, value| s.layout.pipeline = value),
    Entry::Whole(|s, value| s.layout.context = Some(value)),
    Entry::Whole(|s, value| s.layout.dedicated = value),
    Entry::Whole(|s, value| s.layout.micro_batches = value),
    Entry::Whole(|s, value| s.network.gpus_per_node = value),
    Entry::Whole(|s, value| s.context = value as usize),
    Entry::Whole(|s, value| s.tokens = if value == u32::MAX { u64::MAX } else { u64::from(value) }),
    Entry::Whole(|s, value| s.steps = value),
    Entry::Whole(|s, value| s.mix = Mix::Lengths([value].into())),
    Entry::Real(|s, value| s.gpu.peak_flops_per_second = value),
    Entry::Real(|s, value| s.gpu.memory_bytes = value),
    Entry::Real(|s, value| s.gpu.memory_bytes_per_second = value),
    Entry::Real(|s, value| s.network.within.bytes_per_second = value),
    Entry::Real(|s, value| s.network.within.latency_seconds = value),
    Entry::Real(|s, value| s.network.between.bytes_per_second = value),
    Entry::Real(|s, value| s.network.between.latency_seconds = value),
    Entry::Whole(|s, value| s.nano_batches = value),
    Entry::Whole(|s, value| s.delay = value),
    Entry::Real(|s, value| s.token_slack = value),
    Entry::Real(|s, value| s.token_room = value),
    Entry::Real(|s, value| s.tolerance = value),
    Entry::Real(|s, value| s.tuning.matmul_efficiency = value),
    Entry::Real(|s, value| s.tuning.attention_efficiency = value),
    Entry::Real(|s, value| s.tuning.link_efficiency = value),
    Entry::Real(|s, value| s.tuning.gather_efficiency = value),
    Entry::Real(|s, value| s.tuning.dispatch_seconds = value),
];
const WHOLE: [u32; 9] = [0, 1, 2, 3, 5, 24, 64, 1 << 31, u32::MAX];
const REAL: [f64; 14] = [
    0.0,
    -0.0,
    -1.0,
    f64::NAN,
    f64::INFINITY,
    f64::NEG_INFINITY,
    f64::MIN_POSITIVE,
    f64::MAX,
    1e-9,
    1e-3,
    1.0,
    2.0,
    1e12,
    1e21,
];

fn any_nonsense() -> impl Strategy<Value = Scenario> {
    let changes =
        prop::collection::vec((prop::sample::select(ENTRIES.to_vec()), any::<prop::sample::Index>()), 1..4);
    (any_scenario(), changes).prop_map(|(mut scenario, changes)| {
        scenario.steps = 1;
        for (entry, index) in changes {
            match entry {
                Entry::Whole(set) => set(&mut scenario, *index.get(&WHOLE)),
                Entry::Real(set) => set(&mut scenario, *index.get(&REAL)),
            }
        }
        // Many documents make sense, and take their time.
        if scenario.context > 0 && scenario.tokens < u64::MAX {
            scenario.tokens = scenario.tokens.min(100 * scenario.context as u64);
        }
        // So do a thousand steps.
        if scenario.steps <= 1000 {
            scenario.steps = scenario.steps.min(2);
        }
        scenario
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn nonsense_is_refused(scenario in any_nonsense(), policy in any_policy()) {
        match simulate(&scenario, policy) {
            Ok(outcome) => {
                prop_assert!(scenario.check().is_ok());
                prop_assert!(outcome.seconds.is_finite() && outcome.seconds > 0.0, "{outcome:?}");
                prop_assert!(outcome.mfu.is_finite() && outcome.imbalance.is_finite());
                prop_assert!(outcome.account.parts().iter().all(|part| *part >= 0.0));
            }
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}
