//! Streams made by hand.

use std::collections::HashMap;

use bytes::Bytes;
use outboard_attention::kernel::Results;
use outboard_attention::{AnyTensor, DType, Direction, TensorSlice, TensorView};
use outboard_proto::v1::attend_request::Message;
use outboard_proto::v1::attend_response::Message as Answer;
use outboard_proto::v1::attention_service_client::AttentionServiceClient;
use outboard_proto::v1::{
    self, AttendRequest, AttendResponse, Chunk, ClientGreeting, ServerGreeting, TaskHeader,
};
use outboard_proto::{PROTOCOL_VERSION, TaskError, TensorKind, TensorRef, WireTask};
use outboard_transport::TaskRequest;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{Cut, Places, Rng, Server, Shape, at_homes, compute, drawn, numerics_id, shipment};

/// One stream, by the stock generated client.
pub struct Raw {
    pub outbound: mpsc::Sender<AttendRequest>,
    pub inbound: Streaming<AttendResponse>,
}

/// A task with its header and the chunks of each tensor, in order.
#[derive(Clone)]
pub struct Script {
    pub request: TaskRequest,
    pub header: TaskHeader,
    pub chunks: Vec<Chunk>,
}

impl Raw {
    pub async fn silent(server: &Server) -> Raw {
        let mut client = AttentionServiceClient::connect(format!("http://{}", server.address)).await.unwrap();
        let (outbound, messages) = mpsc::channel(64);
        let inbound = client.attend(ReceiverStream::new(messages)).await.unwrap().into_inner();
        Raw { outbound, inbound }
    }

    pub async fn open(server: &Server) -> (Raw, ServerGreeting) {
        let mut raw = Raw::silent(server).await;
        raw.send(Message::Greeting(greeting())).await;
        match raw.next().await {
            Answer::Greeting(greeting) => (raw, greeting),
            other => panic!("no greeting but {other:?}"),
        }
    }

    pub async fn send(&self, message: Message) {
        self.outbound.send(AttendRequest { message: Some(message) }).await.expect("the stream is open");
    }

    pub async fn send_all(&self, script: &Script) {
        self.send(Message::Task(script.header.clone())).await;
        for chunk in &script.chunks {
            self.send(Message::Chunk(chunk.clone())).await;
        }
    }

    pub async fn next(&mut self) -> Answer {
        let message = self.inbound.message().await.expect("the stream goes on").expect("the stream goes on");
        message.message.expect("a message says something")
    }

    /// The next failure; grants, and results of other tasks, may come before it.
    pub async fn failure(&mut self) -> (u64, TaskError) {
        loop {
            match self.next().await {
                Answer::Failure(v1::TaskFailure { task, failure }) => return (task, failure.unwrap().into()),
                Answer::Greeting(_) => panic!("a second greeting"),
                Answer::Credit(_) | Answer::Result(_) | Answer::Chunk(_) | Answer::Drain(_) => {}
            }
        }
    }

    /// Awaits the result of a task and compares it with a direct computation.
    pub async fn check_result(&mut self, script: &Script) {
        self.check_results(&[script]).await;
    }

    /// The same for several tasks, which may end in any order.
    pub async fn check_results(&mut self, scripts: &[&Script]) {
        let expected = |script: &&Script| {
            let results = compute(&script.request.header, &script.request.inputs().unwrap());
            (script.header.task, elements(results))
        };
        let mut expected: HashMap<u64, Vec<Vec<u8>>> = scripts.iter().map(expected).collect();
        let mut arrived: HashMap<u64, Vec<Vec<u8>>> = HashMap::new();
        while !expected.is_empty() {
            let task = match self.next().await {
                Answer::Result(result) => {
                    assert!(DType::ALL.map(numerics_id).contains(&&*result.numerics_id));
                    arrived.insert(result.task, vec![Vec::new(); result.tensors.len()]);
                    result.task
                }
                Answer::Chunk(chunk) => {
                    assert_eq!(chunk.crc32c, crc32c::crc32c(&chunk.data));
                    let tensor = &mut arrived.get_mut(&chunk.task).unwrap()[chunk.tensor as usize];
                    assert_eq!(tensor.len() as u64, chunk.offset);
                    tensor.extend_from_slice(&chunk.data);
                    chunk.task
                }
                Answer::Credit(_) => continue,
                other => panic!("no result but {other:?}"),
            };
            assert!(expected.contains_key(&task), "task {task} was not awaited");
            if expected[&task] == arrived[&task] {
                expected.remove(&task);
            }
        }
    }

