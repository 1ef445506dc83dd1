//! Steps over gRPC: one plan for all ranks, whatever the order of arrival, and bounded waits.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use common::{Coordinator, cuts, documents, geometry, in_place, join, patient, server, servers};
use outboard_attention::{DType, Document, Span, StepPlan, TickPlan};
use outboard_coordinator::{Handle, Options, RankSpec, ServerSpec, Submission, Terms};
use outboard_proto::{AssignedTask, ErrorKind, v1};

const RANK_0: &[usize] = &[4000, 100, 33];
const RANK_1: &[usize] = &[700, 1];

async fn two_ranks(options: Options) -> (Coordinator, u64) {
    let coordinator = Coordinator::start(options).await;
    for rank in [0, 1] {
        coordinator.register(in_place(rank + 1, "job", rank)).await.unwrap();
    }
    let job = coordinator.join_all("job", 2).await;
    (coordinator, job)
}

#[tokio::test]
async fn all_ranks_get_their_part_of_one_plan() {
    let (coordinator, job) = two_ranks(patient()).await;
    let answers = coordinator.step(job, 0, &[RANK_0, RANK_1]).await;
    let summary = answers[0].summary.unwrap();
    assert_eq!(answers[1].summary, Some(summary));
    assert!(summary.imbalance_before > 1.5 && summary.imbalance_after < 1.05, "{summary:?}");
    assert!(summary.forward_bytes > 0 && summary.backward_bytes > 0, "{summary:?}");
    for (rank, answer) in (0..).zip(&answers) {
        assert!(answer.tasks.iter().all(|task| task.document.unwrap().rank == rank));
        assert_eq!(answer.servers.len(), 2);
    }
    // Both parts together compute every cell once.
    let tasks = answers.iter().flat_map(|a| a.tasks.iter().cloned());
    let tasks: Vec<_> = tasks.map(|task| AssignedTask::try_from(task).unwrap().task).collect();
    assert_eq!(tasks.len() as u64, summary.tasks);
    let plan = StepPlan { ticks: vec![TickPlan { tick: 0, tasks }], slots: 2 };
    let all = [documents(0, RANK_0), documents(1, RANK_1)].concat();
    let all: Vec<Document> = all.into_iter().map(|d| d.try_into().unwrap()).collect();
    plan.check(&all, &geometry()).unwrap();
    // Each slot is on its rank's server.
    let mut ids: Vec<u64> = answers[0].servers.iter().map(|server| server.id).collect();
    ids.sort_by_key(|id| answers[0].servers.iter().find(|s| s.id == *id).unwrap().rank);
    for task in answers.iter().flat_map(|answer| &answer.tasks) {
        assert_eq!(task.server_id, ids[task.slot as usize]);
    }
}

#[tokio::test]
async fn the_order_of_arrival_does_not_matter() {
    let mut plans = Vec::new();
    for order in [[0, 1], [1, 0]] {
        let (coordinator, job) = two_ranks(patient()).await;
        let mut calls = Vec::new();
        for rank in order {
            let lengths = if rank == 0 { RANK_0 } else { RANK_1 };
            calls.push((rank, coordinator.submit(job, rank, 0, documents(rank, lengths))));
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        calls.sort_by_key(|(rank, _)| *rank);
        let mut answers = Vec::new();
        for (_, call) in calls {
            answers.push(call.await.unwrap().unwrap());
        }
        plans.push(cuts(&answers));
    }
    assert_eq!(plans[0], plans[1]);
}

#[tokio::test]
async fn steps_are_planned_ahead() {
    let (coordinator, job) = two_ranks(Options { steps_ahead: 2, ..patient() }).await;
    let first = coordinator.submit(job, 0, 0, documents(0, RANK_0));
    tokio::time::sleep(Duration::from_millis(200)).await;
    let second = coordinator.submit(job, 0, 1, documents(0, RANK_1));
    tokio::time::sleep(Duration::from_millis(200)).await;
    let error = coordinator.submit(job, 0, 2, Vec::new()).await.unwrap().unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy);
    assert!(
        error.message.contains("job job, step 2, rank 0: it is 2 or more steps ahead of step 0"),
        "{error}"
    );
    for step in 0..2 {
        coordinator.submit(job, 1, step, Vec::new()).await.unwrap().unwrap();
    }
    assert_eq!(first.await.unwrap().unwrap().summary.unwrap().cells, cells_of(RANK_0));
    assert_eq!(second.await.unwrap().unwrap().summary.unwrap().cells, cells_of(RANK_1));
}

