//! Tasks sent by hand whose keys the server is to fetch: what it makes of those that err, and of what befalls them
//! meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use outboard_proto::v1::attend_request::Message;
use outboard_proto::v1::{self, Chunk, TaskHeader};
use outboard_proto::{ErrorKind, RetryHint};
use outboard_transport::grpc::ServerConfig;
use support::*;
use tokio::sync::mpsc;

const MIB: u64 = 1 << 20;
/// Some parts, wherever they are.
const CUT: Cut<'_> = Cut { parts: 40, at: &[0, 1] };

/// A server, and homes of which the second is as asked for.
struct Setup {
    handler: Arc<TestHandler>,
    server: Server,
    places: Places,
}

impl Setup {
    async fn new(second: Spec) -> Setup {
        let places = Places::start(&[Spec::Beside, second]).await;
        let handler = TestHandler::new(64 * MIB);
        let homes = places.way(quick());
        let server = Server::start_with(&handler, "127.0.0.1:0", ServerConfig::default(), homes).await;
        Setup { handler, server, places }
    }

    fn script(&self, id: u64) -> Script {
        script_at_homes(id, &self.places, CUT)
    }

    /// A task whose keys all lie at the second home.
    fn script_at_second(&self, id: u64) -> Script {
        script_at_homes(id, &self.places, Cut { at: &[1], ..CUT })
    }

    fn fetches(&self) -> usize {
        self.places.0[1].wire.as_ref().unwrap().fetches.load(SeqCst)
    }

    fn release(&self) {
        self.places.0[1].wire.as_ref().unwrap().release();
    }

    async fn check_freed(&self, raw: Raw) {
        drop(raw);
        eventually("all memory is free", || self.handler.budget.used() == 0).await;
    }
}

/// The same task once more, which names the tensors of the first.
fn again(carrier: &mut Script, id: u64) -> Script {
    let mut other = carrier.clone();
    other.header.task = id;
    carrier.header.tensors.iter_mut().for_each(|tensor| tensor.last_use = false);
    other.header.tensors.iter_mut().for_each(|tensor| tensor.carried = false);
    other
}

/// Sends a bad script between two good ones; the bad one fails as expected, the others succeed.
fn bad_task(kind: ErrorKind, expected: &str, change: impl FnOnce(&mut Script)) {
    run(async {
        let setup = Setup::new(Spec::Real).await;
        let (mut raw, _) = Raw::open(&setup.server).await;
        let (before, mut bad, after) = (setup.script(1), setup.script(2), setup.script(3));
        change(&mut bad);
        raw.send_all(&before).await;
        raw.check_result(&before).await;
        raw.send_all(&bad).await;
        let (task, error) = raw.failure().await;
        assert_eq!((task, error.kind), (2, kind), "{error}");
        assert!(error.message.contains(expected), "{error}");
        raw.send_all(&after).await;
        raw.check_result(&after).await;
        assert_eq!(setup.handler.failed.lock().unwrap().len(), 1, "one failure is counted");
        setup.check_freed(raw).await;
    });
}

#[test]
fn headers_whose_homes_do_not_hold_together_fail_alone() {
    let span = |start, end| Some(v1::Span { start, end });
    bad_task(ErrorKind::Invalid, "without a gap", |s| {
        s.header.key_homes[1].tokens.as_mut().unwrap().start += 1;
    });
    bad_task(ErrorKind::Invalid, "without a gap", |s| s.header.key_homes.swap(0, 1));
    bad_task(ErrorKind::Invalid, "outside the tokens of key_homes", |s| {
        s.header.key_homes.truncate(1);
        s.header.key_homes[0].tokens = span(0, 1);
    });
    bad_task(ErrorKind::Invalid, "key_homes[1]: tokens is missing", |s| s.header.key_homes[1].tokens = None);
    bad_task(ErrorKind::Invalid, "key_homes[1]", |s| s.header.key_homes[1].tokens = span(7, 7));
    bad_task(ErrorKind::Invalid, "is empty", |s| s.header.key_homes[0].address.clear());
    bad_task(ErrorKind::Invalid, "address has 257 bytes", |s| {
        s.header.key_homes[0].address = "x".repeat(257);
    });
    bad_task(ErrorKind::Invalid, "at most 8192", |s| {
        let home = |n| v1::KeyHome { tokens: span(n, n + 1), ..s.header.key_homes[0].clone() };
        s.header.key_homes = (0..8193).map(home).collect();
    });
    bad_task(ErrorKind::Invalid, "the stream holds credit for", |s| {
        // The homes of so many take more than a client has to begin with.
        let address = s.header.key_homes[0].address.clone();
        let home = |n| v1::KeyHome { tokens: span(n, n + 1), rank: 0, address: address.clone() };
        s.header.key_homes = (0..8192).map(home).collect();
        s.header.tensors[1..].iter_mut().for_each(|tensor| tensor.tokens = span(0, 8192));
    });
    // An address that is none, or where nobody is, fails like any home that is lost.
    bad_task(ErrorKind::Aborted, "is no address of a server", |s| {
        s.header.key_homes.iter_mut().for_each(|home| home.address = "no address".to_owned());
    });
}

