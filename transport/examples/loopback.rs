//! Measures what the gRPC transport carries between two runtimes of one process over loopback, computing nothing.
//!
//! `cargo run --release -p outboard-transport --example loopback -- [MIB_PER_TENSOR] [STREAMS] [IN_FLIGHT]`

use std::collections::VecDeque;
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outboard_attention::kernel::Results;
use outboard_attention::{DType, Direction, DocumentId, HeadGeometry, Mask, Span, Task, TensorSlice};
use outboard_proto::v1::GetServerStatsResponse;
use outboard_proto::{TaskError, TaskHeader};
use outboard_transport::grpc::{CancellationToken, ClientConfig, GrpcTransport, ServerConfig, router, serve};
use outboard_transport::{
    ArrivedTask, ByteBudget, Pending, TaskHandler, TaskInputs, TaskOutcome, TaskRequest, Transport,
};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};

/// Heads and their size; a token then has 4 KiB in each of Q, K, V and O.
const HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const MEASURE: Duration = Duration::from_secs(5);

/// Answers every task with zeros.
struct Zeros(ByteBudget);

impl TaskHandler for Zeros {
    fn numerics_id(&self, _: DType) -> Option<&str> {
        Some("zeros")
    }

    fn budget(&self) -> &ByteBudget {
        &self.0
    }

    fn admit(&self, _: &TaskHeader) -> Result<(), TaskError> {
        Ok(())
    }

    fn submit(&self, task: ArrivedTask) {
        let shapes = task.header.task.shapes(&task.header.geometry);
        let zeros = |shape: [usize; 3]| vec![0.0; shape.iter().product()];
        task.reply.send(Ok(TaskOutcome {
            results: Results::Forward { o: zeros(shapes.o), lse: zeros(shapes.row) },
            numerics_id: "zeros".into(),
            queued: Duration::ZERO,
            compute: Duration::ZERO,
        }));
    }

    fn count_bytes(&self, _: u64, _: u64) {}

    fn count_failed(&self, _: &TaskError) {}

    fn stats(&self) -> GetServerStatsResponse {
        GetServerStatsResponse::default()
    }
}

fn request(tokens: usize) -> Result<TaskRequest, Box<dyn Error>> {
    let geometry = HeadGeometry::standard(HEADS, HEADS, HEAD_DIM)?;
    let all = Span::to(tokens);
    let task =
        Task::new(DocumentId { rank: 0, index: 0 }, all, all, Span::to(HEADS), &Mask::causal(tokens, HEADS))?;
    let tensor = |name| {
        let data: Vec<f32> = (0..tokens * HEADS * HEAD_DIM).map(|n| n as f32).collect();
        TensorSlice::contiguous(name, data, all, HEADS, HEAD_DIM)
    };
    let inputs = TaskInputs { q: tensor("q")?, k: tensor("k")?, v: tensor("v")?, gradient: None };
    let header = TaskHeader {
        job: "loopback".to_owned(),
        step: 0,
        plan_epoch: 0,
        layer: 0,
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
        deadline: None,
        key_homes: Vec::new(),
        group_tasks: 0,
    };
    Ok(TaskRequest::new(header, inputs))
}

fn runtime() -> Result<Runtime, std::io::Error> {
    Builder::new_multi_thread().worker_threads(1).enable_all().build()
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let mut next = |usual: usize| args.next().map_or(Ok(usual), |arg| arg.parse());
    let (mib, streams, in_flight) = (next(16)?, next(1)?, next(2)?);
    let (server, client) = (runtime()?, runtime()?);
    let listener = server.block_on(TcpListener::bind("127.0.0.1:0"))?;
    let mut config = ClientConfig::new(listener.local_addr()?.to_string());
    config.streams = streams;
    let stop = CancellationToken::new();
    let server_config = ServerConfig { window_bytes: 512 << 20, ..ServerConfig::default() };
    let router = router(
        Arc::new(Zeros(ByteBudget::new(8 << 30))),
        outboard_transport::Homes::default(),
        &server_config,
        stop.clone(),
    );
    server.spawn(serve(router, listener, stop));

    let transport = GrpcTransport::new(config, client.handle().clone())?;
    let request = request((mib << 20) / (4 * HEADS * HEAD_DIM))?;
    let mut pendings: VecDeque<Pending> = VecDeque::new();
    let mut measured = None;
    loop {
        while pendings.len() < in_flight {
            pendings.extend(transport.ship(vec![request.clone()]));
        }
        if let Some(pending) = pendings.pop_front() {
            client.block_on(pending)?;
        }
        // The first task, which connects, is not measured.
        let (started, before) = *measured.get_or_insert_with(|| (Instant::now(), transport.traffic()));
        if started.elapsed() >= MEASURE {
            let (seconds, after) = (started.elapsed().as_secs_f64(), transport.traffic());
            let rate = |before: u64, after: u64| (after - before) as f64 / seconds / 1e9;
            let (up, down) = (rate(before.sent, after.sent), rate(before.received, after.received));
            println!(
                "{mib} MiB tensors, {streams} streams, {in_flight} tasks in flight: {up:.2} GB/s up, {down:.2} GB/s down"
            );
            return Ok(());
        }
    }
}