/// Cells of causal documents over two kv heads.
fn cells_of(lengths: &[usize]) -> u64 {
    lengths.iter().map(|&n| (n * (n + 1)) as u64).sum()
}

#[tokio::test]
async fn a_rank_that_does_not_submit_is_named_in_time() {
    let (coordinator, job) = two_ranks(Options { step_timeout: Duration::from_secs(1), ..patient() }).await;
    coordinator.step(job, 0, &[RANK_0, RANK_1]).await;
    let began = std::time::Instant::now();
    let error = coordinator.submit(job, 0, 1, Vec::new()).await.unwrap().unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!(error.kind, ErrorKind::Aborted);
    assert!(error.message.contains("job job: step 1: rank 1 did not submit it within 1.0 s"), "{error}");
    assert!(error.message.contains("rank 1 submitted step 0 last"), "{error}");
    // The late rank learns that it was given up.
    let error = coordinator.submit(job, 1, 1, Vec::new()).await.unwrap().unwrap_err();
    assert_eq!(error.kind, ErrorKind::Aborted);
}

#[tokio::test]
async fn a_rank_that_leaves_is_named_with_its_reason() {
    let (coordinator, job) = two_ranks(patient()).await;
    let waiting = coordinator.submit(job, 0, 0, documents(0, RANK_0));
    tokio::time::sleep(Duration::from_millis(30)).await;
    coordinator.leave(job, 1, "its data ran out").await.unwrap();
    let error = waiting.await.unwrap().unwrap_err();
    assert_eq!(error.kind, ErrorKind::Aborted);
    assert!(error.message.contains("job job: rank 1 left it: its data ran out"), "{error}");
}

#[tokio::test]
async fn a_rank_that_is_done_does_not_disturb_the_steps_it_took_part_in() {
    let (coordinator, job) = two_ranks(patient()).await;
    coordinator.step(job, 0, &[RANK_0, RANK_1]).await;
    coordinator.leave(job, 1, "").await.unwrap();
    coordinator.submit(job, 0, 0, documents(0, RANK_0)).await.unwrap().unwrap();
    let error = coordinator.submit(job, 0, 1, Vec::new()).await.unwrap().unwrap_err();
    assert!(error.message.contains("rank 1 has left the job; it submitted step 0 last"), "{error}");
}

#[tokio::test]
async fn a_submission_can_be_repeated_but_not_changed() {
    let (coordinator, job) = two_ranks(patient()).await;
    let answers = coordinator.step(job, 0, &[RANK_0, RANK_1]).await;
    let again = coordinator.submit(job, 0, 0, documents(0, RANK_0)).await.unwrap().unwrap();
    assert_eq!(again, answers[0]);
    let error = coordinator.submit(job, 0, 0, documents(0, &[4000, 100, 34])).await.unwrap().unwrap_err();
    assert_eq!(error.kind, ErrorKind::Invalid);
    assert!(error.message.contains("documents[2] differs"), "{error}");
    let error = coordinator.submit(job, 0, 0, documents(0, &[1])).await.unwrap().unwrap_err();
    assert!(error.message.contains("before with 3 documents, now with 1"), "{error}");
}

