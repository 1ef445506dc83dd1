//! A handler whose results depend on every bit of its inputs.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outboard_attention::kernel::Results;
use outboard_attention::{AnyTensor, DType, Direction, Element, Span, TensorSlice, TensorView};
use outboard_proto::v1::GetServerStatsResponse;
use outboard_proto::{ErrorKind, RetryHint, TaskError, TaskHeader};
use outboard_transport::{ArrivedTask, ByteBudget, TaskHandler, TaskInputs, TaskOutcome};

/// For f32.
pub const NUMERICS_ID: &str = "test-f32";
/// Tasks of this layer are refused by their header.
pub const ADMIT_FAILS: u32 = 98;
/// Tasks of this layer fail when computed.
pub const COMPUTE_FAILS: u32 = 99;

pub fn numerics_id(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => NUMERICS_ID,
        DType::Bf16 => "test-bf16",
        _ => "test-f16",
    }
}

pub struct TestHandler {
    pub budget: ByteBudget,
    /// Set before a client connects: an element type that it does not compute.
    pub lacks: Mutex<Option<DType>>,
    /// While set, tasks are kept in `held`.
    pub hold: AtomicBool,
    pub held: Mutex<Vec<ArrivedTask>>,
    pub draining: AtomicBool,
    pub computed: AtomicU64,
    pub peak: AtomicU64,
    pub received: AtomicU64,
    pub sent: AtomicU64,
    pub failed: Mutex<Vec<TaskError>>,
}

impl TestHandler {
    pub fn new(memory: u64) -> Arc<TestHandler> {
        Arc::new(TestHandler {
            budget: ByteBudget::new(memory),
            lacks: Mutex::default(),
            hold: AtomicBool::new(false),
            held: Mutex::default(),
            draining: AtomicBool::new(false),
            computed: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            failed: Mutex::default(),
        })
    }

    /// Computes what is held, and whatever comes from now on.
    pub fn release(&self) {
        self.hold.store(false, Ordering::SeqCst);
        for task in std::mem::take(&mut *self.held.lock().unwrap()) {
            self.finish(task);
        }
    }

    pub fn held(&self) -> usize {
        self.held.lock().unwrap().len()
    }

    pub fn all_held_are_cancelled(&self) -> bool {
        self.held.lock().unwrap().iter().all(|task| task.reply.is_cancelled())
    }

    fn finish(&self, task: ArrivedTask) {
        let ArrivedTask { header, inputs, reply, lease, .. } = task;
        let outcome = if header.layer == COMPUTE_FAILS {
            let retry = RetryHint::Later;
            Err(TaskError {
                kind: ErrorKind::Internal,
                message: "computing failed on purpose".to_owned(),
                retry,
            })
        } else {
            self.computed.fetch_add(1, Ordering::SeqCst);
            Ok(TaskOutcome {
                results: compute(&header, &inputs),
                numerics_id: numerics_id(header.geometry.dtype()).into(),
                queued: Duration::from_millis(250),
                compute: Duration::from_millis(500),
            })
        };
        drop(inputs);
        drop(lease);
        reply.send(outcome);
    }
}

impl TaskHandler for TestHandler {
    fn numerics_id(&self, dtype: DType) -> Option<&str> {
        (*self.lacks.lock().unwrap() != Some(dtype)).then(|| numerics_id(dtype))
    }

    fn budget(&self) -> &ByteBudget {
        &self.budget
    }

    fn admit(&self, header: &TaskHeader) -> Result<(), TaskError> {
        if self.draining.load(Ordering::SeqCst) {
            return Err(TaskError::unavailable("draining; send the task to another server"));
        }
        if header.layer == ADMIT_FAILS {
            return Err(TaskError::new(ErrorKind::Unsupported, "refused on purpose"));
        }
        Ok(())
    }

    fn submit(&self, task: ArrivedTask) {
        self.peak.fetch_max(self.budget.used(), Ordering::SeqCst);
        if self.hold.load(Ordering::SeqCst) {
            self.held.lock().unwrap().push(task);
        } else {
            self.finish(task);
        }
    }

    fn count_bytes(&self, received: u64, sent: u64) {
        self.received.fetch_add(received, Ordering::SeqCst);
        self.sent.fetch_add(sent, Ordering::SeqCst);
    }

    fn count_failed(&self, error: &TaskError) {
        self.failed.lock().unwrap().push(error.clone());
    }

    fn stats(&self) -> GetServerStatsResponse {
        GetServerStatsResponse { forward_tasks: self.computed.load(Ordering::SeqCst), ..Default::default() }
    }
}

/// Results that every element the task needs has a part in, by its place.
pub fn compute(header: &TaskHeader, inputs: &TaskInputs) -> Results {
    fn sum<T: Element>(view: TensorView<'_, T>) -> f32 {
        let elements = (0..view.shape()[0]).flat_map(|t| view.token(t));
        elements.enumerate().fold(0.0, |sum, (n, x)| sum * 0.99 + x.to_f32() * ((n % 97) as f32 + 1.0))
    }
    let digest = |slice: &TensorSlice, needed: Span, [_, heads, dim]: [usize; 3], dtype: DType| -> f32 {
        let view = slice.view_of(needed).expect("the slice holds what the task needs");
        view.expect("input", [needed.len(), heads, dim], dtype).expect("the slice fits the task");
        match view {
            AnyTensor::F32(view) => sum(view),
            AnyTensor::Bf16(view) => sum(view),
            AnyTensor::F16(view) => sum(view),
        }
    };
    let (q, kv, shapes) = (header.task.q(), header.task.kv(), header.task.shapes(&header.geometry));
    let dtype = header.geometry.dtype();
    let mut seed = digest(&inputs.q, q, shapes.q, dtype)
        + 3.0 * digest(&inputs.k, kv, shapes.k, dtype)
        + 7.0 * digest(&inputs.v, kv, shapes.v, dtype);
    let fill = |seed: f32, shape: [usize; 3]| -> Vec<f32> {
        (0..shape.iter().product()).map(|n: usize| seed + (n % 1013) as f32).collect()
    };
    match header.direction {
        Direction::Forward => Results::Forward { o: fill(seed, shapes.o), lse: fill(seed * 2.0, shapes.row) },
        Direction::Backward => {
            let gradient = inputs.gradient.as_ref().expect("backward has gradients");
            seed += 11.0 * digest(&gradient.d_o, q, shapes.o, dtype)
                + 13.0 * digest(&gradient.lse, q, shapes.row, DType::F32)
                + 17.0 * digest(&gradient.d, q, shapes.row, DType::F32);
            let (dq, dk, dv) = (fill(seed, shapes.q), fill(seed * 2.0, shapes.k), fill(seed * 3.0, shapes.v));
            Results::Backward { dq, dk, dv }
        }
    }
}
