//! One suite of scenarios of tasks whose keys lie at homes, run against every transport.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[macro_use]
mod support;

use std::sync::atomic::Ordering::SeqCst;

use futures::future::join_all;
use outboard_attention::{DType, Direction, Span};
use outboard_proto::{ErrorKind, KeyHome, RetryHint};
use outboard_transport::grpc::LinkConfig;
use outboard_transport::{KeyShare, Keys, TaskRequest};
use support::*;

scenarios!(
    keys_at_homes_give_the_bits_of_a_direct_computation,
    keys_of_many_chunks_are_fetched_and_their_gradients_delivered,
    thousands_of_homes_are_no_hurdle,
    shipments_beyond_the_memory_wait_for_keys_and_go_through,
    keys_that_do_not_fit_together_are_fetched_one_after_another,
    a_refused_task_leaves_shared_keys_to_others,
    the_same_task_sent_twice_is_taken_once,
    homes_that_do_not_hold_together_are_refused_at_the_caller,
);

const MIB: u64 = 1 << 20;

async fn keys_at_homes_give_the_bits_of_a_direct_computation(kind: Kind) {
    let mut rng = Rng(21);
    for count in 1..=4 {
        for beside in [false, true] {
            let mut specs = vec![Spec::Real; count];
            if beside {
                specs[0] = Spec::Beside;
            }
            let places = Places::start(&specs).await;
            let handler = TestHandler::new(256 * MIB);
            let bench = Bench::with_homes(kind, handler, places.way(quick())).await;
            let shipments: Vec<_> = (0..3)
                .map(|step| {
                    let shape = kind.random(&mut rng);
                    let drawn = drawn(&mut rng, shape);
                    let cut = Cut { parts: rng.between(1, 7), at: &everywhere(&places) };
                    at_homes(&mut rng, drawn, step, &places, cut)
                })
                .collect();
            join_all(shipments.iter().map(|homed| check_all(&bench, &places, homed))).await;
            let bytes = shipments.iter().map(|homed| homed.network_bytes(&places));
            let (delivered, fetched) = bytes.fold((0, 0), |sum, more| (sum.0 + more.0, sum.1 + more.1));
            let shipped = bench.transport.traffic();
            assert_eq!(
                places.traffic(),
                (delivered, fetched),
                "keys are fetched once for all that share them"
            );
            eventually("the server counts the same bytes", || {
                let counted = (bench.handler.received.load(SeqCst), bench.handler.sent.load(SeqCst));
                counted == (shipped.sent + fetched, shipped.received + delivered)
            })
            .await;
            check_freed(bench).await;
        }
    }
}

async fn keys_of_many_chunks_are_fetched_and_their_gradients_delivered(kind: Kind) {
    let places = Places::start(&[Spec::Beside, Spec::Real, Spec::Real]).await;
    let bench = Bench::with_homes(kind, TestHandler::new(512 * MIB), places.way(quick())).await;
    let mut rng = Rng(22);
    let shape =
        Shape { tokens: 4000, kv_heads: 3, head_dim: 100, v_head_dim: 64, ..kind.small(Direction::Backward) };
    let drawn = drawn(&mut rng, shape);
    let homed = at_homes(&mut rng, drawn, 0, &places, Cut { parts: 4, at: &everywhere(&places) });
    check_all(&bench, &places, &homed).await;
    check_freed(bench).await;
}

async fn thousands_of_homes_are_no_hurdle(kind: Kind) {
    let places = Places::start(&[Spec::Beside, Spec::Real, Spec::Real]).await;
    // One connection serves 1024 calls at once, and has room for less than all keys.
    let link = LinkConfig { window_bytes: 1 << 16, ..quick() };
    let bench = Bench::with_homes(kind, TestHandler::new(512 * MIB), places.way(link)).await;
    let mut rng = Rng(23);
    let direction = if kind.dtype == DType::F32 { Direction::Backward } else { Direction::Forward };
    let shape =
        Shape { tasks: 2, tokens: 6000, kv_heads: 1, head_dim: 32, v_head_dim: 32, ..kind.small(direction) };
    let drawn = drawn(&mut rng, shape);
    let homed = at_homes(&mut rng, drawn, 0, &places, Cut { parts: 5000, at: &everywhere(&places) });
    check_all(&bench, &places, &homed).await;
    check_freed(bench).await;
}

