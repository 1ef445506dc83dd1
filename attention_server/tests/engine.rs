//! The engine through its task handler: what it refuses, what it computes, and what it leaves behind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::time::Duration;

use outboard_attention::kernel::Results;
use outboard_attention::reference;
use outboard_attention::{
    DType, Direction, DocumentId, HeadGeometry, HeadShape, Mask, Span, Task, TensorSlice,
};
use outboard_attention_server::{Engine, EngineOptions};
use outboard_proto::{ErrorKind, TaskHeader};
use outboard_transport::{InProcess, TaskInputs, TaskRequest, Transport};
use tokio::runtime::Handle;

const TOKENS: usize = 300;

fn geometry() -> HeadGeometry {
    HeadGeometry::standard(4, 2, 16).unwrap()
}

/// Values that differ from element to element and from tensor to tensor.
fn values(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5) - 1.0).collect()
}

fn request(seed: usize) -> TaskRequest {
    let geometry = geometry();
    let all = Span::to(TOKENS);
    let document = DocumentId { rank: 0, index: seed as u32 };
    let task = Task::new(document, all, all, Span::to(2), &Mask::causal(TOKENS, 2)).unwrap();
    let tensor = |name, heads: usize, seed| {
        TensorSlice::contiguous(name, values(TOKENS * heads * 16, seed), all, heads, 16).unwrap()
    };
    let inputs = TaskInputs {
        q: tensor("q", 4, seed),
        k: tensor("k", 2, seed + 1),
        v: tensor("v", 2, seed + 2),
        gradient: None,
    };
    let header = TaskHeader {
        job: "test".into(),
        step: 3,
        plan_epoch: 0,
        layer: 1,
        direction: Direction::Forward,
        tick: 0,
        attempt: 0,
        slot: 0,
        group: 0,
        position: 0,
        numerics_id: None,
        geometry,
        task,
        result_dtype: DType::F32,
        deadline: Some(Duration::from_secs(60)),
    };
    TaskRequest { header, inputs }
}

/// Runs `test` against an engine, and checks that nothing is left of it afterwards.
async fn check(test: impl AsyncFnOnce(&Engine, InProcess)) {
    use outboard_transport::TaskHandler;
    let engine =
        Engine::start(&EngineOptions { memory_bytes: 16 << 20, ..EngineOptions::default() }).unwrap();
    let transport = InProcess::new(std::sync::Arc::new(engine.clone()), Handle::current());
    test(&engine, transport).await;
    engine.idle(Duration::from_secs(30)).await.unwrap();
    for _ in 0..100 {
        if engine.budget().used() == 0 {
            engine.close();
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{} bytes are still held", engine.budget().used());
}

/// Checks O against the f64 reference.
fn assert_right(request: &TaskRequest, results: &Results) {
    let Results::Forward { o, lse } = results else { panic!("a forward task gave {results:?}") };
    let inputs = &request.inputs;
    let inputs = reference::Inputs { q: inputs.q.view(), k: inputs.k.view(), v: inputs.v.view() };
    let exact = reference::forward(&request.header.geometry, &request.header.task, inputs).unwrap();
    let apart = |a: &[f32], b: &[f64]| {
        a.iter()
            .zip(b)
            .map(|(a, b)| (f64::from(*a) - b).abs())
            .fold(0.0, |most, d| if d <= most { most } else { d })
    };
    assert_eq!((o.len(), lse.len()), (exact.o.len(), exact.lse.len()));
    assert!(apart(o, &exact.o) < 1e-5 && apart(lse, &exact.lse) < 1e-5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_of_many_shipments_are_computed_and_counted() {
    use outboard_transport::TaskHandler;
    check(async |engine, transport| {
        let requests: Vec<_> = (0..20).map(request).collect();
        let pending: Vec<_> =
            requests.chunks(3).flat_map(|shipment| transport.ship(shipment.to_vec())).collect();
        let mut cells = 0;
        for (request, pending) in requests.iter().zip(pending) {
            let outcome = pending.await.unwrap();
            assert_right(request, &outcome.results);
            assert_eq!(&*outcome.numerics_id, engine.numerics_id());
            cells += request.header.task.cells();
        }
        let stats = engine.stats();
        assert_eq!((stats.forward_tasks, stats.backward_tasks, stats.failed_tasks), (20, 0, 0));
        assert_eq!(stats.cells, cells);
        assert!(stats.batches <= 20 && stats.compute_seconds > 0.0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_task_fails_alone() {
    check(async |_, transport| {
        let good = request(1);
        let mut no_gradient = request(2);
        no_gradient.header.direction = Direction::Backward;
        let mut other_numerics = request(3);
        other_numerics.header.numerics_id = Some("cuda-sm90-bf16".into());
        let mut bf16 = request(4);
        bf16.header.geometry =
            HeadShape { dtype: DType::Bf16, ..bf16.header.geometry.shape() }.try_into().unwrap();
        let shipment = vec![good.clone(), no_gradient, other_numerics, bf16, good.clone()];
        let mut outcomes = Vec::new();
        for pending in transport.ship(shipment) {
            outcomes.push(pending.await);
        }
        let kinds: Vec<_> = outcomes.iter().map(|o| o.as_ref().err().map(|e| e.kind)).collect();
        let expected = [
            None,
            Some(ErrorKind::Invalid),
            Some(ErrorKind::NumericsMismatch),
            Some(ErrorKind::Unsupported),
            None,
        ];
        assert_eq!(kinds, expected, "{outcomes:?}");
        let message = outcomes[2].as_ref().unwrap_err().to_string();
        assert!(message.contains("cuda-sm90-bf16") && message.contains("step 3"), "{message}");
        for outcome in [&outcomes[0], &outcomes[4]] {
            assert_right(&good, &outcome.as_ref().unwrap().results);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draining_engine_finishes_what_it_holds_and_refuses_the_rest() {
    check(async |engine, transport| {
        let first = request(1);
        let held = transport.ship(vec![first.clone()]).pop().unwrap();
        let outcome = held.await.unwrap();
        engine.drain();
        assert_right(&first, &outcome.results);
        let error = transport.ship(vec![request(2)]).pop().unwrap().await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unavailable);
        assert!(error.to_string().contains("draining"), "{error}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_given_up_or_too_late_hold_nothing() {
    check(async |_, transport| {
        drop(transport.ship((0..10).map(request).collect()));
        let mut late = request(11);
        late.header.deadline = Some(Duration::ZERO);
        let error = transport.ship(vec![late]).pop().unwrap().await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::DeadlineExceeded);
    })
    .await;
}

#[tokio::test]
async fn a_task_larger_than_the_memory_is_refused() {
    let engine = Engine::start(&EngineOptions { memory_bytes: 8 << 10, ..EngineOptions::default() }).unwrap();
    let transport = InProcess::new(std::sync::Arc::new(engine.clone()), Handle::current());
    let error = transport.ship(vec![request(1)]).pop().unwrap().await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::TooLarge);
    engine.close();
}
