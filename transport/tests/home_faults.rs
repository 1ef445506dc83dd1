//! Tasks whose keys lie at homes that fail them, or that are given up meanwhile: run against every transport.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[macro_use]
mod support;

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use futures::future::join_all;
use outboard_attention::{DType, Direction};
use outboard_proto::{ErrorKind, RetryHint, TaskError};
use outboard_transport::grpc::LinkConfig;
use outboard_transport::{KeyShare, Keys, Pending};
use support::*;

scenarios!(
    tasks_cancelled_while_their_keys_come_free_everything,
    a_task_ends_at_its_deadline_while_its_keys_come,
    tasks_cancelled_while_their_keys_come_leave_the_others_theirs,
    shipments_at_once_fetch_the_same_keys_once,
    a_task_cancelled_while_it_delivers_frees_everything,
    homes_that_give_no_keys_fail_their_tasks_alone,
    homes_that_take_no_gradients_fail_their_tasks_alone,
    a_home_killed_while_keys_come_is_found_again_when_it_is_back,
);

const MIB: u64 = 1 << 20;

/// The tasks that are not kept wait for their keys no more.
fn keep(pendings: Vec<Pending>, kept: impl Fn(usize) -> bool) -> Vec<(usize, Pending)> {
    pendings.into_iter().enumerate().filter(|(n, _)| kept(*n)).collect()
}

async fn tasks_cancelled_while_their_keys_come_free_everything(kind: Kind) {
    let places = Places::start(&[Spec::Real, Spec::Wire(WireFault::Holds)]).await;
    let bench = Bench::with_homes(kind, TestHandler::new(64 * MIB), places.way(quick())).await;
    let wire = places.0[1].wire.clone().unwrap();
    let mut rng = Rng(26);
    for round in 0..3 {
        let homed = reading_second(&mut rng, kind, Direction::Backward, round, &places);
        let pendings = bench.transport.ship(homed.tasks.clone());
        eventually("keys are on their way", || wire.fetches.load(SeqCst) > 0).await;
        drop(pendings);
        eventually("the fetch is given up", || wire.fetches.load(SeqCst) == 0).await;
        eventually("all but idle credit is free", || {
            bench.handler.budget.try_lease(bench.handler.budget.largest()).is_some()
        })
        .await;
    }
    wire.release();
    let drawn = drawn(&mut rng, few_keys(kind, Direction::Backward));
    let homed = at_homes(&mut rng, drawn, 9, &places, Cut { parts: 6, at: &[0, 1] });
    check_all(&bench, &places, &homed).await;
    check_freed(bench).await;
}

async fn a_task_ends_at_its_deadline_while_its_keys_come(kind: Kind) {
    let places = Places::start(&[Spec::Wire(WireFault::Holds)]).await;
    let bench = Bench::with_homes(kind, TestHandler::new(64 * MIB), places.way(quick())).await;
    let mut rng = Rng(27);
    let drawn = drawn(&mut rng, few_keys(kind, Direction::Forward));
    let mut homed = at_homes(&mut rng, drawn, 0, &places, Cut { parts: 3, at: &[0] });
    homed.tasks[0].header.deadline = Some(Duration::from_millis(150));
    let mut pendings = bench.transport.ship(homed.tasks.clone());
    let error = pendings.remove(0).await.expect_err("its keys do not come");
    assert_eq!(error.kind, ErrorKind::DeadlineExceeded, "{error}");
    places.0[0].wire.as_ref().unwrap().release();
    for (n, outcome) in join_all(pendings).await.into_iter().enumerate() {
        homed.check(n + 1, &outcome.expect("the others get theirs"));
    }
    check_freed(bench).await;
}

async fn tasks_cancelled_while_their_keys_come_leave_the_others_theirs(kind: Kind) {
    let mut rng = Rng(28);
    for round in 0..6 {
        let places = Places::start(&[Spec::Real, Spec::Wire(WireFault::Holds)]).await;
        let bench = Bench::with_homes(kind, TestHandler::new(64 * MIB), places.way(quick())).await;
        let wire = places.0[1].wire.clone().unwrap();
        let homed = reading_second(&mut rng, kind, Direction::Backward, round, &places);
        let pendings = bench.transport.ship(homed.tasks.clone());
        eventually("keys are on their way", || wire.fetches.load(SeqCst) > 0).await;
        // The first carries what the others share.
        let dice: Vec<_> = (0..pendings.len()).map(|n| n > 0 && rng.between(0, 1) == 0).collect();
        let kept = keep(pendings, |n| dice[n]);
        wire.release();
        for (n, pending) in kept {
            homed.check(n, &pending.await.expect("it was not cancelled"));
        }
        check_freed(bench).await;
    }
}