    /// The status that ends the stream.
    pub async fn end(&mut self) -> TaskError {
        loop {
            match self.inbound.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the stream ended without an error"),
                Err(status) => return status.into(),
            }
        }
    }
}

/// A tensor as it travels.
pub fn wire_bytes(slice: &TensorSlice) -> Vec<u8> {
    fn bytes<T: Copy, const N: usize>(view: TensorView<'_, T>, of: fn(T) -> [u8; N]) -> Vec<u8> {
        (0..view.shape()[0]).flat_map(|t| view.token(t)).flat_map(|x| of(*x)).collect()
    }
    match slice.view() {
        AnyTensor::F32(view) => bytes(view, f32::to_le_bytes),
        AnyTensor::Bf16(view) => bytes(view, |x| x.to_le_bytes()),
        AnyTensor::F16(view) => bytes(view, |x| x.to_le_bytes()),
    }
}

/// Results as they travel.
pub fn elements(results: Results) -> Vec<Vec<u8>> {
    let bytes = |data: Vec<f32>| data.iter().flat_map(|x| x.to_le_bytes()).collect();
    match results {
        Results::Forward { o, lse } => vec![bytes(o), bytes(lse)],
        Results::Stage(_) => panic!("a stage does not travel"),
        Results::Backward { dq, dk, dv } => vec![bytes(dq), bytes(dk), bytes(dv)],
    }
}

pub fn greeting() -> ClientGreeting {
    ClientGreeting {
        protocol_version: PROTOCOL_VERSION,
        job: "raw".into(),
        rank: 0,
        session: "s".into(),
        streams: 1,
    }
}

/// A forward task of about 300 KB of f32 under the given id, its tensors under ids `10 * id` and on.
pub fn script(id: u64) -> Script {
    script_of(id, DType::F32)
}

/// The same of any element type.
pub fn script_of(id: u64, dtype: DType) -> Script {
    let small = Shape::small(Direction::Forward);
    let shape = Shape { tasks: 1, tokens: 300, head_dim: 64, v_head_dim: 64, dtype, ..small };
    carrying(id, shipment(&mut Rng(id), shape).remove(0))
}

/// The same, of f32, whose keys lie at homes: at the places of `cut`.
pub fn script_at_homes(id: u64, places: &Places, cut: Cut<'_>) -> Script {
    let small = Shape::small(Direction::Forward);
    let shape = Shape { tasks: 1, tokens: 300, head_dim: 64, v_head_dim: 64, ..small };
    let drawn = drawn(&mut Rng(id), shape);
    let mut request = drawn.tasks[0].clone();
    request.header = at_homes(&mut Rng(id), drawn, id, places, cut).tasks[0].header.clone();
    carrying(id, request)
}

fn carrying(id: u64, request: TaskRequest) -> Script {
    let inputs = request.inputs().unwrap();
    let (mut tensors, mut chunks) = (Vec::new(), Vec::new());
    for (n, (kind, slice)) in
        [(TensorKind::Q, &inputs.q), (TensorKind::K, &inputs.k), (TensorKind::V, &inputs.v)]
            .into_iter()
            .enumerate()
    {
        let tensor = id * 10 + n as u64;
        let (carried, last_use) = (true, true);
        let fetched = request.header.fetched_keys().filter(|_| kind != TensorKind::Q);
        let tokens = fetched.unwrap_or(slice.tokens());
        tensors.push(TensorRef { id: tensor, kind, tokens, carried, last_use });
        if fetched.is_some() {
            continue;
        }
        let bytes = wire_bytes(slice);
        for (n, data) in bytes.chunks(50_000).enumerate() {
            let crc32c = crc32c::crc32c(data);
            let offset = n as u64 * 50_000;
            chunks.push(Chunk { task: id, tensor, offset, crc32c, data: Bytes::copy_from_slice(data) });
        }
    }
    let header = (&WireTask { id, header: request.header.clone(), tensors }).into();
    Script { request, header, chunks }
}
