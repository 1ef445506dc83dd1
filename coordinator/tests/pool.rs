//! The pool over gRPC: servers come and go while jobs run.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::time::{Duration, Instant};

use common::{Coordinator, cuts, patient, server, servers};
use outboard_coordinator::Options;
use outboard_proto::{ErrorKind, TaskError, v1};
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

const STEP: [&[usize]; 2] = [&[4000, 100], &[900]];

async fn three_servers(options: Options) -> (Coordinator, Vec<u64>, u64) {
    let coordinator = Coordinator::start(options).await;
    let mut ids = Vec::new();
    for port in 1..=3 {
        ids.push(coordinator.register(server(port)).await.unwrap());
    }
    let job = coordinator.join_all("job", 2).await;
    (coordinator, ids, job)
}

#[tokio::test]
async fn a_server_that_misses_its_lease_is_out_and_cuts_stay() {
    let (coordinator, ids, job) = three_servers(Options { lease: Duration::from_secs(1), ..patient() }).await;
    let before = coordinator.step(job, 0, &STEP).await;
    assert_eq!((servers(&before), before[0].plan_epoch), (ids.clone(), 0));
    while coordinator.pool().await.len() == 3 {
        for id in [ids[0], ids[2]] {
            coordinator.heartbeat(id).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let error = coordinator.heartbeat(ids[1]).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
    assert!(error.message.contains("register again"), "{error}");
    let after = coordinator.step(job, 1, &STEP).await;
    assert_eq!((servers(&after), after[0].plan_epoch), (vec![ids[0], ids[2]], 1));
    assert_eq!(cuts(&after), cuts(&before));
    assert_eq!(after[0].servers.iter().map(|s| s.id).collect::<Vec<_>>(), [ids[0], ids[2]]);
    // A newcomer takes the slot.
    let fourth = coordinator.register(server(4)).await.unwrap();
    let with_fourth = coordinator.step(job, 2, &STEP).await;
    assert_eq!((servers(&with_fourth), with_fourth[0].plan_epoch), (vec![ids[0], ids[2], fourth], 2));
    assert_eq!(cuts(&with_fourth), cuts(&before));
}

#[tokio::test]
async fn a_server_that_drains_gets_no_new_plans() {
    let (coordinator, ids, job) = three_servers(patient()).await;
    coordinator.client().drain_server(v1::DrainServerRequest { server_id: ids[0] }).await.unwrap();
    assert!(coordinator.heartbeat(ids[0]).await.unwrap());
    assert!(!coordinator.heartbeat(ids[1]).await.unwrap());
    let states: Vec<_> = coordinator.pool().await.iter().map(|entry| entry.state()).collect();
    assert_eq!(states, [v1::ServerState::Draining, v1::ServerState::Live, v1::ServerState::Live]);
    assert_eq!(servers(&coordinator.step(job, 0, &STEP).await), ids[1..]);
    let unknown =
        coordinator.client().drain_server(v1::DrainServerRequest { server_id: 1 }).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);
}

#[tokio::test]
async fn a_server_that_a_rank_gave_up_is_out_until_it_proves_itself() {
    let lease = Duration::from_secs(1);
    let (coordinator, ids, job) = three_servers(Options { lease, ..patient() }).await;
    coordinator.step(job, 0, &STEP).await;
    let lost = v1::ServerReport { server_id: ids[1], tasks: 0, compute_seconds: 0.0, lost: true };
    coordinator.report(job, 0, 0, vec![lost]).await.unwrap();
    assert_eq!(servers(&coordinator.step(job, 1, &STEP).await), [ids[0], ids[2]]);
    let began = Instant::now();
    for step in 2.. {
        tokio::time::sleep(Duration::from_millis(50)).await;
        for &id in &ids {
            coordinator.heartbeat(id).await.unwrap();
        }
        if servers(&coordinator.step(job, step, &STEP).await) == ids {
            break;
        }
        assert!(began.elapsed() < lease * 10, "it never comes back");
    }
    assert!(began.elapsed() > lease / 2, "it came back at its next heartbeat");
    let bad = v1::ServerReport { compute_seconds: f64::NAN, ..lost };
    let error = coordinator.report(job, 0, 2, vec![bad]).await.unwrap_err();
    assert!(error.message.contains("servers[0].compute_seconds is NaN"), "{error}");
}

#[tokio::test]
async fn another_numerics_id_never_takes_over() {
    let options = Options { step_timeout: Duration::from_millis(300), ..patient() };
    let (coordinator, ids, job) = three_servers(options).await;
    let other = v1::ServerInfo { numerics_ids: vec!["cuda-test".into()], ..server(9) };
    coordinator.register(other).await.unwrap();
    for id in ids {
        coordinator.client().drain_server(v1::DrainServerRequest { server_id: id }).await.unwrap();
    }
    let calls = [0, 1].map(|rank| coordinator.submit(job, rank, 0, common::documents(rank, &[50])));
    for call in calls {
        let error = call.await.unwrap().unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unavailable);
        assert!(error.message.contains("no server with numerics id cpu-test took its tasks"), "{error}");
    }
}