async fn shipments_at_once_fetch_the_same_keys_once(kind: Kind) {
    let places = Places::start(&[Spec::Wire(WireFault::Holds)]).await;
    let bench = Bench::with_homes(kind, TestHandler::new(64 * MIB), places.way(quick())).await;
    let wire = places.0[0].wire.clone().unwrap();
    let mut rng = Rng(33);
    let drawn = drawn(&mut rng, few_keys(kind, Direction::Forward));
    let homed = at_homes(&mut rng, drawn, 0, &places, Cut { parts: 1, at: &[0] });
    let first = bench.transport.ship(homed.tasks.clone());
    eventually("keys are on their way", || wire.begun.load(SeqCst) == 1).await;
    // As of another client: it shares nothing with the first but the homes.
    let mut others = homed.tasks.clone();
    let share = KeyShare::default();
    others.iter_mut().for_each(|task| task.keys = Keys::AtHomes(share.clone()));
    let used = bench.handler.budget.used();
    let standing = bench.transport.traffic().sent;
    let second = bench.transport.ship(others);
    eventually("the others have come", || {
        bench.handler.budget.used() > used || bench.transport.traffic().sent > standing
    })
    .await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    wire.release();
    for pendings in [first, second] {
        for (n, outcome) in join_all(pendings).await.into_iter().enumerate() {
            homed.check(n, &outcome.expect("the task succeeds"));
        }
    }
    assert_eq!(wire.begun.load(SeqCst), 1);
    check_freed(bench).await;
}

async fn a_task_cancelled_while_it_delivers_frees_everything(kind: Kind) {
    let places = Places::start(&[Spec::Real, Spec::Wire(WireFault::TakesNothing)]).await;
    let bench = Bench::with_homes(kind, TestHandler::new(64 * MIB), places.way(quick())).await;
    let mut rng = Rng(29);
    let drawn = drawn(&mut rng, few_keys(kind, Direction::Backward));
    let homed = at_homes(&mut rng, drawn, 0, &places, Cut { parts: 6, at: &[0, 1] });
    let pendings = bench.transport.ship(homed.tasks.clone());
    let computed = homed.tasks.len() as u64;
    eventually("all are computed", || bench.handler.computed.load(SeqCst) == computed).await;
    drop(pendings);
    check_freed(bench).await;
}

/// What befalls those tasks of a shipment that have to do with the bad home; all others succeed.
async fn check_fault(kind: Kind, direction: Direction, bad: Spec, fault: Fault, retry: RetryHint) {
    let places = Places::start(&[Spec::Real, bad]).await;
    let link = LinkConfig { stall_timeout: Duration::from_millis(400), ..quick() };
    let bench = Bench::with_homes(kind, TestHandler::new(64 * MIB), places.way(link)).await;
    let place = &places.0[1];
    *place.home.fault.lock().unwrap() = fault.clone();
    let gradients = matches!(fault, Fault::RefusesGradients(_)) || bad == Spec::Wire(WireFault::TakesNothing);
    let mut rng = Rng(31);
    let [drawn, good] = [0, 1].map(|_| drawn(&mut rng, few_keys(kind, direction)));
    let homed = at_homes(&mut rng, drawn, 0, &places, Cut { parts: 2, at: &[1] });
    let good = at_homes(&mut rng, good, 1, &places, Cut { parts: 2, at: &[0] });
    let both = [homed.tasks.clone(), good.tasks.clone()].concat();
    let mut outcomes = join_all(bench.transport.ship(both)).await;
    for (n, outcome) in outcomes.split_off(homed.tasks.len()).into_iter().enumerate() {
        good.check(n, &outcome.expect("the bad home is none of its own"));
    }
    good.check_delivered(&places, 0..good.tasks.len());
    for (n, outcome) in outcomes.into_iter().enumerate() {
        let concerned = if gradients { homed.delivers(n, &places, place) } else { homed.reads(n, place) };
        if !concerned {
            homed.check(n, &outcome.expect("the bad home is none of its own"));
            continue;
        }
        let error = outcome.expect_err(&format!("{bad:?}, {fault:?}"));
        assert_eq!((error.kind, error.retry), (ErrorKind::Aborted, retry), "{bad:?}, {fault:?}: {error}");
        for said in [&format!("rank {}", place.rank), &place.address, "step 0, layer 1"] {
            assert!(error.message.contains(said), "{bad:?}, {fault:?}: {error} does not say {said}");
        }
    }
    check_freed(bench).await;
}

