//! Gradients of reduction groups, added up where they were computed: run against every transport.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[macro_use]
mod support;

use std::sync::atomic::Ordering::SeqCst;

use futures::future::join_all;
use outboard_attention::{DType, Direction, Span};
use outboard_proto::{ErrorKind, RetryHint, TaskError};
use support::*;

scenarios!(
    a_whole_group_is_delivered_once,
    parts_of_a_group_go_alone,
    a_task_without_a_result_fails_its_group_alone,
    a_sum_that_a_home_refuses_fails_its_group,
    groups_beyond_the_memory_go_alone_and_nothing_hangs,
);

const MIB: u64 = 1 << 20;

/// A group of tasks, and its keys if it is delivered as a sum, which `summed` asks for or not.
fn group(rng: &mut Rng, kind: Kind, step: u64, places: &Places, summed: bool) -> (Homed, Option<Span>) {
    loop {
        let drawn = drawn(rng, few_keys(kind, Direction::Backward));
        let mut homed = at_homes(rng, drawn, step, places, Cut { parts: 4, at: &everywhere(places) });
        let hull = homed.group(places);
        if hull.is_some() == summed {
            return (homed, hull);
        }
    }
}

async fn a_whole_group_is_delivered_once(kind: Kind) {
    let places = Places::start(&[Spec::Beside, Spec::Real, Spec::Real]).await;
    let bench = Bench::with_homes(kind, TestHandler::new(64 * MIB), places.way(quick())).await;
    let mut rng = Rng(41);
    for step in 0..12 {
        let summed = step % 3 > 0;
        let (homed, hull) = group(&mut rng, kind, step, &places, summed);
        let outcomes = join_all(bench.transport.ship(homed.tasks.clone())).await;
        for (n, outcome) in outcomes.into_iter().enumerate() {
            homed.check(n, &outcome.expect("the task succeeds"));
        }
        match hull {
            Some(hull) => homed.check_sum(&places, hull),
            None => homed.check_delivered(&places, 0..homed.tasks.len()),
        }
    }
    check_freed(bench).await;
}

async fn parts_of_a_group_go_alone(kind: Kind) {
    let places = Places::start(&[Spec::Beside, Spec::Real]).await;
    let bench = Bench::with_homes(kind, TestHandler::new(64 * MIB), places.way(quick())).await;
    let mut rng = Rng(42);
    let (homed, _) = group(&mut rng, kind, 0, &places, true);
    // As when a server that had the group is lost: its tasks are sent one by one.
    for (n, task) in homed.tasks.iter().enumerate() {
        let outcome = bench.transport.ship(vec![task.clone()]).remove(0).await;
        homed.check(n, &outcome.expect("the task succeeds"));
    }
    homed.check_delivered(&places, 0..homed.tasks.len());
    check_freed(bench).await;
}

async fn a_task_without_a_result_fails_its_group_alone(kind: Kind) {
    let places = Places::start(&[Spec::Beside, Spec::Real]).await;
    let bench = Bench::with_homes(kind, TestHandler::new(64 * MIB), places.way(quick())).await;
    let mut rng = Rng(43);
    let (homed, _) = group(&mut rng, kind, 0, &places, true);
    let (other, hull) = group(&mut rng, kind, 1, &places, true);
    let mut pendings = bench.transport.ship(homed.tasks.clone());
    drop(pendings.remove(rng.between(0, pendings.len() - 1)));
    let others = bench.transport.ship(other.tasks.clone());
    let outcomes = join_all(pendings).await;
    // The sum may have been delivered before, or be just then by the last of them: that one has its result.
    for error in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
        assert_eq!((error.kind, error.retry), (ErrorKind::Aborted, RetryHint::Later), "{error}");
        assert!(error.message.contains("reduction group"), "{error}");
    }
    for (n, outcome) in join_all(others).await.into_iter().enumerate() {
        other.check(n, &outcome.expect("another group's task"));
    }
    other.check_sum(&places, hull.unwrap());
    check_freed(bench).await;
}

async fn a_sum_that_a_home_refuses_fails_its_group(kind: Kind) {
    let places = Places::start(&[Spec::Real]).await;
    let bench = Bench::with_homes(kind, TestHandler::new(64 * MIB), places.way(quick())).await;
    let refusal = TaskError::new(ErrorKind::Busy, "no gradients now");
    *places.0[0].home.fault.lock().unwrap() = Fault::RefusesGradients(refusal);
    let (homed, _) = group(&mut Rng(44), kind, 0, &places, true);
    for outcome in join_all(bench.transport.ship(homed.tasks.clone())).await {
        let error = outcome.expect_err("its home takes nothing");
        assert_eq!((error.kind, error.retry), (ErrorKind::Aborted, RetryHint::Later), "{error}");
        assert!(error.message.contains("no gradients now"), "{error}");
    }
    check_freed(bench).await;
}

async fn groups_beyond_the_memory_go_alone_and_nothing_hangs(kind: Kind) {
    let places = Places::start(&[Spec::Beside, Spec::Real]).await;
    let bench = Bench::with_homes(kind, TestHandler::new(MIB), places.way(quick())).await;
    let mut rng = Rng(45);
    let groups: Vec<_> = (0..40).map(|step| group(&mut rng, kind, step, &places, step % 2 == 0).0).collect();
    let shipped = groups.iter().map(|homed| join_all(bench.transport.ship(homed.tasks.clone())));
    for (homed, outcomes) in groups.iter().zip(join_all(shipped).await) {
        for (n, outcome) in outcomes.into_iter().enumerate() {
            homed.check(n, &outcome.expect("the task succeeds"));
        }
    }
    assert!(bench.handler.peak.load(SeqCst) <= bench.handler.budget.limit());
    check_freed(bench).await;
}
