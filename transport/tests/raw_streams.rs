//! Streams made by hand with the stock generated client: what a server makes of clients that err.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use bytes::Bytes;
use outboard_attention::DType;
use outboard_proto::v1::attend_request::Message;
use outboard_proto::v1::attend_response::Message as Answer;
use outboard_proto::v1::{self, AttendRequest, ClientGreeting, TaskHeader};
use outboard_proto::{ErrorKind, MAX_CHUNK_BYTES, PROTOCOL_VERSION, RetryHint, TaskError};
use outboard_transport::grpc::{LinkConfig, ServerConfig};
use support::*;
use tokio::sync::mpsc;

const MIB: u64 = 1 << 20;

/// Sends a bad script between two good ones; the bad one fails as expected, the others succeed.
fn bad_task(kind: ErrorKind, expected: &str, change: impl FnOnce(&mut Script)) {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        let server = Server::start(&handler).await;
        let (mut raw, _) = Raw::open(&server).await;
        let (before, mut bad, after) = (script(1), script(2), script(3));
        change(&mut bad);
        raw.send(Message::Task(before.header.clone())).await;
        raw.send_all(&bad).await;
        let (task, error) = raw.failure().await;
        assert_eq!(task, 2, "{error}");
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.message.contains(expected), "{error}");
        for chunk in &before.chunks {
            raw.send(Message::Chunk(chunk.clone())).await;
        }
        // Chunks of the bad task that come late are no error; skip what they may have caused.
        raw.check_result(&before).await;
        raw.send_all(&after).await;
        raw.check_result(&after).await;
        assert_eq!(handler.failed.lock().unwrap().len(), 1, "one failure is counted");
        drop(raw);
        eventually("all memory is free", || handler.budget.used() == 0).await;
    });
}

#[test]
fn a_wrong_checksum_fails_its_task_alone() {
    bad_task(ErrorKind::Corrupt, "job test, step 5, layer 1, forward, document 0.3", |s| {
        s.chunks[1].crc32c ^= 1
    });
    bad_task(ErrorKind::Corrupt, "CRC-32C", |s| {
        let mut data = s.chunks[0].data.to_vec();
        data[7] ^= 0x40;
        s.chunks[0].data = data.into();
    });
}

#[test]
fn a_chunk_that_is_not_the_next_fails_its_task_alone() {
    bad_task(ErrorKind::Corrupt, "leaves a gap", |s| drop(s.chunks.remove(0)));
    bad_task(ErrorKind::Corrupt, "overlaps", |s| s.chunks.insert(1, s.chunks[0].clone()));
    bad_task(ErrorKind::Corrupt, "has 0 bytes", |s| s.chunks[0].data = Bytes::new());
    bad_task(ErrorKind::Corrupt, "it must have 1 to", |s| {
        s.chunks[0].data = vec![0; MAX_CHUNK_BYTES + 1].into()
    });
}

#[test]
fn a_chunk_beyond_the_tensor_fails_its_task_alone() {
    bad_task(ErrorKind::Corrupt, "beyond the tensor", |s| {
        let last = s.chunks.iter().rposition(|c| c.tensor == 20).unwrap();
        let mut data = s.chunks[last].data.to_vec();
        data.push(0);
        s.chunks[last].crc32c = crc32c::crc32c(&data);
        s.chunks[last].data = data.into();
    });
    bad_task(ErrorKind::Corrupt, "after tensor 20 was whole", |s| {
        // The tensor is one that others might still name.
        s.header.tensors[0].last_use = false;
        let last = s.chunks.iter().rposition(|c| c.tensor == 20).unwrap();
        let mut more = s.chunks[last].clone();
        more.offset += more.data.len() as u64;
        s.chunks.insert(last + 1, more);
    });
}

#[test]
fn a_chunk_of_an_unknown_tensor_fails_its_task_alone() {
    bad_task(ErrorKind::Corrupt, "tensor 777", |s| s.chunks[0].tensor = 777);
}

#[test]
fn a_chunk_under_another_task_fails_that_task_alone() {
    bad_task(ErrorKind::Corrupt, "task 1 carries it", |s| {
        let mut stray = script(1).chunks[0].clone();
        stray.task = 2;
        s.chunks.insert(0, stray);
    });
}

