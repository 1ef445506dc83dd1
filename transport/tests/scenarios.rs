//! One suite of scenarios, run against every transport.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[macro_use]
mod support;

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use futures::future::join_all;
use outboard_attention::{DType, Direction, Elements, Span, TensorSlice};
use outboard_proto::{ErrorKind, RetryHint};
use outboard_transport::{Keys, Pending, TaskRequest, Transport};
use support::*;

scenarios!(
    results_have_the_bits_of_a_direct_computation,
    tensors_of_many_chunks_arrive,
    shipments_beyond_the_memory_wait_and_go_through,
    a_shipment_larger_than_the_memory_is_split,
    a_task_larger_than_the_memory_fails_at_once,
    dropping_a_pending_task_cancels_it,
    cancelled_tasks_leave_shared_tensors_to_others,
    tasks_that_wait_for_room_can_be_cancelled,
    a_task_ends_at_its_deadline,
    a_task_that_waits_for_room_ends_at_its_deadline,
    errors_of_the_handler_reach_the_caller_and_leave_others_alone,
    another_numerics_id_is_refused,
    an_element_type_that_the_server_lacks_is_refused,
    tensors_that_do_not_fit_are_refused_at_the_caller,
);

const MIB: u64 = 1 << 20;

/// Ships and awaits all, each equal to the direct computation.
async fn check_all(transport: &dyn Transport, shipment: Vec<TaskRequest>) {
    let id = numerics_id(shipment[0].header.geometry.dtype());
    let expected: Vec<_> =
        shipment.iter().map(|task| compute(&task.header, &task.inputs().unwrap())).collect();
    for (outcome, expected) in join_all(transport.ship(shipment)).await.into_iter().zip(expected) {
        let outcome = outcome.expect("the task succeeds");
        assert!(outcome.results == expected, "results differ from the direct computation");
        assert_eq!(&*outcome.numerics_id, id);
        assert_eq!((outcome.queued.as_millis(), outcome.compute.as_millis()), (250, 500));
    }
}

async fn results_have_the_bits_of_a_direct_computation(kind: Kind) {
    let bench = Bench::new(kind, 256 * MIB).await;
    let mut rng = Rng(1);
    for _ in 0..20 {
        let shipments: Vec<_> = (0..3)
            .map(|_| {
                let shape = kind.random(&mut rng);
                shipment(&mut rng, shape)
            })
            .collect();
        join_all(shipments.into_iter().map(|shipment| check_all(&*bench.transport, shipment))).await;
    }
    if let Link::Grpc { .. } = kind.link {
        let traffic = bench.transport.traffic();
        assert!(traffic.sent > 0 && traffic.received > 0);
        eventually("both ends count the same bytes", || {
            (traffic.sent, traffic.received)
                == (bench.handler.received.load(SeqCst), bench.handler.sent.load(SeqCst))
        })
        .await;
    }
    assert_eq!(bench.transport.numerics_ids(), DType::ALL.map(numerics_id));
    check_freed(bench).await;
}

async fn tensors_of_many_chunks_arrive(kind: Kind) {
    let bench = Bench::new(kind, 512 * MIB).await;
    let mut rng = Rng(2);
    for direction in [Direction::Forward, Direction::Backward] {
        let shape = Shape {
            tokens: 5000,
            kv_heads: 4,
            group: 2,
            head_dim: 100,
            v_head_dim: 64,
            ..kind.small(direction)
        };
        check_all(&*bench.transport, shipment(&mut rng, shape)).await;
    }
    check_freed(bench).await;
}

async fn shipments_beyond_the_memory_wait_and_go_through(kind: Kind) {
    let bench = Bench::new(kind, 4 * MIB).await;
    let mut rng = Rng(3);
    let shipments: Vec<_> = (0..60)
        .map(|_| {
            let shape = Shape { tokens: rng.between(100, 800), tasks: 2, ..kind.random(&mut rng) };
            shipment(&mut rng, shape)
        })
        .collect();
    join_all(shipments.into_iter().map(|shipment| check_all(&*bench.transport, shipment))).await;
    assert!(bench.handler.peak.load(SeqCst) <= bench.handler.budget.limit());
    check_freed(bench).await;
}

