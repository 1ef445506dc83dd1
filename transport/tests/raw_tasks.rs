//! Tasks sent by hand with the stock generated client: what a server makes of those that err.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use bytes::Bytes;
use outboard_attention::DType;
use outboard_proto::v1::attend_request::Message;
use outboard_proto::v1::{self, TaskHeader};
use outboard_proto::{ErrorKind, MAX_CHUNK_BYTES, RetryHint};
use outboard_transport::grpc::ServerConfig;
use support::*;

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