#[test]
fn headers_that_do_not_hold_together_fail_alone() {
    let span = |start, end| Some(v1::Span { start, end });
    bad_task(ErrorKind::Invalid, "kv_heads [5, 6)", |s| {
        s.header.kv_heads = span(5, 6);
        s.header.slices.iter_mut().for_each(|slice| slice.kv_heads = span(5, 6));
    });
    bad_task(ErrorKind::Invalid, "scale is NaN", |s| s.header.geometry.as_mut().unwrap().scale = f32::NAN);
    bad_task(ErrorKind::Invalid, "start 9 is above end 3", |s| s.header.q = span(9, 3));
    bad_task(ErrorKind::Invalid, "q is missing", |s| s.header.q = None);
    bad_task(ErrorKind::Invalid, "geometry is missing", |s| s.header.geometry = None);
    bad_task(ErrorKind::Invalid, "direction is 9", |s| s.header.direction = 9);
    bad_task(ErrorKind::Invalid, "reaches outside task.kv", |s| s.header.slices[0].kv = span(0, 301));
    bad_task(ErrorKind::Unsupported, "sink", |s| s.header.sink = true);
    bad_task(ErrorKind::Unsupported, "sink", |s| s.header.sink = true);
    bad_task(ErrorKind::Unsupported, "result_dtype is bf16", |s| {
        s.header.result_dtype = v1::DType::Bf16 as i32
    });
    bad_task(ErrorKind::Unsupported, "protocol_version is 1, and 2", |s| s.header.protocol_version = 1);
    bad_task(ErrorKind::NumericsMismatch, "\"other-7\"", |s| s.header.numerics_id = "other-7".into());
    bad_task(ErrorKind::Invalid, "the stream holds credit for", |s| {
        s.header.tensors[0].tokens = span(0, 1 << 29)
    });
}

#[test]
fn tensors_that_do_not_fit_fail_alone() {
    let span = |start, end| Some(v1::Span { start, end });
    bad_task(ErrorKind::Invalid, "names K 0 times", |s| {
        s.header.tensors.remove(1);
        s.chunks.retain(|chunk| chunk.tensor != 21);
    });
    bad_task(ErrorKind::Invalid, "names Q 2 times", |s| {
        s.header.tensors.push(s.header.tensors[0]);
        s.header.tensors[3].id = 29;
    });
    bad_task(ErrorKind::Invalid, "no task of the stream carries it", |s| {
        s.header.tensors[1].carried = false;
        s.chunks.retain(|chunk| chunk.tensor != 21);
    });
    bad_task(ErrorKind::Invalid, "carried twice", |s| {
        s.header.tensors[1].id = 10;
        s.chunks.retain(|chunk| chunk.tensor != 21);
    });
    bad_task(ErrorKind::Invalid, "and the task needs", |s| s.header.tensors[1].tokens = span(0, 1));
    bad_task(ErrorKind::Invalid, "last to use it", |s| {
        s.header.tensors[1] =
            v1::TensorRef { id: 11, carried: false, tokens: span(0, 300), ..s.header.tensors[1] };
        s.chunks.retain(|chunk| chunk.tensor != 21);
    });
    bad_task(ErrorKind::Invalid, "does not read it", |s| {
        s.header.tensors.push(v1::TensorRef {
            kind: v1::TensorKind::DO as i32,
            id: 29,
            ..s.header.tensors[0]
        });
    });
}

#[test]
fn bytes_of_another_element_type_fail_their_task_alone() {
    // The header says bf16, and as many bytes follow as f32 has.
    bad_task(ErrorKind::Corrupt, "bytes of bf16", |s| {
        s.header.geometry.as_mut().unwrap().dtype = v1::DType::Bf16 as i32;
    });
    bad_task(ErrorKind::Invalid, "dtype is 9", |s| s.header.geometry.as_mut().unwrap().dtype = 9);
    bad_task(ErrorKind::Invalid, "dtype is not given", |s| s.header.geometry.as_mut().unwrap().dtype = 0);
}

/// A tensor of one element type cannot be read as another, even where the sizes of tokens are alike.
#[test]
fn a_tensor_is_named_with_the_element_type_that_it_was_carried_with() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        let server = Server::start(&handler).await;
        let (mut raw, _) = Raw::open(&server).await;
        let mut carrier = script_of(1, DType::Bf16);
        let mut other = script_of(2, DType::F16);
        other.header = TaskHeader { task: 2, geometry: other.header.geometry, ..carrier.header.clone() };
        carrier.header.tensors.iter_mut().for_each(|tensor| tensor.last_use = false);
        other.header.tensors.iter_mut().for_each(|tensor| tensor.carried = false);
        raw.send_all(&carrier).await;
        raw.send(Message::Task(other.header)).await;
        let (task, error) = raw.failure().await;
        assert_eq!((task, error.kind), (2, ErrorKind::Invalid), "{error}");
        assert!(
            error.message.contains("of bf16, and the task needs") && error.message.contains("of f16"),
            "{error}"
        );
    });
}