#[tokio::test]
async fn bad_documents_are_refused_by_field_and_work_goes_on() {
    let (coordinator, job) = two_ranks(Options { max_documents: 3, ..patient() }).await;
    let good = || documents(0, &[8])[0].clone();
    let span = |start, end| Some(v1::Span { start, end });
    let home = |rank, start, end| v1::HomeRange { rank, tokens: span(start, end) };
    let slice = |heads| v1::BandSlice {
        q: span(0, 8),
        kv: span(0, 8),
        kv_heads: span(0, heads),
        lo: None,
        hi: Some(0),
    };
    let id = |rank, index| Some(v1::DocumentId { rank, index });
    let bad = [
        ("id", v1::Document { id: None, ..good() }),
        ("documents[0].id.rank is 1", v1::Document { id: id(1, 0), ..good() }),
        ("tokens is 0", v1::Document { tokens: 0, homes: vec![home(0, 0, 0)], ..good() }),
        ("home ranges do not add up", v1::Document { tokens: 9, ..good() }),
        (
            "homes is empty, and the job does not declare placement",
            v1::Document { homes: Vec::new(), ..good() },
        ),
        (
            "homes name several ranks, and the job does not declare placement",
            v1::Document { homes: vec![home(0, 0, 4), home(1, 4, 8)], ..good() },
        ),
        ("homes name rank 2", v1::Document { homes: vec![home(2, 0, 8)], ..good() }),
        ("tick is 70000", v1::Document { tick: 70_000, ..good() }),
        ("mask[0].kv_heads [0, 3)", v1::Document { mask: vec![slice(3)], ..good() }),
        ("overlap", v1::Document { mask: vec![slice(2), slice(1)], ..good() }),
    ];
    for (what, document) in bad {
        let error = coordinator.submit(job, 0, 0, vec![document]).await.unwrap().unwrap_err();
        assert!(matches!(error.kind, ErrorKind::Invalid | ErrorKind::Unsupported), "{error:?}");
        assert!(error.message.contains(what) && error.message.contains("documents[0]"), "{what}: {error}");
        assert!(error.message.contains("step 0, rank 0"), "{error}");
    }
    for (what, many) in [("documents[1].id is 0.0", vec![good(); 2]), ("at most 3", vec![good(); 4])] {
        let error = coordinator.submit(job, 0, 0, many).await.unwrap().unwrap_err();
        assert!(error.message.contains(what), "{what}: {error}");
    }
    let error = coordinator.submit(job, 2, 0, Vec::new()).await.unwrap().unwrap_err();
    assert!(error.message.contains("rank is 2; job job has 2 ranks"), "{error}");
    let error = coordinator.submit(job + 99, 0, 0, Vec::new()).await.unwrap().unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
    coordinator.step(job, 0, &[RANK_0, RANK_1]).await;
}

#[tokio::test]
async fn masks_of_their_own_are_planned() {
    let (coordinator, job) = two_ranks(patient()).await;
    let mut windowed = documents(0, &[1000]);
    let all = Some((&Span::to(1000)).into());
    let heads = Some((&Span::to(2)).into());
    windowed[0].mask = vec![v1::BandSlice { q: all, kv: all, kv_heads: heads, lo: Some(-9), hi: Some(0) }];
    let other = coordinator.submit(job, 1, 0, Vec::new());
    let answer = coordinator.submit(job, 0, 0, windowed).await.unwrap().unwrap();
    assert_eq!(answer.summary.unwrap().cells, 2 * (10 * 1000 - 45));
    assert!(other.await.unwrap().unwrap().tasks.is_empty());
}

#[tokio::test]
async fn documents_go_to_the_dedicated_pool_when_there_is_no_other() {
    let coordinator = Coordinator::start(patient()).await;
    let mut ids = Vec::new();
    for port in 1..=3 {
        ids.push(coordinator.register(server(port)).await.unwrap());
    }
    let job = coordinator.join_all("job", 2).await;
    let answers = coordinator.step(job, 0, &[RANK_0, RANK_1]).await;
    assert_eq!(servers(&answers), ids);
}