#[test]
fn tensors_that_do_not_fit_the_homes_fail_alone() {
    bad_task(ErrorKind::Invalid, "carried both or neither", |s| s.header.tensors[1].carried = false);
    bad_task(ErrorKind::Invalid, "carried both or neither", |s| s.header.tensors[2].carried = false);
    bad_task(ErrorKind::Invalid, "K and V must hold these", |s| {
        s.header.tensors[1].tokens.as_mut().unwrap().end += 1;
    });
    bad_task(ErrorKind::Invalid, "carried twice", |s| s.header.tensors[2].id = s.header.tensors[1].id);
    bad_task(ErrorKind::Invalid, "no task of the stream carries it", |s| {
        s.header.tensors[1..].iter_mut().for_each(|tensor| tensor.carried = false);
    });
}

#[test]
fn a_chunk_of_a_tensor_that_homes_send_fails_its_task_alone() {
    run(async {
        let setup = Setup::new(Spec::Wire(WireFault::Holds)).await;
        let (mut raw, _) = Raw::open(&setup.server).await;
        let (bad, good) = (setup.script_at_second(1), setup.script_at_second(2));
        raw.send_all(&bad).await;
        raw.send_all(&good).await;
        let data = bytes::Bytes::from_static(&[0; 16]);
        let chunk = Chunk { task: 1, tensor: 11, offset: 0, crc32c: crc32c::crc32c(&data), data };
        raw.send(Message::Chunk(chunk)).await;
        let (task, error) = raw.failure().await;
        assert_eq!((task, error.kind), (1, ErrorKind::Corrupt), "{error}");
        assert!(error.message.contains("which its homes send"), "{error}");
        setup.release();
        raw.check_result(&good).await;
        setup.check_freed(raw).await;
    });
}

#[test]
fn credit_counts_fetched_keys_and_every_home() {
    run(async {
        let setup = Setup::new(Spec::Real).await;
        setup.handler.hold.store(true, SeqCst);
        let (raw, _) = Raw::open(&setup.server).await;
        let script = setup.script(1);
        raw.send_all(&script).await;
        eventually("the task is held", || setup.handler.held() == 1).await;
        let header = &script.request.header;
        let (rows, heads) = (header.task.q().len(), header.task.kv_heads().len());
        let sent: usize = script.chunks.iter().map(|chunk| chunk.data.len()).sum();
        let fetched = header.fetched_keys().unwrap().len() * heads * 2 * 64 * 4;
        let results = rows * 2 * heads * (64 + 1) * 4;
        let header = 4096 + 256 * (1 + 3 + header.key_homes.len());
        let lease = setup.handler.held.lock().unwrap()[0].lease.bytes();
        assert_eq!(lease, (header + sent + fetched + results) as u64);
    });
}

#[test]
fn keys_outlive_the_task_that_carries_them() {
    run(async {
        for cancelled in [false, true] {
            let setup = Setup::new(Spec::Wire(WireFault::Holds)).await;
            let (mut raw, _) = Raw::open(&setup.server).await;
            let mut carrier = setup.script_at_second(1);
            let (second, last) = (again(&mut carrier, 2), again(&mut carrier.clone(), 3));
            raw.send_all(&carrier).await;
            eventually("keys are on their way", || setup.fetches() > 0).await;
            if cancelled {
                raw.send(Message::Cancel(v1::CancelTask { task: 1 })).await;
            }
            // Whether it comes before the keys, or after.
            let mut second = second;
            second.header.tensors.iter_mut().for_each(|tensor| tensor.last_use = false);
            raw.send(Message::Task(second.header.clone())).await;
            setup.release();
            if cancelled {
                raw.check_result(&second).await;
            } else {
                raw.check_results(&[&carrier, &second]).await;
            }
            raw.send(Message::Task(last.header.clone())).await;
            raw.check_result(&last).await;
            assert_eq!(setup.handler.failed.lock().unwrap().len(), 0);
            setup.check_freed(raw).await;
        }
    });
}