#[test]
fn credit_counts_the_size_of_an_element() {
    run(async {
        for dtype in DType::ALL {
            let handler = TestHandler::new(16 * MIB);
            handler.hold.store(true, SeqCst);
            let server = Server::start(&handler).await;
            let (raw, _) = Raw::open(&server).await;
            let script = script_of(1, dtype);
            raw.send_all(&script).await;
            eventually("the task is held", || handler.held() == 1).await;
            let task = &script.request.header.task;
            let (rows, keys, kv_heads) = (task.q().len(), task.kv().len(), task.kv_heads().len());
            let elements = (rows * 2 + keys * 2) * kv_heads * 64;
            let carried: usize = script.chunks.iter().map(|chunk| chunk.data.len()).sum();
            assert!(carried >= elements * dtype.bytes() && carried.is_multiple_of(dtype.bytes()));
            let results = rows * 2 * kv_heads * (64 + 1) * 4;
            let header = 4096 + 256 + 3 * 256;
            let lease = handler.held.lock().unwrap()[0].lease.bytes();
            assert_eq!(lease, (header + carried + results) as u64, "{dtype}");
        }
    });
}

#[test]
fn a_task_id_taken_twice_fails_and_leaves_others_alone() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        let server = Server::start(&handler).await;
        let (mut raw, _) = Raw::open(&server).await;
        let (good, first) = (script(1), script(2));
        let mut second = script(3);
        second.header.task = 2;
        raw.send(Message::Task(first.header.clone())).await;
        raw.send(Message::Task(second.header.clone())).await;
        let (task, error) = raw.failure().await;
        assert_eq!((task, error.kind), (2, ErrorKind::Invalid), "{error}");
        assert!(error.message.contains("task id 2 is taken"), "{error}");
        for chunk in first.chunks.iter().chain(&second.chunks) {
            raw.send(Message::Chunk(chunk.clone())).await;
        }
        raw.send_all(&good).await;
        raw.check_result(&good).await;
        assert_eq!(handler.failed.lock().unwrap().len(), 1);
        drop(raw);
        eventually("all memory is free", || handler.budget.used() == 0).await;
    });
}

#[test]
fn a_tensor_may_be_named_before_it_is_whole_and_outlives_its_carrier() {
    run(async {
        for carrier_is_cancelled in [false, true] {
            let handler = TestHandler::new(64 * MIB);
            let server = Server::start(&handler).await;
            let (mut raw, _) = Raw::open(&server).await;
            let (mut carrier, mut other) = (script(1), script(2));
            // The second task is the first one again, on the first one's tensors.
            other.header = TaskHeader { task: 2, ..carrier.header.clone() };
            other.request = carrier.request.clone();
            carrier.header.tensors.iter_mut().for_each(|tensor| tensor.last_use = false);
            other.header.tensors.iter_mut().for_each(|tensor| tensor.carried = false);
            raw.send(Message::Task(carrier.header.clone())).await;
            raw.send(Message::Task(other.header.clone())).await;
            // Chunks of different tensors interleave.
            carrier.chunks.sort_by_key(|chunk| chunk.offset);
            for (n, chunk) in carrier.chunks.iter().enumerate() {
                raw.send(Message::Chunk(chunk.clone())).await;
                if n == 1 && carrier_is_cancelled {
                    raw.send(Message::Cancel(v1::CancelTask { task: 1 })).await;
                }
            }
            if carrier_is_cancelled {
                raw.check_result(&other).await;
            } else {
                raw.check_results(&[&carrier, &other]).await;
            }
            assert_eq!(handler.failed.lock().unwrap().len(), 0);
            drop(raw);
            eventually("all memory is free", || handler.budget.used() == 0).await;
        }
    });
}

#[test]
fn running_tasks_count_among_those_under_way() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        handler.hold.store(true, SeqCst);
        let config = ServerConfig { max_tasks: 2, ..ServerConfig::default() };
        let server = Server::start_at(&handler, "127.0.0.1:0", config).await;
        let (mut raw, _) = Raw::open(&server).await;
        let (first, second, refused, last) = (script(1), script(2), script(3), script(4));
        raw.send_all(&first).await;
        raw.send_all(&second).await;
        eventually("two are held", || handler.held() == 2).await;
        raw.send_all(&refused).await;
        let (task, error) = raw.failure().await;
        assert_eq!((task, error.kind, error.retry), (3, ErrorKind::Busy, RetryHint::Later), "{error}");
        assert!(error.message.contains("2 run; 2 tasks may be under way"), "{error}");
        handler.release();
        raw.check_results(&[&first, &second]).await;
        raw.send_all(&last).await;
        raw.check_result(&last).await;
    });
}