async fn shipments_beyond_the_memory_wait_for_keys_and_go_through(kind: Kind) {
    let places = Places::start(&[Spec::Beside, Spec::Real, Spec::Real]).await;
    let bench = Bench::with_homes(kind, TestHandler::new(4 * MIB), places.way(quick())).await;
    let mut rng = Rng(24);
    let shipments: Vec<_> = (0..50)
        .map(|step| {
            let shape = Shape { tokens: rng.between(50, 250), tasks: 4, ..kind.random(&mut rng) };
            let drawn = drawn(&mut rng, shape);
            at_homes(&mut rng, drawn, step, &places, Cut { parts: 4, at: &everywhere(&places) })
        })
        .collect();
    join_all(shipments.iter().map(|homed| check_all(&bench, &places, homed))).await;
    assert!(bench.handler.peak.load(SeqCst) <= bench.handler.budget.limit());
    check_freed(bench).await;
}

async fn keys_that_do_not_fit_together_are_fetched_one_after_another(kind: Kind) {
    let places = Places::start(&[Spec::Real, Spec::Real]).await;
    // One request can get 1.5 MiB. The keys of either head take 0.96 MB or more.
    let bench = Bench::with_homes(kind, TestHandler::new(2 * MIB), places.way(quick())).await;
    let dim = 400 / kind.dtype.bytes();
    let shape = Shape {
        tasks: 600,
        tokens: 1400,
        group: 1,
        head_dim: dim,
        v_head_dim: dim,
        ..kind.small(Direction::Forward)
    };
    let mut rng = Rng(25);
    let mut drawn = drawn(&mut rng, shape);
    let fits = |task: &TaskRequest| {
        let task = &task.header.task;
        let results = task.q().len() * (dim + 1) * 4;
        task.kv_heads().len() == 1 && task.kv().end() > 1200 && (50_000..200_000).contains(&results)
    };
    drawn.tasks.retain(fits);
    let (mut first, mut second): (Vec<_>, Vec<_>) =
        drawn.tasks.into_iter().partition(|task| task.header.task.kv_heads() == Span::to(1));
    first.truncate(4);
    second.truncate(4);
    drawn.tasks = first.into_iter().zip(second).flat_map(|(one, other)| [one, other]).collect();
    assert!(drawn.tasks.len() >= 6, "{} tasks were drawn", drawn.tasks.len());
    let homed = at_homes(&mut rng, drawn, 0, &places, Cut { parts: 5, at: &everywhere(&places) });
    check_all(&bench, &places, &homed).await;
    check_freed(bench).await;
}

async fn a_refused_task_leaves_shared_keys_to_others(kind: Kind) {
    let places = Places::start(&[Spec::Beside, Spec::Real]).await;
    let bench = Bench::with_homes(kind, TestHandler::new(64 * MIB), places.way(quick())).await;
    let mut rng = Rng(30);
    for step in 0..10 {
        let drawn = drawn(&mut rng, few_keys(kind, Direction::Backward));
        let mut homed = at_homes(&mut rng, drawn, step, &places, Cut { parts: 6, at: &[0, 1] });
        // The first task carries what the others share.
        homed.tasks[0].header.numerics_id = Some("other-7".to_owned());
        let mut outcomes = join_all(bench.transport.ship(homed.tasks.clone())).await;
        assert_eq!(outcomes.remove(0).expect_err("refused").kind, ErrorKind::NumericsMismatch);
        for (n, outcome) in outcomes.into_iter().enumerate() {
            homed.check(n + 1, &outcome.expect("the others go through"));
        }
        homed.check_delivered(&places, 1..homed.tasks.len());
    }
    check_freed(bench).await;
}