async fn a_shipment_larger_than_the_memory_is_split(kind: Kind) {
    let bench = Bench::new(kind, 2 * MIB).await;
    let mut rng = Rng(4);
    // Each task needs less than the 1.5 MiB that one request can get, all together more.
    let shape =
        Shape { tasks: 12, tokens: 600, head_dim: 64, v_head_dim: 64, ..kind.small(Direction::Forward) };
    check_all(&*bench.transport, shipment(&mut rng, shape)).await;
    check_freed(bench).await;
}

async fn a_task_larger_than_the_memory_fails_at_once(kind: Kind) {
    let bench = Bench::new(kind, MIB).await;
    let mut rng = Rng(5);
    let shape =
        Shape { tasks: 1, tokens: 20_000, head_dim: 64, v_head_dim: 64, ..kind.small(Direction::Forward) };
    let mut tasks = shipment(&mut rng, shape);
    // The whole document, whatever piece was drawn.
    while tasks[0].header.task.q().len() < 10_000 {
        tasks = shipment(&mut rng, shape);
    }
    let small = shipment(&mut rng, kind.small(Direction::Forward));
    tasks.extend(small);
    let mut outcomes = join_all(bench.transport.ship(tasks)).await;
    let error = outcomes.remove(0).expect_err("it can never fit");
    assert_eq!((error.kind, error.retry), (ErrorKind::TooLarge, RetryHint::Elsewhere));
    assert!(error.message.contains(&bench.handler.budget.largest().to_string()), "{error}");
    assert!(error.message.contains("step 5, layer 1"), "{error}");
    outcomes.into_iter().for_each(|outcome| drop(outcome.expect("small tasks fit")));
    check_freed(bench).await;
}

async fn dropping_a_pending_task_cancels_it(kind: Kind) {
    let bench = Bench::new(kind, 64 * MIB).await;
    bench.handler.hold.store(true, SeqCst);
    let pendings = bench.transport.ship(shipment(&mut Rng(6), kind.small(Direction::Backward)));
    let handler = &bench.handler;
    eventually("all tasks are held", || handler.held() == 3).await;
    drop(pendings);
    eventually("the handler sees it", || handler.all_held_are_cancelled()).await;
    handler.release();
    check_all(&*bench.transport, shipment(&mut Rng(7), kind.small(Direction::Forward))).await;
    check_freed(bench).await;
}

async fn cancelled_tasks_leave_shared_tensors_to_others(kind: Kind) {
    let bench = Bench::new(kind, 256 * MIB).await;
    let mut rng = Rng(8);
    for _ in 0..10 {
        let shape = Shape { tasks: 8, tokens: 3000, kv_heads: 1, ..kind.small(Direction::Forward) };
        let tasks = shipment(&mut rng, shape);
        let expected: Vec<_> =
            tasks.iter().map(|task| compute(&task.header, &task.inputs().unwrap())).collect();
        let mut kept: Vec<(usize, Pending)> = Vec::new();
        for (n, pending) in bench.transport.ship(tasks).into_iter().enumerate() {
            if rng.between(0, 1) == 0 {
                kept.push((n, pending));
            }
        }
        for (n, pending) in kept {
            assert!(pending.await.expect("it was not cancelled").results == expected[n]);
        }
    }
    check_freed(bench).await;
}

/// Fills the memory with held tasks.
async fn fill(kind: Kind, bench: &Bench) -> Vec<Pending> {
    bench.handler.hold.store(true, SeqCst);
    let shape =
        Shape { tasks: 1, tokens: 700, head_dim: 64, v_head_dim: 64, ..kind.small(Direction::Forward) };
    let mut held = Vec::new();
    let mut rng = Rng(9);
    let room = bench.handler.budget.largest();
    while bench.handler.budget.used() + 400_000 < room {
        let before = bench.handler.held();
        let mut task = shipment(&mut rng, shape);
        while !(350..500).contains(&task[0].header.task.q().len())
            || task[0].header.task.kv_heads().len() != 2
        {
            task = shipment(&mut rng, shape);
        }
        held.extend(bench.transport.ship(task));
        eventually("the task is held", || bench.handler.held() > before).await;
    }
    held
}

