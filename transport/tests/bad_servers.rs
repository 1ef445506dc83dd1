//! Servers that break the protocol, as a gRPC client meets them: every task ends with a reason, none with wrong numbers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::sync::Arc;

use outboard_attention::Direction;
use outboard_proto::v1::attend_request::Message;
use outboard_proto::v1::attend_response::Message as Answer;
use outboard_proto::v1::attention_service_server::{AttentionService, AttentionServiceServer};
use outboard_proto::v1::{self, AttendRequest, AttendResponse, Chunk, ResultHeader, ServerGreeting};
use outboard_proto::{ErrorKind, PROTOCOL_VERSION, RetryHint};
use outboard_transport::Transport;
use support::*;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

type Change = dyn Fn(&mut Vec<Result<Answer, Status>>) + Send + Sync;

/// How a server misbehaves.
#[derive(Clone)]
struct Script {
    greeting: Option<ServerGreeting>,
    /// What it does with the right result of a task: header, chunk of O, chunk of LSE.
    change: Arc<Change>,
}

struct BadServer(Script);

fn greeting() -> ServerGreeting {
    let (numerics_ids, bytes) = (vec![NUMERICS_ID.to_owned()], 1 << 30);
    ServerGreeting {
        protocol_version: PROTOCOL_VERSION,
        numerics_ids,
        memory_bytes: bytes,
        credit_bytes: bytes,
    }
}

fn right_result(task: v1::TaskHeader) -> Vec<Result<Answer, Status>> {
    let tokens = task.q.unwrap();
    let (rows, heads) = ((tokens.end - tokens.start) as usize, task.kv_heads.unwrap());
    let heads = (heads.end - heads.start) as usize * 2;
    let tensor = |id, kind: v1::TensorKind| v1::TensorRef {
        id,
        kind: kind as i32,
        tokens: task.q,
        carried: true,
        last_use: true,
    };
    let chunk = |tensor, bytes: usize| {
        let data = bytes::Bytes::from(vec![0; bytes]);
        Ok(Answer::Chunk(Chunk { task: task.task, tensor, offset: 0, crc32c: crc32c::crc32c(&data), data }))
    };
    let header = ResultHeader {
        task: task.task,
        tensors: vec![tensor(0, v1::TensorKind::O), tensor(1, v1::TensorKind::Lse)],
        result_dtype: v1::DType::F32 as i32,
        numerics_id: NUMERICS_ID.to_owned(),
        queued_seconds: f32::NAN,
        compute_seconds: -1.0,
    };
    vec![Ok(Answer::Result(header)), chunk(0, rows * heads * 8 * 4), chunk(1, rows * heads * 4)]
}

#[tonic::async_trait]
impl AttentionService for BadServer {
    type AttendStream = ReceiverStream<Result<AttendResponse, Status>>;

    async fn attend(
        &self,
        request: Request<Streaming<AttendRequest>>,
    ) -> Result<Response<Self::AttendStream>, Status> {
        let (outbound, messages) = mpsc::channel(64);
        let (script, mut inbound) = (self.0.clone(), request.into_inner());
        tokio::spawn(async move {
            if let Some(greeting) = script.greeting {
                let message = Some(Answer::Greeting(greeting));
                outbound.send(Ok(AttendResponse { message })).await.ok();
            }
            while let Ok(Some(AttendRequest { message })) = inbound.message().await {
                let Some(Message::Task(task)) = message else { continue };
                let mut answers = right_result(task);
                (script.change)(&mut answers);
                let more = !answers.is_empty();
                for answer in answers {
                    let answer = answer.map(|message| AttendResponse { message: Some(message) });
                    outbound.send(answer).await.ok();
                }
                if !more {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(messages)))
    }

    async fn get_server_stats(
        &self,
        _: Request<v1::GetServerStatsRequest>,
    ) -> Result<Response<v1::GetServerStatsResponse>, Status> {
        Err(Status::unimplemented("no counters"))
    }
}

/// Ships one task to such a server.
fn outcome_of(
    greeting: Option<ServerGreeting>,
    change: impl Fn(&mut Vec<Result<Answer, Status>>) + Send + Sync + 'static,
    check: impl FnOnce(Result<outboard_transport::TaskOutcome, outboard_proto::TaskError>, String),
) {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = BadServer(Script { greeting, change: Arc::new(change) });
        let router = tonic::transport::Server::builder().add_service(AttentionServiceServer::new(server));
        tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
        let transport = client(address, |_| {});
        let task = shipment(&mut Rng(1), Shape { tasks: 1, ..Shape::small(Direction::Forward) });
        let outcome = transport.ship(task).remove(0).await;
        check(outcome, address.to_string());
    });
}

