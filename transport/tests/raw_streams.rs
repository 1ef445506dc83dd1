//! Streams made by hand with the stock generated client: what a server makes of those that err.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use bytes::Bytes;
use outboard_attention::DType;
use outboard_proto::v1::attend_request::Message;
use outboard_proto::v1::attend_response::Message as Answer;
use outboard_proto::v1::{self, AttendRequest, ClientGreeting};
use outboard_proto::{ErrorKind, PROTOCOL_VERSION, TaskError};
use outboard_transport::grpc::{LinkConfig, ServerConfig};
use support::*;
use tokio::sync::mpsc;

const MIB: u64 = 1 << 20;

/// What a stream that begins with `messages` ends with.
fn ends_with(kind: ErrorKind, expected: &str, messages: Vec<Message>) {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        let link = LinkConfig { window_bytes: 1 << 20, ..LinkConfig::default() };
        let stall_timeout = Duration::from_millis(300);
        let config = ServerConfig { stall_timeout, link, ..ServerConfig::default() };
        let server = Server::start_at(&handler, "127.0.0.1:0", config).await;
        let mut raw = Raw::silent(&server).await;
        for message in messages {
            // The server may have ended the stream by now.
            raw.outbound.send(AttendRequest { message: Some(message) }).await.ok();
        }
        let error = raw.end().await;
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.message.contains(expected), "{error}");
        eventually("all memory is free", || handler.budget.used() == 0).await;
        let (mut next, _) = Raw::open(&server).await;
        next.send_all(&script(1)).await;
        next.check_result(&script(1)).await;
    });
}

#[test]
fn streams_that_break_the_protocol_end_with_a_reason() {
    use Message::{Credit, Greeting, Task};
    let ask = |bytes| Credit(v1::CreditRequest { bytes });
    ends_with(ErrorKind::Invalid, "must be its greeting", vec![Task(script(1).header)]);
    let version_1 = ClientGreeting { protocol_version: 1, ..greeting() };
    ends_with(ErrorKind::Unsupported, "protocol_version is 1, and 2", vec![Greeting(version_1)]);
    ends_with(ErrorKind::Invalid, "second greeting", vec![Greeting(greeting()), Greeting(greeting())]);
    ends_with(ErrorKind::TooLarge, "at once", vec![Greeting(greeting()), ask(u64::MAX)]);
    ends_with(ErrorKind::TooLarge, "at once", vec![Greeting(greeting()), ask(60 * MIB)]);
    ends_with(
        ErrorKind::Invalid,
        "another request waits",
        vec![
            Greeting(greeting()),
            ask(48 * MIB),
            Credit(v1::CreditRequest { bytes: 40 * MIB }),
            ask(40 * MIB),
            ask(40 * MIB),
        ],
    );
    ends_with(ErrorKind::DeadlineExceeded, "greeting", vec![]);
    ends_with(
        ErrorKind::DeadlineExceeded,
        "sending the tensors",
        vec![Greeting(greeting()), Task(script(1).header), Message::Chunk(script(1).chunks[0].clone())],
    );
}

#[test]
fn a_message_of_no_known_kind_ends_the_stream() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        let server = Server::start(&handler).await;
        let (mut raw, _) = Raw::open(&server).await;
        raw.outbound.send(AttendRequest { message: None }).await.unwrap();
        let error = raw.end().await;
        assert_eq!(error.kind, ErrorKind::Invalid);
        assert!(error.message.contains("no known kind"), "{error}");
    });
}

#[test]
fn a_stream_idle_for_long_hears_of_a_drain_before_it_ends() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        let config = ServerConfig { linger: Duration::from_millis(500), ..ServerConfig::default() };
        let mut server = Server::start_at(&handler, "127.0.0.1:0", config).await;
        let (mut raw, _) = Raw::open(&server).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        handler.draining.store(true, SeqCst);
        server.drain.cancel();
        assert!(matches!(raw.next().await, Answer::Drain(_)));
        // On its way before the client knew.
        raw.send_all(&script(1)).await;
        let (task, error) = raw.failure().await;
        assert_eq!((task, error.kind), (1, ErrorKind::Unavailable), "{error}");
        assert!(error.message.contains("draining"), "{error}");
        // The client never ends the stream; the server does.
        (&mut server.served).await.expect("the server ends by itself");
    });
}

#[test]
fn a_client_that_sends_no_more_still_gets_its_results() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        let server = Server::start(&handler).await;
        let (raw, _) = Raw::open(&server).await;
        let (half, whole) = (script(1), script(2));
        raw.send(Message::Task(half.header.clone())).await;
        raw.send_all(&whole).await;
        let Raw { outbound, inbound } = raw;
        drop(outbound);
        let mut raw = Raw { outbound: mpsc::channel(1).0, inbound };
        let (mut failed, mut received) = (None, 0);
        while let Some(answer) = raw.inbound.message().await.unwrap() {
            match answer.message.unwrap() {
                Answer::Failure(failure) => {
                    failed = Some((failure.task, TaskError::from(failure.failure.unwrap())))
                }
                Answer::Chunk(chunk) => received += chunk.data.len(),
                _ => {}
            }
        }
        let (task, error) = failed.expect("half a task fails");
        assert_eq!((task, error.kind), (1, ErrorKind::Corrupt), "{error}");
        let results = compute(&whole.request.header, &whole.request.inputs().unwrap());
        assert_eq!(received, elements(results).iter().map(Vec::len).sum::<usize>());
        eventually("all memory is free", || handler.budget.used() == 0).await;
    });
}