fn large(kind: Kind) -> Vec<TaskRequest> {
    let shape =
        Shape { tasks: 1, tokens: 900, head_dim: 64, v_head_dim: 64, ..kind.small(Direction::Forward) };
    let mut rng = Rng(10);
    loop {
        let tasks = shipment(&mut rng, shape);
        if (600..800).contains(&tasks[0].header.task.q().len())
            && tasks[0].header.task.kv_heads() == Span::to(2)
        {
            return tasks;
        }
    }
}

async fn tasks_that_wait_for_room_can_be_cancelled(kind: Kind) {
    let bench = Bench::new(kind, 4 * MIB).await;
    let held = fill(kind, &bench).await;
    let before = bench.handler.held();
    let waiting = bench.transport.ship(large(kind));
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(waiting);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(bench.handler.held(), before);
    bench.handler.release();
    join_all(held).await.into_iter().for_each(|outcome| drop(outcome.expect("held tasks go through")));
    check_all(&*bench.transport, large(kind)).await;
    check_freed(bench).await;
}

async fn a_task_ends_at_its_deadline(kind: Kind) {
    let bench = Bench::new(kind, 64 * MIB).await;
    bench.handler.hold.store(true, SeqCst);
    let mut tasks = shipment(&mut Rng(11), kind.small(Direction::Forward));
    tasks[1].header.deadline = Some(Duration::from_millis(200));
    let mut pendings = bench.transport.ship(tasks);
    let error = pendings.remove(1).await.expect_err("it is held beyond its deadline");
    assert_eq!(error.kind, ErrorKind::DeadlineExceeded);
    assert!(error.message.contains("step 5, layer 1"), "{error}");
    let handler = &bench.handler;
    eventually("the handler sees it", || {
        let held = handler.held.lock().unwrap();
        held.len() == 3 && held.iter().filter(|task| task.reply.is_cancelled()).count() == 1
    })
    .await;
    handler.release();
    join_all(pendings).await.into_iter().for_each(|outcome| drop(outcome.expect("the others go through")));
    check_freed(bench).await;
}

async fn a_task_that_waits_for_room_ends_at_its_deadline(kind: Kind) {
    let bench = Bench::new(kind, 4 * MIB).await;
    let held = fill(kind, &bench).await;
    let mut waiting = large(kind);
    waiting[0].header.deadline = Some(Duration::from_millis(200));
    let outcome = bench.transport.ship(waiting).remove(0).await;
    assert_eq!(outcome.expect_err("there is no room").kind, ErrorKind::DeadlineExceeded);
    bench.handler.release();
    join_all(held).await.into_iter().for_each(|outcome| drop(outcome.expect("held tasks go through")));
    check_freed(bench).await;
}

async fn errors_of_the_handler_reach_the_caller_and_leave_others_alone(kind: Kind) {
    let bench = Bench::new(kind, 64 * MIB).await;
    let mut rng = Rng(12);
    for _ in 0..10 {
        let shape = Shape { tasks: 6, kv_heads: 1, ..kind.small(Direction::Backward) };
        let mut tasks = shipment(&mut rng, shape);
        // The first task carries what the others share.
        tasks[0].header.layer = ADMIT_FAILS;
        tasks[3].header.layer = COMPUTE_FAILS;
        let expected: Vec<_> =
            tasks.iter().map(|task| compute(&task.header, &task.inputs().unwrap())).collect();
        for (n, outcome) in join_all(bench.transport.ship(tasks)).await.into_iter().enumerate() {
            match n {
                0 => {
                    let error = outcome.expect_err("refused");
                    assert_eq!((error.kind, error.retry), (ErrorKind::Unsupported, RetryHint::Elsewhere));
                    assert!(error.message.contains("refused on purpose"), "{error}");
                    assert!(error.message.contains("step 5, layer 98, backward, document 0.3"), "{error}");
                }
                3 => {
                    let error = outcome.expect_err("failed");
                    assert_eq!((error.kind, error.retry), (ErrorKind::Internal, RetryHint::Later));
                    assert!(error.message.contains("computing failed on purpose"), "{error}");
                }
                _ => assert!(outcome.expect("the others go through").results == expected[n]),
            }
        }
    }
    check_freed(bench).await;
}