#[tokio::test]
async fn rates_trade_balance_for_bytes_and_extreme_ones_plan_too() {
    let coordinator = Coordinator::start(patient()).await;
    let summary = async |job: String, rates, links: [f64; 2]| {
        let slot = |rank: u32| v1::Slot {
            rank: Some(rank),
            weight: 1.0,
            bytes_per_second: links[rank as usize],
            ..v1::Slot::default()
        };
        let slots = vec![slot(0), slot(1)];
        let mut joining = Vec::new();
        for rank in [0, 1] {
            let port = coordinator.pool().await.len() as u32 + 1;
            coordinator.register(in_place(port, &job, rank)).await.unwrap();
            let request = v1::JoinJobRequest { rates, slots: slots.clone(), ..join(&job, rank, 2) };
            joining.push(coordinator.join(request));
        }
        let mut id = 0;
        for joined in joining {
            id = joined.await.unwrap().unwrap().job_id;
        }
        coordinator.step(id, 0, &[RANK_0, RANK_1]).await[0].summary.unwrap()
    };
    let rates = |flops, bytes| Some(v1::Rates { flops_per_second: flops, bytes_per_second: bytes });
    let balanced = summary("balanced".into(), None, [0.0; 2]).await;
    let slow = summary("slow".into(), rates(1e9, 1.0), [0.0; 2]).await;
    assert!(balanced.forward_bytes > 0 && balanced.imbalance_after < 1.05, "{balanced:?}");
    assert_eq!((slow.forward_bytes, slow.backward_bytes), (0, 0));
    assert_eq!(slow.imbalance_after, slow.imbalance_before);
    // What a slot declares of its own link counts more than the rates.
    let own = summary("own".into(), rates(1e9, 1.0), [1e12; 2]).await;
    assert!(own.forward_bytes > 0 && own.imbalance_after < 1.05, "{own:?}");
    let extremes = [5e-324, 1e-300, 1.0, 1e300, f64::MAX];
    for (n, flops) in extremes.into_iter().enumerate() {
        for (m, bytes) in extremes.into_iter().enumerate() {
            let planned = summary(format!("{n}-{m}"), rates(flops, bytes), [0.0, 1.0]).await;
            assert_eq!(planned.cells, balanced.cells);
        }
    }
}

/// The same without a network, at a size where anything square in the number of ranks would show.
#[tokio::test]
async fn thousands_of_ranks_take_seconds_at_most() {
    const RANKS: u32 = 4096;
    let handle = Handle::start(patient()).unwrap();
    let spec = |port| ServerSpec {
        host: "host".into(),
        address: format!("host:{port}"),
        socket: String::new(),
        device: "cpu".into(),
        memory_bytes: 1 << 30,
        numerics: [(DType::F32, "cpu-test".into())].into(),
        max_head_dim: 128,
        in_place: None,
    };
    for port in 1..=64 {
        handle.register_server(spec(port)).unwrap();
    }
    let terms = Terms {
        job: "job".into(),
        ranks: RANKS,
        geometry: geometry(),
        slots: Vec::new(),
        min_servers: 64,
        rates: None,
        placement: None,
    };
    let mut calls = tokio::task::JoinSet::new();
    for rank in 0..RANKS {
        let (handle, terms) = (handle.clone(), terms.clone());
        calls.spawn(async move {
            let job = handle.join_job(RankSpec::of(rank), terms).await.unwrap().job;
            let documents = documents(rank, &[rank as usize + 1]).into_iter().map(|d| d.try_into().unwrap());
            let plan = handle.submit_step(Submission { job, rank, step: 0, documents: documents.collect() });
            plan.await.unwrap().tasks().count()
        });
    }
    let tasks =
        tokio::time::timeout(Duration::from_secs(60), calls.join_all()).await.expect("it takes too long");
    assert!(tasks.iter().all(|&count| count > 0));
}
