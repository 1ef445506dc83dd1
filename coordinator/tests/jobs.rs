//! Jobs over gRPC: who may join, who is waited for, and who is named when it does not come.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::time::{Duration, Instant};

use common::{Coordinator, in_place, join, patient, server};
use outboard_coordinator::Options;
use outboard_proto::{ErrorKind, v1};

#[tokio::test]
async fn a_job_starts_when_all_its_ranks_have_joined() {
    let coordinator = Coordinator::start(patient()).await;
    for (port, rank) in [(1, 1), (2, 0)] {
        coordinator.register(in_place(port, "job", rank)).await.unwrap();
    }
    coordinator.register(server(3)).await.unwrap();
    let first = coordinator.join(join("job", 1, 2));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!first.is_finished());
    let second = coordinator.join(join("job", 0, 2)).await.unwrap().unwrap();
    assert_eq!(first.await.unwrap().unwrap(), second);
    assert_eq!(second.numerics_id, "cpu-test");
    let ranks: Vec<_> = second.slots.iter().map(|slot| slot.rank).collect();
    assert_eq!(ranks, [Some(0), Some(1), None]);
    assert!(second.slots.iter().all(|slot| slot.weight == 1.0));
}

#[tokio::test]
async fn ranks_that_do_not_join_are_named() {
    let options = Options { join_timeout: Duration::from_millis(500), ..patient() };
    let coordinator = Coordinator::start(options).await;
    coordinator.register(server(1)).await.unwrap();
    let joins = [0, 2].map(|rank| coordinator.join(join("job", rank, 4)));
    for call in joins {
        let error = call.await.unwrap().unwrap_err();
        assert_eq!(error.kind, ErrorKind::Aborted);
        assert!(error.message.contains("job job: ranks 1, 3 of 4 did not join within 0.5 s"), "{error}");
    }
    // The name is free again.
    coordinator.join_all("job", 1).await;
}

#[tokio::test]
async fn missing_servers_are_counted_and_awaited() {
    let options = Options { join_timeout: Duration::from_millis(500), ..patient() };
    let coordinator = Coordinator::start(options).await;
    coordinator.register(server(1)).await.unwrap();
    let wish = |job| v1::JoinJobRequest { min_servers: 2, ..join(job, 0, 1) };
    let error = coordinator.join(wish("job")).await.unwrap().unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(error.message.contains("1 server that it can use in the pool, 2 needed"), "{error}");
    let waiting = coordinator.join(wish("job"));
    tokio::time::sleep(Duration::from_millis(50)).await;
    coordinator.register(server(2)).await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap().slots.len(), 2);
}