async fn another_numerics_id_is_refused(kind: Kind) {
    let bench = Bench::new(kind, 64 * MIB).await;
    let mut tasks = shipment(&mut Rng(13), kind.small(Direction::Forward));
    tasks[0].header.numerics_id = Some("other-7".to_owned());
    tasks[1].header.numerics_id = Some(numerics_id(kind.dtype).to_owned());
    // What it has for another element type is another id too.
    let other = if kind.dtype == DType::F32 { DType::F16 } else { DType::F32 };
    tasks[2].header.numerics_id = Some(numerics_id(other).to_owned());
    let mut outcomes = join_all(bench.transport.ship(tasks)).await;
    for (n, required) in [(2, numerics_id(other)), (0, "other-7")] {
        let error = outcomes.remove(n).expect_err("other bits");
        assert_eq!(error.kind, ErrorKind::NumericsMismatch);
        let said = [required, numerics_id(kind.dtype)].iter().all(|id| error.message.contains(id));
        assert!(said, "{error}");
    }
    outcomes.into_iter().for_each(|outcome| drop(outcome.expect("the other goes through")));
    check_freed(bench).await;
}

async fn an_element_type_that_the_server_lacks_is_refused(kind: Kind) {
    let handler = TestHandler::new(64 * MIB);
    *handler.lacks.lock().unwrap() = Some(kind.dtype);
    let bench = Bench::with(kind, handler).await;
    for outcome in
        join_all(bench.transport.ship(shipment(&mut Rng(15), kind.small(Direction::Backward)))).await
    {
        let error = outcome.expect_err("it is not computed there");
        assert_eq!((error.kind, error.retry), (ErrorKind::Unsupported, RetryHint::Elsewhere));
        assert!(error.message.contains(&format!("geometry.dtype is {}", kind.dtype)), "{error}");
    }
    let others = DType::ALL.into_iter().filter(|&dtype| dtype != kind.dtype);
    for dtype in others.clone() {
        check_all(
            &*bench.transport,
            shipment(&mut Rng(16), Kind { dtype, ..kind }.small(Direction::Forward)),
        )
        .await;
    }
    assert_eq!(bench.transport.numerics_ids(), others.map(numerics_id).collect::<Vec<_>>());
    check_freed(bench).await;
}

async fn tensors_that_do_not_fit_are_refused_at_the_caller(kind: Kind) {
    let bench = Bench::new(kind, 64 * MIB).await;
    let mut rng = Rng(14);
    let mut tasks = shipment(&mut rng, Shape { tasks: 5, ..kind.small(Direction::Backward) });
    let zeros = |like: &TensorSlice, dtype| {
        let elements = vec![0.0; like.tokens().len() * like.heads() * like.dim()];
        let elements = Elements::rounded(dtype, elements);
        TensorSlice::contiguous("zeros", elements, like.tokens(), like.heads(), like.dim()).unwrap()
    };
    let other = if kind.dtype == DType::Bf16 { DType::F32 } else { DType::Bf16 };
    tasks[0].q = tasks[0].inputs().unwrap().k;
    tasks[1].gradient = None;
    let Keys::Here { v, .. } = &mut tasks[2].keys else { panic!("the client has the keys") };
    *v = zeros(v, other);
    let gradient = tasks[3].gradient.as_mut().unwrap();
    gradient.lse = zeros(&gradient.lse, DType::Bf16);
    let wrong_type = format!("v holds {other}; the geometry says {}", kind.dtype);
    let mut outcomes = join_all(bench.transport.ship(tasks)).await;
    for (n, expected) in [(0, "q"), (1, "dO"), (2, &wrong_type), (3, "lse holds bf16; LSE and D are f32")] {
        let error = outcomes[n].as_ref().expect_err("it does not fit");
        assert_eq!((error.kind, error.retry), (ErrorKind::Invalid, RetryHint::Never));
        assert!(error.message.contains(expected), "{error}");
    }
    outcomes.remove(4).expect("the other goes through");
    check_freed(bench).await;
}