#[tokio::test]
async fn a_step_waits_for_a_server_to_come_back() {
    let (coordinator, ids, job) = three_servers(patient()).await;
    for &server_id in &ids {
        coordinator.client().drain_server(v1::DrainServerRequest { server_id }).await.unwrap();
    }
    let calls = [0, 1].map(|rank| coordinator.submit(job, rank, 0, common::documents(rank, &[50])));
    tokio::time::sleep(Duration::from_millis(50)).await;
    let late = coordinator.register(server(9)).await.unwrap();
    for call in calls {
        let answer = call.await.unwrap().unwrap();
        assert!(answer.tasks.iter().all(|task| task.server_id == late));
    }
}

#[tokio::test]
async fn bad_servers_are_refused_by_field() {
    let coordinator = Coordinator::start(Options { max_servers: 1, ..patient() }).await;
    let twice = vec!["cpu-test".to_owned(); 2];
    let cases = [
        ("server.address", v1::ServerInfo { address: "here".into(), ..server(1) }),
        ("server.memory_bytes is 0", v1::ServerInfo { memory_bytes: 0, ..server(1) }),
        ("server.dtypes[0] is 77", v1::ServerInfo { dtypes: vec![77], ..server(1) }),
        ("holds 1 entries and server.dtypes 2", v1::ServerInfo { dtypes: vec![1, 2], ..server(1) }),
        (
            "server.dtypes[1] is f32 again",
            v1::ServerInfo { dtypes: vec![1, 1], numerics_ids: twice, ..server(1) },
        ),
        ("server.rank is 1 and server.job empty", v1::ServerInfo { rank: Some(1), ..server(1) }),
        ("server.rank missing", v1::ServerInfo { job: "job".into(), ..server(1) }),
    ];
    for (what, server) in cases {
        let error = coordinator.register(server).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Invalid);
        assert!(error.message.contains(what), "{what}: {error}");
    }
    coordinator.register(server(1)).await.unwrap();
    let error = coordinator.register(server(2)).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy);
    coordinator.register(server(1)).await.unwrap();
}

#[tokio::test]
async fn shutdown_ends_waiting_calls_with_a_reason() {
    let coordinator = Coordinator::start(patient()).await;
    coordinator.register(server(1)).await.unwrap();
    let endpoint = Endpoint::from_shared(format!("http://{}", coordinator.address)).unwrap();
    let mut health = HealthClient::new(endpoint.connect().await.unwrap());
    let request = HealthCheckRequest { service: "outboard.v1.CoordinatorService".into() };
    let status = health.check(request).await.unwrap().into_inner().status();
    assert_eq!(status, ServingStatus::Serving);
    let job = coordinator.join_all("job", 2).await;
    let waiting = coordinator.submit(job, 0, 0, Vec::new());
    tokio::time::sleep(Duration::from_millis(200)).await;
    coordinator.stop.cancel();
    let error: TaskError = waiting.await.unwrap().unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(error.message.contains("shutting down"), "{error}");
    let served = tokio::time::timeout(Duration::from_secs(10), coordinator.served).await;
    served.expect("the coordinator does not end").unwrap().unwrap();
}