fn fails(
    kind: ErrorKind,
    expected: &'static str,
    change: impl Fn(&mut Vec<Result<Answer, Status>>) + Send + Sync + 'static,
) {
    outcome_of(Some(greeting()), change, |outcome, address| {
        let error = outcome.expect_err("the server errs");
        assert_eq!((error.kind, error.retry), (kind, RetryHint::Elsewhere), "{error}");
        assert!(error.message.contains(expected), "{error}");
        assert!(error.message.contains(&address), "{error}");
    });
}

fn header(answers: &mut [Result<Answer, Status>]) -> &mut ResultHeader {
    match &mut answers[0] {
        Ok(Answer::Result(header)) => header,
        other => panic!("not a header: {other:?}"),
    }
}

fn chunk(answer: &mut Result<Answer, Status>) -> &mut Chunk {
    match answer {
        Ok(Answer::Chunk(chunk)) => chunk,
        other => panic!("not a chunk: {other:?}"),
    }
}

#[test]
fn a_right_result_is_taken_whatever_its_times_say() {
    outcome_of(Some(greeting()), |_| {}, |outcome, _| drop(outcome.expect("the result is right")));
}

#[test]
fn results_that_do_not_fit_fail_their_task() {
    fails(ErrorKind::Corrupt, "CRC-32C", |answers| chunk(&mut answers[1]).crc32c ^= 1);
    fails(ErrorKind::Corrupt, "beyond the tensor", |answers| {
        let chunk = chunk(&mut answers[2]);
        chunk.data = vec![0; chunk.data.len() + 4].into();
    });
    fails(ErrorKind::Corrupt, "has no tensor 9", |answers| chunk(&mut answers[1]).tensor = 9);
    fails(ErrorKind::Corrupt, "without its header", |answers| drop(answers.remove(0)));
    fails(ErrorKind::Corrupt, "has result_dtype 2", |answers| header(answers).result_dtype = 2);
    fails(ErrorKind::Corrupt, "names 1 tensors", |answers| header(answers).tensors.truncate(1));
    fails(ErrorKind::Corrupt, "must come here", |answers| header(answers).tensors.swap(0, 1));
    fails(ErrorKind::Corrupt, "must come here", |answers| header(answers).tensors[1].id = 0);
    fails(ErrorKind::Corrupt, "names a bad tensor", |answers| header(answers).tensors[0].tokens = None);
}

#[test]
fn a_stream_that_ends_fails_its_tasks() {
    fails(ErrorKind::Unavailable, "closed the stream", Vec::clear);
    fails(ErrorKind::Unavailable, "was lost", |answers| {
        answers[2] = Err(Status::invalid_argument("from a proxy"))
    });
    fails(ErrorKind::Internal, "ended the stream", |answers| {
        answers[2] = Err(outboard_proto::TaskError::internal("a defect").into());
    });
}

#[test]
fn a_failure_without_a_reason_is_one() {
    outcome_of(
        Some(greeting()),
        |answers| *answers = vec![Ok(Answer::Failure(v1::TaskFailure { task: 0, failure: None }))],
        |outcome, _| assert_eq!(outcome.expect_err("it failed").kind, ErrorKind::Internal),
    );
}

#[test]
fn bad_greetings_are_refused() {
    let version_1 = ServerGreeting { protocol_version: 1, ..greeting() };
    outcome_of(
        Some(version_1),
        |_| {},
        |outcome, address| {
            let error = outcome.expect_err("another version");
            assert_eq!(error.kind, ErrorKind::Unsupported);
            assert!(
                error.message.contains("protocol_version is 1, and 2") && error.message.contains(&address),
                "{error}"
            );
        },
    );
}