async fn the_same_task_sent_twice_is_taken_once(kind: Kind) {
    let places = Places::start(&[Spec::Beside, Spec::Real, Spec::Real]).await;
    let bench = Bench::with_homes(kind, TestHandler::new(64 * MIB), places.way(quick())).await;
    let mut rng = Rng(33);
    let drawn = drawn(&mut rng, few_keys(kind, Direction::Backward));
    let homed = at_homes(&mut rng, drawn, 0, &places, Cut { parts: 5, at: &everywhere(&places) });
    let deliveries = || places.0.iter().map(|place| place.home.deliveries.load(SeqCst)).sum::<u64>();
    check_all(&bench, &places, &homed).await;
    let once = deliveries();
    check_all(&bench, &places, &homed).await;
    assert!(once > 0 && deliveries() == 2 * once, "{once}, then {}", deliveries());
    check_freed(bench).await;
}

/// A change to a shipment whose tasks share their keys; the last task is refused by it, the others go through.
async fn refused(kind: Kind, expected: &str, change: impl Fn(&mut TaskRequest, &[KeyHome], &TaskRequest)) {
    let places = Places::start(&[Spec::Beside]).await;
    let bench = Bench::with_homes(kind, TestHandler::new(64 * MIB), places.way(quick())).await;
    let mut rng = Rng(34);
    let drawn = drawn(&mut rng, few_keys(kind, Direction::Forward));
    let direct = drawn.tasks[0].clone();
    let mut homed = at_homes(&mut rng, drawn, 0, &places, Cut { parts: 1, at: &[0] });
    let last = homed.tasks.last_mut().unwrap();
    let homes = last.header.key_homes.clone();
    change(last, &homes, &direct);
    let mut outcomes = join_all(bench.transport.ship(homed.tasks.clone())).await;
    let error = outcomes.pop().unwrap().expect_err(expected);
    assert_eq!((error.kind, error.retry), (ErrorKind::Invalid, RetryHint::Never), "{error}");
    assert!(error.message.contains(expected), "{error}");
    for (n, outcome) in outcomes.into_iter().enumerate() {
        homed.check(n, &outcome.expect("the others go through"));
    }
    check_freed(bench).await;
}

async fn homes_that_do_not_hold_together_are_refused_at_the_caller(kind: Kind) {
    let span = |start, end| Span::new(start, end).unwrap();
    let alone = |task: &mut TaskRequest| task.keys = Keys::AtHomes(KeyShare::default());
    let halves = |homes: &[KeyHome], [one, other]: [Span; 2]| {
        let home = |tokens| KeyHome { tokens, ..homes[0].clone() };
        vec![home(one), home(other)]
    };
    refused(kind, "without a gap", |task, homes, _| {
        alone(task);
        task.header.key_homes = halves(homes, [span(0, 50), span(51, 120)]);
    })
    .await;
    refused(kind, "without a gap", |task, homes, _| {
        alone(task);
        task.header.key_homes = halves(homes, [span(50, 120), span(0, 50)]);
    })
    .await;
    refused(kind, "kv", |task, homes, _| {
        alone(task);
        let end = task.header.task.kv().end();
        task.header.key_homes = halves(homes, [span(end, end + 1), span(end + 1, end + 2)]);
    })
    .await;
    refused(kind, "kv", |task, _, _| {
        alone(task);
        task.header.key_homes.clear();
    })
    .await;
    refused(kind, "address of rank 10 is empty", |task, _, _| {
        alone(task);
        task.header.key_homes[0].address.clear();
    })
    .await;
    refused(kind, "at most 8192", |task, homes, _| {
        alone(task);
        let home = |n| KeyHome { tokens: span(n, n + 1), ..homes[0].clone() };
        task.header.key_homes = (0..8193).map(home).collect();
    })
    .await;
    refused(kind, "share only what is the same", |task, _, _| task.header.step += 1).await;
    refused(kind, "share only what is the same", |task, homes, _| {
        let [start, end] = [homes[0].tokens.start(), homes[0].tokens.end()];
        task.header.key_homes = halves(homes, [span(start, end - 1), span(end - 1, end)]);
    })
    .await;
    refused(kind, "holds the keys themselves", |task, homes, direct| {
        *task = direct.clone();
        task.header.key_homes = homes.to_vec();
    })
    .await;
}