#[test]
fn a_task_refused_for_want_of_room_leaves_shared_tensors_to_others() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        let config = ServerConfig { max_tasks: 1, ..ServerConfig::default() };
        let server = Server::start_at(&handler, "127.0.0.1:0", config).await;
        let (mut raw, _) = Raw::open(&server).await;
        let (first, mut carrier, mut other) = (script(1), script(2), script(3));
        other.header = TaskHeader { task: 3, ..carrier.header.clone() };
        other.request = carrier.request.clone();
        carrier.header.tensors.iter_mut().for_each(|tensor| tensor.last_use = false);
        other.header.tensors.iter_mut().for_each(|tensor| tensor.carried = false);
        raw.send(Message::Task(first.header.clone())).await;
        // No room: but what it carries is taken in.
        raw.send(Message::Task(carrier.header.clone())).await;
        let (task, error) = raw.failure().await;
        assert_eq!((task, error.kind, error.retry), (2, ErrorKind::Busy, RetryHint::Later), "{error}");
        for chunk in &first.chunks {
            raw.send(Message::Chunk(chunk.clone())).await;
        }
        raw.check_result(&first).await;
        // The server may hear a moment later than the client that a task has ended.
        tokio::time::sleep(Duration::from_millis(50)).await;
        // Room again: the other task reads what the refused one carries.
        raw.send(Message::Task(other.header.clone())).await;
        for chunk in &carrier.chunks {
            raw.send(Message::Chunk(chunk.clone())).await;
        }
        raw.check_result(&other).await;
        assert_eq!(handler.failed.lock().unwrap().len(), 1);
        drop(raw);
        eventually("all memory is free", || handler.budget.used() == 0).await;
    });
}

#[test]
fn a_task_refused_for_want_of_room_ends_the_tensors_that_it_was_the_last_to_use() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        let config = ServerConfig { max_tasks: 1, ..ServerConfig::default() };
        let server = Server::start_at(&handler, "127.0.0.1:0", config).await;
        let (mut raw, _) = Raw::open(&server).await;
        let (mut carrier, mut last, after) = (script(1), script(2), script(3));
        last.header = TaskHeader { task: 2, ..carrier.header.clone() };
        carrier.header.tensors.iter_mut().for_each(|tensor| tensor.last_use = false);
        last.header.tensors.iter_mut().for_each(|tensor| tensor.carried = false);
        raw.send(Message::Task(carrier.header.clone())).await;
        raw.send(Message::Task(last.header.clone())).await;
        assert_eq!(raw.failure().await.1.kind, ErrorKind::Busy);
        for chunk in &carrier.chunks {
            raw.send(Message::Chunk(chunk.clone())).await;
        }
        raw.check_result(&carrier).await;
        // Named once more, the tensors are gone.
        raw.send(Message::Task(TaskHeader { task: 4, ..last.header })).await;
        let (task, error) = raw.failure().await;
        assert_eq!((task, error.kind), (4, ErrorKind::Invalid), "{error}");
        assert!(error.message.contains("no task of the stream carries it"), "{error}");
        raw.send_all(&after).await;
        raw.check_result(&after).await;
    });
}

#[test]
fn cancelled_tasks_free_their_memory_and_late_chunks_are_no_error() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        handler.hold.store(true, SeqCst);
        let server = Server::start(&handler).await;
        let (mut raw, greeting) = Raw::open(&server).await;
        assert_eq!(handler.budget.used(), greeting.credit_bytes);
        let (half, whole, unheard) = (script(1), script(2), script(3));
        raw.send(Message::Task(half.header.clone())).await;
        raw.send(Message::Chunk(half.chunks[0].clone())).await;
        raw.send_all(&whole).await;
        eventually("one is held", || handler.held() == 1).await;
        for task in [1, 2, 77] {
            raw.send(Message::Cancel(v1::CancelTask { task })).await;
        }
        for chunk in &half.chunks[1..] {
            raw.send(Message::Chunk(chunk.clone())).await;
        }
        eventually("the handler sees it", || handler.all_held_are_cancelled()).await;
        handler.release();
        raw.send_all(&unheard).await;
        raw.check_result(&unheard).await;
        assert_eq!(handler.failed.lock().unwrap().len(), 0);
        drop(raw);
        eventually("all memory is free", || handler.budget.used() == 0).await;
    });
}

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
        let results = compute(&whole.request.header, &whole.request.inputs);
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
        let results = compute(&script(1).request.header, &script(1).request.inputs);
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