#[tokio::test]
async fn ranks_that_disagree_are_refused_by_field() {
    let coordinator = Coordinator::start(patient()).await;
    coordinator.register(server(1)).await.unwrap();
    let first = coordinator.join(join("job", 0, 2));
    tokio::time::sleep(Duration::from_millis(200)).await;
    let geometry = v1::HeadGeometry { scale: 0.5, ..join("job", 1, 2).geometry.unwrap() };
    let slot = v1::Slot { weight: 1.0, ..v1::Slot::default() };
    let rates = |flops, bytes| Some(v1::Rates { flops_per_second: flops, bytes_per_second: bytes });
    let with_rates = |flops, bytes| v1::JoinJobRequest { rates: rates(flops, bytes), ..join("job", 1, 2) };
    let cases = [
        ("rank 0 has joined already", join("job", 0, 2)),
        ("with ranks 3, ranks before it with 2", join("job", 1, 3)),
        ("rank is 2", join("job", 2, 2)),
        ("geometry", v1::JoinJobRequest { geometry: Some(geometry), ..join("job", 1, 2) }),
        ("min_servers 7", v1::JoinJobRequest { min_servers: 7, ..join("job", 1, 2) }),
        ("slots", v1::JoinJobRequest { slots: vec![slot], ..join("job", 1, 2) }),
        (
            "with rates of 1000000000000 FLOP/s and 5000 bytes/s, ranks before it with none",
            with_rates(1e12, 5e3),
        ),
        ("rates.bytes_per_second is 0; it must be finite and above zero", with_rates(1e12, 0.0)),
        ("geometry is missing", v1::JoinJobRequest { geometry: None, ..join("job", 1, 2) }),
        ("job is empty", join("", 1, 2)),
        ("ranks is 0", join("job", 0, 0)),
    ];
    for (what, request) in cases {
        let error = coordinator.join(request).await.unwrap().unwrap_err();
        assert_eq!(error.kind, ErrorKind::Invalid, "{error}");
        assert!(error.message.contains(what), "{what}: {error}");
    }
    let old = v1::JoinJobRequest { protocol_version: 99, ..join("job", 1, 2) };
    assert_eq!(coordinator.join(old).await.unwrap().unwrap_err().kind, ErrorKind::Unsupported);
    // None of this disturbed those who agree.
    coordinator.join(join("job", 1, 2)).await.unwrap().unwrap();
    first.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_name_is_taken_while_its_run_is_alive() {
    let coordinator = Coordinator::start(patient()).await;
    coordinator.register(server(1)).await.unwrap();
    let id = coordinator.join_all("job", 2).await;
    let error = coordinator.join(join("job", 0, 2)).await.unwrap().unwrap_err();
    assert_eq!(error.kind, ErrorKind::Invalid);
    assert!(error.message.contains("a run of that name is alive"), "{error}");
    // Finished when both have left, which may be said twice.
    for rank in [0, 1, 1] {
        coordinator.leave(id, rank, "").await.unwrap();
    }
    let next = coordinator.join_all("job", 2).await;
    assert_ne!(id, next);
    let error = coordinator.submit(id, 0, 0, Vec::new()).await.unwrap().unwrap_err();
    assert!(error.message.contains("has finished"), "{error}");
}

#[tokio::test]
async fn a_silent_run_loses_its_name() {
    let coordinator =
        Coordinator::start(Options { step_timeout: Duration::from_millis(100), ..patient() }).await;
    coordinator.register(server(1)).await.unwrap();
    let id = coordinator.join_all("job", 1).await;
    tokio::time::sleep(Duration::from_millis(150)).await;
    coordinator.join_all("job", 1).await;
    let error = coordinator.submit(id, 0, 0, Vec::new()).await.unwrap().unwrap_err();
    assert!(error.message.contains("another run of that name has begun"), "{error}");
}

#[tokio::test]
async fn a_call_to_join_that_is_dropped_gives_the_seat_back() {
    let coordinator = Coordinator::start(patient()).await;
    coordinator.register(server(1)).await.unwrap();
    let waiting = coordinator.join(join("job", 0, 2));
    tokio::time::sleep(Duration::from_millis(50)).await;
    waiting.abort();
    // A refusal comes at once; a seat that is free makes the call wait.
    let began = Instant::now();
    loop {
        let retry = coordinator.join(join("job", 0, 2));
        tokio::time::sleep(Duration::from_millis(50)).await;
        if !retry.is_finished() {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "the seat is not given back");
    }
}

#[tokio::test]
async fn a_rank_whose_in_place_server_is_gone_is_lost() {
    let coordinator = Coordinator::start(Options { lease: Duration::from_secs(1), ..patient() }).await;
    let servers = [0, 1].map(|rank| in_place(rank + 1, "job", rank));
    let mut ids = Vec::new();
    for server in servers {
        ids.push(coordinator.register(server).await.unwrap());
    }
    let job = coordinator.join_all("job", 2).await;
    let waiting = coordinator.submit(job, 0, 0, Vec::new());
    let error = loop {
        coordinator.heartbeat(ids[0]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        if waiting.is_finished() {
            break waiting.await.unwrap().unwrap_err();
        }
    };
    assert_eq!(error.kind, ErrorKind::Aborted);
    assert!(error.message.contains("job job: rank 1 is lost: its in-place server"), "{error}");
    assert!(error.message.contains("127.0.0.1:2 is gone (its lease ended)"), "{error}");
}

#[tokio::test]
async fn jobs_run_beside_each_other() {
    let coordinator = Coordinator::start(patient()).await;
    coordinator.register(server(1)).await.unwrap();
    let (one, two) = (coordinator.join_all("one", 2).await, coordinator.join_all("two", 2).await);
    let stuck = coordinator.submit(one, 0, 0, Vec::new());
    for step in 0..3 {
        let answers = coordinator.step(two, step, &[&[300, 20], &[1000]]).await;
        assert_eq!(answers[0].summary, answers[1].summary);
    }
    coordinator.leave(one, 1, "out of memory").await.unwrap();
    let error = stuck.await.unwrap().unwrap_err();
    assert!(error.message.contains("job one: rank 1 left it: out of memory"), "{error}");
    coordinator.step(two, 3, &[&[300], &[1000]]).await;
}