#[test]
fn credit_comes_back_as_tasks_end() {
    run(async {
        let handler = TestHandler::new(16 * MIB);
        let server = Server::start(&handler).await;
        let (mut raw, greeting) = Raw::open(&server).await;
        assert_eq!((greeting.credit_bytes, greeting.memory_bytes), (2 * MIB, 12 * MIB));
        assert_eq!(greeting.protocol_version, PROTOCOL_VERSION);
        assert_eq!(greeting.numerics_ids, DType::ALL.map(numerics_id));
        raw.send(Message::Credit(v1::CreditRequest { bytes: 3 * MIB })).await;
        match raw.next().await {
            Answer::Credit(grant) => assert_eq!((grant.bytes, grant.answers_request), (3 * MIB, true)),
            other => panic!("no grant but {other:?}"),
        }
        raw.send(Message::CreditReturn(v1::CreditReturn { bytes: 3 * MIB })).await;
        eventually("the budget has it back", || handler.budget.used() == 2 * MIB).await;
        raw.send_all(&script(1)).await;
        // All that was spent comes back, in one grant or several.
        let bytes: u64 = script(1).chunks.iter().map(|chunk| chunk.data.len() as u64).sum();
        let results = compute(&script(1).request.header, &script(1).request.inputs().unwrap());
        // A header with one slice and three tensors.
        let header = 4096 + 256 + 3 * 256;
        let mut spent = header + bytes + elements(results).iter().map(|x| x.len() as u64).sum::<u64>();
        while spent > 0 {
            if let Answer::Credit(grant) = raw.next().await {
                assert!(!grant.answers_request);
                spent -= grant.bytes;
            }
        }
        assert_eq!(handler.budget.used(), 2 * MIB);
    });
}

#[test]
fn arbitrary_messages_never_stop_the_server() {
    run(async {
        let handler = TestHandler::new(16 * MIB);
        let server = Server::start(&handler).await;
        let mut rng = Rng(77);
        for _ in 0..40 {
            let (raw, _) = Raw::open(&server).await;
            let Raw { outbound, mut inbound } = raw;
            let reader = tokio::spawn(async move { while let Ok(Some(_)) = inbound.message().await {} });
            for _ in 0..30 {
                let message = arbitrary(&mut rng);
                if outbound.send(AttendRequest { message: Some(message) }).await.is_err() {
                    break;
                }
            }
            drop(outbound);
            reader.abort();
        }
        let (mut raw, _) = Raw::open(&server).await;
        raw.send_all(&script(1)).await;
        raw.check_result(&script(1)).await;
        drop(raw);
        eventually("all memory is free", || handler.budget.used() == 0).await;
    });
}

/// A message that is right but for a few fields.
fn arbitrary(rng: &mut Rng) -> Message {
    let id = rng.between(0, 3) as u64;
    let mut script = script(id);
    let wild = |rng: &mut Rng| match rng.between(0, 5) {
        0 => u64::MAX,
        1 => 1 << 30,
        2 => 0,
        _ => rng.between(0, 40) as u64,
    };
    match rng.between(0, 12) {
        0 => Message::Cancel(v1::CancelTask { task: wild(rng) }),
        1 => Message::Credit(v1::CreditRequest { bytes: wild(rng) }),
        2 => Message::CreditReturn(v1::CreditReturn { bytes: wild(rng) }),
        3..7 => {
            for _ in 0..rng.between(0, 2) {
                let span = Some(v1::Span { start: wild(rng), end: wild(rng) });
                let tensor = rng.between(0, 2);
                match rng.between(0, 11) {
                    0 => script.header.q = span,
                    1 => script.header.kv = span,
                    2 => script.header.kv_heads = span,
                    3 => script.header.slices[0].q = span,
                    4 => script.header.slices[0].lo = Some(wild(rng) as i64),
                    5 => script.header.tensors[tensor].id = wild(rng),
                    6 => script.header.tensors[tensor].tokens = span,
                    7 => script.header.tensors[tensor].carried ^= true,
                    8 => script.header.tensors[tensor].last_use ^= true,
                    9 => script.header.tensors[tensor].kind = wild(rng) as i32,
                    10 => script.header.geometry.as_mut().unwrap().head_dim = wild(rng) as u32,
                    _ => script.header.direction = wild(rng) as i32,
                }
            }
            Message::Task(script.header)
        }
        _ => {
            let n = rng.between(0, script.chunks.len() - 1);
            let mut chunk = script.chunks.swap_remove(n);
            match rng.between(0, 8) {
                0 => chunk.offset = wild(rng),
                1 => chunk.tensor = wild(rng),
                2 => chunk.task = wild(rng),
                3 => chunk.crc32c = wild(rng) as u32,
                4 => chunk.data = Bytes::from(vec![1; rng.between(0, 2_000_000)]),
                _ => {}
            }
            Message::Chunk(chunk)
        }
    }
}
