//! What the steps of every policy must hold, on random jobs: what cannot be seen from outside.

use std::cell::RefCell;

use proptest::prelude::*;

use crate::engine::{Account, Clocks, Links, Program, Trace, run};
use crate::phase::Phase;
use crate::policy::{Choice, Planned, Policy, choices, floor, plan};
use crate::setting::Setting;
use crate::{Scenario, SimulationError, simulate};

#[path = "../tests/scenarios/mod.rs"]
mod scenarios;

use scenarios::{any_policy, any_scenario};

/// The steps of a scenario with everything that the policy may choose.
fn each_step(scenario: &Scenario, policy: Policy, check: impl Fn(&Setting<'_>, &Planned)) {
    scenario.check().expect("a scenario that makes sense");
    let batches = scenario.batches();
    let first = Setting::new(scenario, scenario.layout).expect("a layout that makes sense");
    for Choice { layout, window, link_share } in choices(&first, policy, batches[0].len()) {
        let setting = Setting::new(scenario, layout).expect("a layout that makes sense");
        let setting = Setting { link_share, ..setting };
        for batches in batches.chunks(window) {
            match plan(&setting, policy, batches) {
                Ok(steps) => steps.iter().for_each(|step| check(&setting, step)),
                Err(SimulationError::Unsuited { .. } | SimulationError::Memory { .. }) => {}
                Err(error) => panic!("{policy}: {error}"),
            }
        }
    }
}

/// How long a step takes, and where its time goes.
fn timed(setting: &Setting<'_>, step: &Planned, links: Links) -> (f64, Vec<Account>) {
    let mut clocks = Clocks::new(setting.devices(), links, Trace::default());
    let seconds = run(&mut clocks, &step.program, &setting.closing);
    (seconds, clocks.accounts)
}

/// Every phase forward.
fn phases(program: &Program) -> Vec<&Phase> {
    match program {
        Program::Together { forward, .. } | Program::Rounds(forward) => forward.iter().collect(),
        Program::Apart(replicas) => replicas.iter().flat_map(|replica| &replica.micro_batches).collect(),
    }
}

fn faster(links: Links, times: [f64; 4]) -> Links {
    let [within, between, sooner_within, sooner_between] = times;
    Links {
        bytes_per_second: [links.bytes_per_second[0] * within, links.bytes_per_second[1] * between],
        latency_seconds: [
            links.latency_seconds[0] / sooner_within,
            links.latency_seconds[1] / sooner_between,
        ],
    }
}

fn any_factor() -> impl Strategy<Value = f64> {
    prop_oneof![Just(1.0), 1.0..3.0, 1.0..1e4]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn every_device_accounts_for_all_of_the_step(scenario in any_scenario(), policy in any_policy()) {
        each_step(&scenario, policy, |setting, step| {
            let (seconds, accounts) = timed(setting, step, setting.links);
            for account in accounts {
                assert!((account.total() - seconds).abs() <= 1e-9 * seconds, "{account:?} in {seconds}");
                assert!(account.parts().iter().all(|part| *part >= 0.0), "{account:?}");
            }
        });
    }

    #[test]
    fn no_choice_is_left_out_that_could_be_the_fastest(scenario in any_scenario(), policy in any_policy()) {
        if let Ok(outcome) = simulate(&scenario, policy) {
            let setting = Setting::new(&scenario, outcome.layout).expect("a layout that makes sense");
            let floor = floor(&setting, policy);
            assert!(floor <= outcome.seconds * (1.0 + 1e-9), "{policy}: {floor}, and it takes {}", outcome.seconds);
        }
    }

    #[test]
    fn faster_links_never_make_a_step_longer(
        scenario in any_scenario(),
        policy in any_policy(),
        times in [any_factor(), any_factor(), any_factor(), any_factor()],
    ) {
        each_step(&scenario, policy, |setting, step| {
            let (seconds, _) = timed(setting, step, setting.links);
            let (sooner, _) = timed(setting, step, faster(setting.links, times));
            assert!(sooner <= seconds * (1.0 + 1e-12), "{policy}: {sooner}, with slower links {seconds}");
        });
    }

    #[test]
    fn every_token_is_on_one_rank_of_every_stage(scenario in any_scenario(), policy in any_policy()) {
        let sums = RefCell::new(Vec::new());
        each_step(&scenario, policy, |setting, step| {
            let stages = match step.program {
                // All stages are in one phase.
                Program::Together { .. } => setting.closing.stages as f64,
                Program::Apart(_) | Program::Rounds(_) => 1.0,
            };
            let tokens =
                |phase: &Phase| (0..phase.devices()).map(|device| phase.tokens_of(device)).sum::<f64>();
            sums.borrow_mut().push(phases(&step.program).into_iter().map(tokens).sum::<f64>() / stages);
        });
        // Steps may exchange documents, so it is their sum that is known.
        let sums = sums.into_inner();
        let asked = sums.len() as f64 * scenario.tokens as f64;
        prop_assert!((sums.iter().sum::<f64>() - asked).abs() <= 1e-9 * asked);
    }
}