fn refusals() -> Vec<(TaskError, RetryHint)> {
    let error = |kind| TaskError::new(kind, "refused on purpose");
    let never = [ErrorKind::Invalid, ErrorKind::NotFound, ErrorKind::Unsupported];
    let elsewhere = [ErrorKind::Busy, ErrorKind::Unavailable, ErrorKind::Internal, ErrorKind::Aborted];
    let never = never.map(|kind| (error(kind), RetryHint::Never));
    never.into_iter().chain(elsewhere.map(|kind| (error(kind), RetryHint::Later))).collect()
}

async fn homes_that_give_no_keys_fail_their_tasks_alone(kind: Kind) {
    for (error, retry) in refusals() {
        check_fault(kind, Direction::Forward, Spec::Real, Fault::Refuses(error.clone()), retry).await;
        check_fault(kind, Direction::Forward, Spec::Beside, Fault::Refuses(error), retry).await;
    }
    for spec in [Spec::Real, Spec::Beside] {
        check_fault(kind, Direction::Forward, spec, Fault::Short, RetryHint::Later).await;
    }
    let faults = [
        WireFault::Silent,
        WireFault::Stalls,
        WireFault::Trickles,
        WireFault::EndsEarly,
        WireFault::Breaks,
        WireFault::WrongChecksum,
        WireFault::LeavesAGap,
        WireFault::SendsTooMuch,
        WireFault::NamesAnotherTensor,
    ];
    for spec in faults.map(Spec::Wire).into_iter().chain([Spec::Gone]) {
        check_fault(kind, Direction::Backward, spec, Fault::None, RetryHint::Later).await;
    }
}

async fn homes_that_take_no_gradients_fail_their_tasks_alone(kind: Kind) {
    for (error, retry) in refusals() {
        for spec in [Spec::Real, Spec::Beside] {
            let fault = Fault::RefusesGradients(error.clone());
            check_fault(kind, Direction::Backward, spec, fault, retry).await;
        }
    }
    let silent = Spec::Wire(WireFault::TakesNothing);
    check_fault(kind, Direction::Backward, silent, Fault::None, RetryHint::Later).await;
}

async fn a_home_killed_while_keys_come_is_found_again_when_it_is_back(kind: Kind) {
    let mut places = Places::start(&[Spec::Real, Spec::Wire(WireFault::Holds)]).await;
    let bench = Bench::with_homes(kind, TestHandler::new(64 * MIB), places.way(quick())).await;
    let mut rng = Rng(32);
    let mut draw = |places: &Places, step| {
        let drawn = drawn(&mut rng, few_keys(kind, Direction::Backward));
        at_homes(&mut rng, drawn, step, places, Cut { parts: 3, at: &[1] })
    };
    let homed = draw(&places, 0);
    let pendings = bench.transport.ship(homed.tasks.clone());
    let wire = places.0[1].wire.clone().unwrap();
    eventually("keys are on their way", || wire.fetches.load(SeqCst) > 0).await;
    let address = places.0[1].address.clone();
    places.0[1].kill();
    for outcome in join_all(pendings).await {
        let error = outcome.expect_err("the home is gone");
        assert_eq!((error.kind, error.retry), (ErrorKind::Aborted, RetryHint::Later), "{error}");
        assert!(error.message.contains(&address), "{error}");
    }
    // Lost in mid-fetch, then while idle.
    for step in 1..4 {
        places.0[1].spec = Spec::Real;
        places.0[1].listen(&address).await;
        let homed = draw(&places, step);
        check_all(&bench, &places, &homed).await;
        places.0[1].kill();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    check_freed(bench).await;
}
