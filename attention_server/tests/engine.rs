//! The engine through its task handler: what it refuses, what it computes, and what it leaves behind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::time::Duration;

use outboard_attention::kernel::Results;
use outboard_attention::reference;
use outboard_attention::{
    AnyTensor, DType, Direction, DocumentId, Element, Elements, HeadGeometry, Mask, Span, Task, TensorSlice,
    TensorView,
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
    request_of(seed, DType::F32)
}

fn request_of(seed: usize, dtype: DType) -> TaskRequest {
    let geometry = geometry().with_dtype(dtype);
    let all = Span::to(TOKENS);
    let document = DocumentId { rank: 0, index: seed as u32 };
    let task = Task::new(document, all, all, Span::to(2), &Mask::causal(TOKENS, 2)).unwrap();
    let tensor = |name, heads: usize, seed| {
        let elements = Elements::rounded(dtype, values(TOKENS * heads * 16, seed));
        TensorSlice::contiguous(name, elements, all, heads, 16).unwrap()
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
        key_homes: Vec::new(),
        group_tasks: 0,
    };
    TaskRequest::new(header, inputs)
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

/// The values of a contiguous tensor.
fn widened(slice: &TensorSlice) -> Vec<f32> {
    fn widen<T: Element>(view: TensorView<'_, T>) -> Vec<f32> {
        view.data().iter().map(|x| x.to_f32()).collect()
    }
    match slice.view() {
        AnyTensor::F32(view) => widen(view),
        AnyTensor::Bf16(view) => widen(view),
        AnyTensor::F16(view) => widen(view),
    }
}

fn assert_right(request: &TaskRequest, results: &Results) {
    // Weights may be rounded to bf16 before they meet V.
    let most = if request.header.geometry.dtype() == DType::Bf16 { 4e-3 } else { 1e-5 };
    assert_close(request, results, most);
}

/// Checks O against the f64 reference on the same rounded inputs.
fn assert_close(request: &TaskRequest, results: &Results, most: f64) {
    let Results::Forward { o, lse } = results else { panic!("a forward task gave {results:?}") };
    let TaskInputs { q, k, v, .. } = &request.inputs().unwrap();
    let [q_values, k_values, v_values] = [q, k, v].map(widened);
    let view = |data, heads| TensorView::contiguous("x", data, [TOKENS, heads, 16]).unwrap();
    let inputs = reference::Inputs { q: view(&q_values, 4), k: view(&k_values, 2), v: view(&v_values, 2) };
    let exact = reference::forward(&request.header.geometry, &request.header.task, inputs).unwrap();
    let apart = |a: &[f32], b: &[f64]| {
        a.iter()
            .zip(b)
            .map(|(a, b)| (f64::from(*a) - b).abs())
            .fold(0.0, |most, d| if d <= most { most } else { d })
    };
    assert_eq!((o.len(), lse.len()), (exact.o.len(), exact.lse.len()));
    assert!(apart(o, &exact.o) < most && apart(lse, &exact.lse) < most);
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
            assert_eq!(Some(&*outcome.numerics_id), engine.numerics_id(DType::F32));
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
async fn tasks_of_every_element_type_share_batches_and_keep_their_bits() {
    use outboard_transport::TaskHandler;
    check(async |engine, transport| {
        let requests: Vec<_> = (0..12).map(|n| request_of(n, DType::ALL[n % 3])).collect();
        let mut ids = Vec::new();
        for (request, pending) in requests.iter().zip(transport.ship(requests.clone())) {
            let outcome = pending.await.unwrap();
            assert_right(request, &outcome.results);
            let mut alone = request.clone();
            alone.header.numerics_id = Some(outcome.numerics_id.to_string());
            let again = transport.ship(vec![alone]).pop().unwrap().await.unwrap();
            assert!(again.results == outcome.results && again.numerics_id == outcome.numerics_id);
            ids.push(outcome.numerics_id);
        }
        for (n, dtype) in DType::ALL.into_iter().enumerate() {
            assert_eq!(engine.numerics_id(dtype), Some(&*ids[n]));
            assert!(ids[n].contains(&format!("-{dtype}-")), "{}", ids[n]);
        }
        assert_eq!(engine.stats().numerics_ids.len(), DType::ALL.len());
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
        let mut not_bf16 = request(4);
        not_bf16.header.geometry = geometry().with_dtype(DType::Bf16);
        let shipment = vec![good.clone(), no_gradient, other_numerics, not_bf16, good.clone()];
        let mut outcomes = Vec::new();
        for pending in transport.ship(shipment) {
            outcomes.push(pending.await);
        }
        let kinds: Vec<_> = outcomes.iter().map(|o| o.as_ref().err().map(|e| e.kind)).collect();
        let expected = [
            None,
            Some(ErrorKind::Invalid),
            Some(ErrorKind::NumericsMismatch),
            Some(ErrorKind::Invalid),
            None,
        ];
        assert_eq!(kinds, expected, "{outcomes:?}");
        let message = outcomes[2].as_ref().unwrap_err().to_string();
        assert!(message.contains("cuda-sm90-bf16") && message.contains("step 3"), "{message}");
        let message = outcomes[3].as_ref().unwrap_err().to_string();
        assert!(message.contains("q holds f32; the geometry says bf16"), "{message}");
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

/// Without a GPU this does nothing but say so; with OUTBOARD_REQUIRE_GPU=1 it fails instead.
#[cfg(feature = "cuda")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gpu_computes_what_it_can_and_refuses_the_rest() {
    use outboard_attention_server::{CudaOptions, DeviceOptions};
    use outboard_cuda::CudaConfig;
    use outboard_transport::TaskHandler;

    let libraries = std::env::var_os("OUTBOARD_CUDA_LIBRARIES");
    let libraries = libraries.map(|all| std::env::split_paths(&all).collect()).unwrap_or_default();
    let start = |batch_bytes| {
        let kernel = CudaConfig { libraries: Vec::clone(&libraries), batch_bytes, ..CudaConfig::new(0) };
        // A few tasks to a batch, so that batches overlap.
        let device = DeviceOptions::Cuda(CudaOptions { batch_flops: 2e7, ..CudaOptions::new(kernel) });
        Engine::start(&EngineOptions { device, ..EngineOptions::default() })
    };
    let engine = match start(1 << 30) {
        Ok(engine) => engine,
        Err(error) if std::env::var_os("OUTBOARD_REQUIRE_GPU").is_none() => {
            println!("not run: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    assert!(engine.device().starts_with("cuda:0 "), "{}", engine.device());
    let transport = InProcess::new(std::sync::Arc::new(engine.clone()), Handle::current());
    let requests: Vec<_> =
        (0..60).map(|n| request_of(n, [DType::Bf16, DType::F16, DType::F32][n % 3])).collect();
    for (request, pending) in requests.iter().zip(transport.ship(requests.clone())) {
        match (request.header.geometry.dtype(), pending.await) {
            (DType::F32, outcome) => assert_eq!(outcome.unwrap_err().kind, ErrorKind::Unsupported),
            (dtype, outcome) => {
                let outcome = outcome.unwrap();
                // Weights and O are rounded to the element type.
                assert_close(request, &outcome.results, 1.2e-2);
                assert_eq!(Some(&*outcome.numerics_id), engine.numerics_id(dtype));
            }
        }
    }
    let stats = engine.stats();
    assert_eq!((stats.forward_tasks, stats.failed_tasks), (40, 20));
    assert!(stats.batches > 1 && stats.compute_seconds > 0.0, "{stats:?}");
    engine.close();

    let small = start(64 << 10).unwrap();
    let transport = InProcess::new(std::sync::Arc::new(small.clone()), Handle::current());
    let error = transport.ship(vec![request_of(1, DType::Bf16)]).pop().unwrap().await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::TooLarge, "{error}");
    assert!(!small.is_draining());
    small.close();
}