#[test]
fn a_fetch_that_no_task_waits_for_is_given_up_and_its_ids_are_free_again() {
    run(async {
        let setup = Setup::new(Spec::Wire(WireFault::Holds)).await;
        let (mut raw, greeting) = Raw::open(&setup.server).await;
        let mut other = setup.script_at_second(2);
        for round in 0..20 {
            let given_up = setup.script_at_second(1);
            raw.send_all(&given_up).await;
            if round % 2 == 0 {
                eventually("keys are on their way", || setup.fetches() > 0).await;
            }
            raw.send(Message::Cancel(v1::CancelTask { task: 1 })).await;
        }
        eventually("the fetches are given up", || setup.fetches() == 0).await;
        eventually("their memory is free", || setup.handler.budget.used() == greeting.credit_bytes).await;
        // Other keys under the same ids, while those of the task given up may still come.
        let given_up = setup.script_at_second(1);
        raw.send_all(&given_up).await;
        raw.send(Message::Cancel(v1::CancelTask { task: 1 })).await;
        for tensor in &mut other.header.tensors {
            tensor.id -= 10;
        }
        other.chunks.iter_mut().for_each(|chunk| chunk.tensor -= 10);
        // The chunks of Q that came for the first are its own: the second has another id for it.
        other.header.tensors[0].id += 90;
        other.chunks.iter_mut().for_each(|chunk| chunk.tensor += 90);
        raw.send_all(&other).await;
        setup.release();
        raw.check_result(&other).await;
        setup.check_freed(raw).await;
    });
}

#[test]
fn a_later_task_that_names_lost_keys_fails_as_their_own_did() {
    run(async {
        let setup = Setup::new(Spec::Gone).await;
        let (mut raw, _) = Raw::open(&setup.server).await;
        let mut carrier = setup.script_at_second(1);
        let later = again(&mut carrier, 2);
        let spent = raw.send_all(&carrier);
        spent.await;
        for (id, script) in [(1, &carrier), (2, &later)] {
            if id == 2 {
                // Its own Q has come with the carrier, and is whole.
                raw.send(Message::Task(script.header.clone())).await;
            }
            let (task, error) = raw.failure().await;
            assert_eq!(
                (task, error.kind, error.retry),
                (id, ErrorKind::Aborted, RetryHint::Later),
                "{error}"
            );
            assert!(error.message.contains("rank 11"), "{error}");
        }
        // It was the last to name them.
        raw.send(Message::Task(TaskHeader { task: 3, ..later.header })).await;
        let (task, error) = raw.failure().await;
        assert_eq!((task, error.kind), (3, ErrorKind::Invalid), "{error}");
        let good = setup.script(4);
        if good.header.key_homes.iter().all(|home| home.rank == 10) {
            raw.send_all(&good).await;
            raw.check_result(&good).await;
        }
        setup.check_freed(raw).await;
    });
}

#[test]
fn a_client_that_sends_no_more_gets_the_results_of_tasks_whose_keys_are_on_their_way() {
    run(async {
        let setup = Setup::new(Spec::Wire(WireFault::Holds)).await;
        let (mut raw, _) = Raw::open(&setup.server).await;
        let (whole, half) = (setup.script_at_second(1), setup.script_at_second(2));
        raw.send_all(&whole).await;
        // The queries of this one do not come.
        raw.send(Message::Task(half.header.clone())).await;
        raw.outbound = mpsc::channel(1).0;
        let (task, error) = raw.failure().await;
        assert_eq!((task, error.kind), (2, ErrorKind::Corrupt), "{error}");
        setup.release();
        raw.check_result(&whole).await;
        setup.check_freed(raw).await;
    });
}

#[test]
fn a_client_that_goes_takes_its_fetches_along() {
    run(async {
        let setup = Setup::new(Spec::Wire(WireFault::Holds)).await;
        let (raw, _) = Raw::open(&setup.server).await;
        for id in 1..5 {
            raw.send_all(&setup.script_at_second(id)).await;
        }
        eventually("keys are on their way", || setup.fetches() > 0).await;
        setup.check_freed(raw).await;
        eventually("the fetches are given up", || setup.fetches() == 0).await;
    });
}
