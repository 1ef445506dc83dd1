//! What estimates of speed promise, whatever servers report.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use outboard_planner::{Sample, Speeds};
use proptest::prelude::*;

/// What servers of these speeds report after as much work each.
fn report(speeds: &[f64]) -> BTreeMap<usize, Sample> {
    speeds.iter().enumerate().map(|(n, speed)| (n, Sample { work: 2.0, seconds: 2.0 / speed })).collect()
}

fn after(steps: usize, speeds: &[f64]) -> Speeds<usize> {
    let mut estimates = Speeds::default();
    (0..steps).for_each(|_| estimates.observe(&report(speeds)));
    estimates
}

#[test]
fn equal_servers_stay_at_speed_one() {
    let estimates = after(1000, &[3.7; 5]);
    assert!((0..5).all(|n| estimates.speed(&n) == 1.0));
    assert!(estimates.slow().is_empty());
    assert_eq!(Speeds::default().speed(&7), 1.0);
}

#[test]
fn a_slow_server_is_found_within_steps_and_known_by_its_speed() {
    for others in [1, 2, 3, 8] {
        let mut speeds = vec![1.0; others];
        speeds.push(0.5);
        assert!(after(1, &speeds).slow().is_empty(), "one report is not enough");
        let found = (1..10).find(|&steps| !after(steps, &speeds).slow().is_empty()).unwrap();
        assert!(found <= 4, "{others} others: {found} steps");
        let slow = after(60, &speeds).slow();
        assert_eq!(slow.keys().copied().collect::<Vec<_>>(), [others]);
        assert!((slow[&others] - 0.5).abs() < 0.01, "{slow:?}");
    }
}

#[test]
fn only_how_servers_compare_counts() {
    let mut estimates = after(60, &[1.0, 1.0, 0.5]);
    // All of them slower alike, as with shorter documents; then the slow one and another alone.
    estimates.observe(&report(&[0.01, 0.01, 0.005]));
    let two = BTreeMap::from([(1, 1.0), (2, 0.5)]).into_iter();
    estimates.observe(&two.map(|(n, speed)| (n, Sample { work: speed, seconds: 1.0 })).collect());
    let slow = estimates.slow();
    assert!(slow.len() == 1 && (slow[&2] - 0.5).abs() < 0.01, "{slow:?}");
}

#[test]
fn a_server_recovers_and_does_not_flicker_on_the_way() {
    let mut estimates = after(60, &[1.0, 1.0, 0.5]);
    let mut slow = Vec::new();
    for _ in 0..40 {
        estimates.observe(&report(&[1.0, 1.0, 1.0]));
        slow.push(!estimates.slow().is_empty());
    }
    assert!(slow[0] && !slow[39]);
    assert!(slow.windows(2).all(|pair| pair[0] >= pair[1]), "{slow:?}");
}

#[test]
fn what_is_slightly_slow_moves_nothing() {
    assert!(after(100, &[1.0, 1.0, 1.0, 0.9]).slow().is_empty());
    assert!(after(100, &[1.0, 0.88]).slow().is_empty());
}

#[test]
fn nonsense_counts_nothing() {
    let mut estimates = after(5, &[1.0, 0.8, 1.0]);
    let before = estimates.clone();
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        estimates.observe(&BTreeMap::from([(0, Sample { work: bad, seconds: 1.0 })]));
        estimates.observe(&BTreeMap::from([(0, Sample { work: 1.0, seconds: bad })]));
    }
    estimates.observe(&BTreeMap::from([(0, Sample { work: f64::MAX, seconds: f64::MIN_POSITIVE })]));
    estimates.observe(&BTreeMap::new());
    assert_eq!(estimates, before);
}

#[test]
fn who_is_forgotten_starts_anew() {
    let mut estimates = after(60, &[1.0, 1.0, 0.5]);
    estimates.retain(|&n| n != 2);
    assert_eq!(estimates.speed(&2), 1.0);
    assert!(estimates.slow().is_empty());
}

/// Any number at all, and often one that makes sense.
fn any_number() -> impl Strategy<Value = f64> {
    prop_oneof![any::<f64>(), 1e-6f64..1e6, Just(1.0)]
}

proptest! {
    #[test]
    fn noise_moves_nothing(noise in prop::collection::vec(prop::collection::vec(0.93f64..1.07, 6), 1..60)) {
        let mut estimates = Speeds::default();
        for step in &noise {
            estimates.observe(&report(step));
            prop_assert!(estimates.slow().is_empty(), "{estimates:?}");
        }
    }

    #[test]
    fn one_absurd_report_moves_nobody(
        servers in 2usize..7, which in 0usize..7, work in any_number(), seconds in any_number(), steps in 1usize..5,
    ) {
        let mut estimates = after(steps, &vec![1.0; servers]);
        let mut absurd = report(&vec![1.0; servers]);
        absurd.insert(which % servers, Sample { work, seconds });
        estimates.observe(&absurd);
        for n in 0..servers {
            prop_assert!((1.0 / 1.17..=1.17).contains(&estimates.speed(&n)), "{estimates:?}");
        }
        prop_assert!(estimates.slow().is_empty(), "{estimates:?}");
    }

    #[test]
    fn speeds_stay_in_bounds_whatever_is_reported(
        steps in prop::collection::vec(prop::collection::btree_map(0u8..5, (any_number(), any_number()), 0..5), 0..80),
    ) {
        let mut estimates = Speeds::default();
        for step in steps {
            let before = estimates.clone();
            let step = step.into_iter().map(|(n, (work, seconds))| (n, Sample { work, seconds })).collect();
            estimates.observe(&step);
            let mut again = before.clone();
            again.observe(&step);
            prop_assert_eq!(&again, &estimates);
            for n in 0..5 {
                prop_assert!((0.125..=8.0).contains(&estimates.speed(&n)));
                for other in 0..n {
                    let [was, is] = [&before, &estimates].map(|e| e.speed(&n) / e.speed(&other));
                    prop_assert!(is <= was * 1.26 && was <= is * 1.26, "from {was} to {is}");
                }
            }
            prop_assert!(estimates.slow().values().all(|speed| *speed > 0.0 && *speed < 1.0));
        }
    }
}
