//! Servers that die, freeze, drain or are none, as a gRPC client meets them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use futures::future::join_all;
use outboard_attention::Direction;
use outboard_proto::{ErrorKind, RetryHint};
use outboard_transport::Transport;
use outboard_transport::grpc::{ClientConfig, GrpcTransport, ServerConfig, server_stats};
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::watch;

const MIB: u64 = 1 << 20;

fn some(seed: u64, tokens: usize) -> Vec<outboard_transport::TaskRequest> {
    let shape = Shape { tasks: 4, tokens, head_dim: 64, v_head_dim: 64, ..Shape::small(Direction::Backward) };
    shipment(&mut Rng(seed), shape)
}

/// Every task fails as lost, and says where.
async fn check_lost(pendings: Vec<outboard_transport::Pending>, address: SocketAddr) {
    let started = Instant::now();
    for outcome in join_all(pendings).await {
        let error = outcome.expect_err("the server is gone");
        assert_eq!((error.kind, error.retry), (ErrorKind::Unavailable, RetryHint::Elsewhere), "{error}");
        assert!(error.message.contains(&address.to_string()), "{error}");
        assert!(error.message.contains("step 5, layer 1"), "{error}");
    }
    assert!(started.elapsed() < Duration::from_secs(20), "it took {:?}", started.elapsed());
}

async fn check_works(transport: &dyn Transport) {
    for outcome in join_all(transport.ship(some(99, 100))).await {
        outcome.expect("the server is there");
    }
}

#[test]
fn a_server_killed_while_it_holds_tasks_ends_them_all() {
    run(async {
        for streams in [1, 3] {
            let handler = TestHandler::new(256 * MIB);
            handler.hold.store(true, SeqCst);
            let server = Server::start(&handler).await;
            let transport = client(server.address, |config| config.streams = streams);
            let pendings: Vec<_> = (0..5).flat_map(|n| transport.ship(some(n, 200))).collect();
            eventually("all tasks are held", || handler.held() == 20).await;
            check_lost(pendings, server.kill()).await;
            eventually("the handler sees it", || handler.all_held_are_cancelled()).await;
            handler.release();
            eventually("all memory is free", || handler.budget.used() == 0).await;
        }
    });
}

#[test]
fn a_server_killed_in_mid_transfer_ends_all_tasks_and_the_next_one_is_found() {
    run(async {
        for wait_ms in [0, 1, 5, 20, 50] {
            let handler = TestHandler::new(64 * MIB);
            handler.hold.store(true, SeqCst);
            let server = Server::start(&handler).await;
            let transport = client(server.address, |config| config.streams = 2);
            let pendings: Vec<_> = (0..12).flat_map(|n| transport.ship(some(n, 8000))).collect();
            eventually("bytes move", || transport.traffic().sent > 4 * MIB).await;
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
            let address = server.kill();
            check_lost(pendings, address).await;
            handler.release();
            eventually("all memory is free", || handler.budget.used() == 0).await;
            let next = TestHandler::new(64 * MIB);
            let _server = Server::start_at(&next, &address.to_string(), ServerConfig::default()).await;
            check_works(&transport).await;
        }
    });
}

#[test]
fn a_server_lost_while_idle_is_connected_to_anew() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        let server = Server::start(&handler).await;
        let transport = client(server.address, |_| {});
        check_works(&transport).await;
        let address = server.kill();
        eventually("the stream has ended", || handler.budget.used() == 0).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let _server = Server::start_at(&handler, &address.to_string(), ServerConfig::default()).await;
        check_works(&transport).await;
    });
}

#[test]
fn nobody_listening_is_said_at_once() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let transport = client(address, |_| {});
        check_lost(transport.ship(some(1, 50)), address).await;
        let error =
            server_stats(&address.to_string(), Duration::from_secs(5)).await.expect_err("nobody listens");
        assert_eq!(error.kind, ErrorKind::Unavailable);
    });
}

#[test]
fn a_listener_that_never_speaks_is_given_up() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let transport = client(address, |config| config.connect_timeout = Duration::from_millis(300));
        check_lost(transport.ship(some(1, 50)), address).await;
        drop(listener);
    });
}

#[test]
fn a_deadline_holds_while_connecting() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let transport = client(listener.local_addr().unwrap(), |config| config.connect_timeout = NO_HANG * 2);
        let mut tasks = some(1, 50);
        tasks.truncate(1);
        tasks[0].header.deadline = Some(Duration::from_millis(100));
        let error = transport.ship(tasks).remove(0).await.expect_err("nobody answers");
        assert_eq!(error.kind, ErrorKind::DeadlineExceeded);
    });
}

/// Passes bytes on both ways until told to freeze; then the connection stays open, silent.
async fn freezing_proxy(server: SocketAddr, frozen: watch::Receiver<bool>) -> SocketAddr {
    async fn pass(
        mut from: impl AsyncReadExt + Unpin,
        mut to: impl AsyncWriteExt + Unpin,
        frozen: watch::Receiver<bool>,
    ) {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(count) = from.read(&mut buffer).await {
            if *frozen.borrow() {
                std::future::pending::<()>().await;
            }
            if count == 0 || to.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect(server).await.unwrap();
            let ((client_reads, client_writes), (server_reads, server_writes)) =
                (client.into_split(), server.into_split());
            tokio::spawn(pass(client_reads, server_writes, frozen.clone()));
            tokio::spawn(pass(server_reads, client_writes, frozen.clone()));
        }
    });
    address
}

#[test]
fn a_connection_that_dies_silently_ends_all_tasks() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        handler.hold.store(true, SeqCst);
        let mut config = ServerConfig::default();
        config.link.keep_alive_interval = Duration::from_millis(500);
        config.link.keep_alive_timeout = Duration::from_secs(2);
        let server = Server::start_at(&handler, "127.0.0.1:0", config).await;
        let (freeze, frozen) = watch::channel(false);
        let address = freezing_proxy(server.address, frozen).await;
        let transport = client(address, |_| {});
        let pendings = transport.ship(some(1, 100));
        eventually("all tasks are held", || handler.held() == 4).await;
        freeze.send(true).unwrap();
        check_lost(pendings, address).await;
        eventually("the server notices too", || handler.all_held_are_cancelled()).await;
        handler.release();
        eventually("all memory is free", || handler.budget.used() == 0).await;
    });
}

#[test]
fn draining_lets_running_tasks_finish_and_refuses_new_ones() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        handler.hold.store(true, SeqCst);
        let mut server = Server::start(&handler).await;
        let transport = client(server.address, |_| {});
        let running = transport.ship(some(1, 100));
        eventually("all tasks are held", || handler.held() == 4).await;
        handler.draining.store(true, SeqCst);
        server.drain.cancel();
        for outcome in join_all(transport.ship(some(2, 100))).await {
            let error = outcome.expect_err("the server drains");
            assert_eq!((error.kind, error.retry), (ErrorKind::Unavailable, RetryHint::Elsewhere), "{error}");
        }
        handler.release();
        for outcome in join_all(running).await {
            outcome.expect("it ran before the drain");
        }
        (&mut server.served).await.expect("the server ends by itself");
    });
}

#[test]
fn draining_cuts_off_no_result() {
    run(async {
        for round in 0..20 {
            let handler = TestHandler::new(256 * MIB);
            handler.hold.store(true, SeqCst);
            let mut server = Server::start(&handler).await;
            let transport = client(server.address, |config| config.streams = 2);
            let running: Vec<_> = (0..4).flat_map(|n| transport.ship(some(n, 2000))).collect();
            eventually("all tasks are held", || handler.held() == 16).await;
            handler.draining.store(true, SeqCst);
            server.drain.cancel();
            // The client goes on sending meanwhile.
            let refused = transport.ship(some(round, 100));
            handler.release();
            for outcome in join_all(running).await {
                outcome.expect("it ran before the drain");
            }
            for outcome in join_all(refused).await {
                assert_eq!(outcome.expect_err("the server drains").kind, ErrorKind::Unavailable);
            }
            (&mut server.served).await.expect("the server ends by itself");
        }
    });
}

#[test]
fn draining_ends_streams_that_wait_for_room() {
    run(async {
        let handler = TestHandler::new(4 * MIB);
        let mut server = Server::start(&handler).await;
        let blocker = handler.budget.lease(handler.budget.largest()).await.unwrap();
        let transport = client(server.address, |_| {});
        let waiting = transport.ship(some(1, 800));
        tokio::time::sleep(Duration::from_millis(100)).await;
        server.drain.cancel();
        for outcome in join_all(waiting).await {
            assert_eq!(outcome.expect_err("the server drains").kind, ErrorKind::Unavailable);
        }
        (&mut server.served).await.expect("the server ends by itself");
        drop(blocker);
    });
}

#[test]
fn draining_ends_idle_streams() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        let mut server = Server::start(&handler).await;
        let transport = client(server.address, |config| config.streams = 3);
        check_works(&transport).await;
        server.drain.cancel();
        (&mut server.served).await.expect("the server ends by itself");
        eventually("all memory is free", || handler.budget.used() == 0).await;
    });
}

#[test]
fn a_server_of_another_numerics_id_is_refused_whole() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        let server = Server::start(&handler).await;
        let transport = client(server.address, |config| config.numerics_id = Some("other-7".to_owned()));
        for outcome in join_all(transport.ship(some(1, 100))).await {
            let error = outcome.expect_err("other bits");
            assert_eq!(error.kind, ErrorKind::NumericsMismatch);
            assert!(error.message.contains("other-7") && error.message.contains(NUMERICS_ID), "{error}");
        }
    });
}

#[test]
fn a_header_that_no_server_would_read_is_refused_at_the_caller() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        let server = Server::start(&handler).await;
        let transport = client(server.address, |_| {});
        let mut tasks = some(1, 50);
        tasks[0].header.job = "x".repeat(1000);
        let mut outcomes = join_all(transport.ship(tasks)).await;
        let error = outcomes.remove(0).expect_err("the name is too long");
        assert_eq!(error.kind, ErrorKind::Invalid);
        assert!(error.message.contains("job has 1000 bytes"), "{error}");
        outcomes.into_iter().for_each(|outcome| drop(outcome.expect("the others go through")));
        assert_eq!(handler.failed.lock().unwrap().len(), 0);
    });
}

#[test]
fn a_stream_with_too_many_waiting_tasks_is_busy_and_keeps_its_credit() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        let config = ServerConfig { max_tasks: 2, ..ServerConfig::default() };
        let server = Server::start_at(&handler, "127.0.0.1:0", config).await;
        let transport = client(server.address, |_| {});
        let mut busy = 0;
        for seed in 0..20 {
            for outcome in join_all(transport.ship(some(seed, 300))).await {
                busy += outcome.map_or_else(|error| usize::from(error.kind == ErrorKind::Busy), |_| 0);
            }
        }
        assert!(busy >= 20, "four headers come before the first tensor, and two may wait: {busy}");
        drop(transport);
        eventually("all memory is free", || handler.budget.used() == 0).await;
    });
}

#[test]
fn tiny_tasks_take_memory_too() {
    run(async {
        let handler = TestHandler::new(MIB);
        handler.hold.store(true, SeqCst);
        let server = Server::start(&handler).await;
        let transport = client(server.address, |_| {});
        let shape =
            Shape { tasks: 1, tokens: 1, head_dim: 1, v_head_dim: 1, ..Shape::small(Direction::Forward) };
        let one = || transport.ship(shipment(&mut Rng(1), shape));
        let pendings: Vec<_> = (0..1000).flat_map(|_| one()).collect();
        eventually("memory is full", || handler.budget.used() + 8192 > handler.budget.largest()).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!((100..250).contains(&handler.held()), "{} are held", handler.held());
        handler.release();
        for outcome in join_all(pendings).await {
            outcome.expect("all go through in the end");
        }
        drop(transport);
        eventually("all memory is free", || handler.budget.used() == 0).await;
    });
}

#[test]
fn too_many_tasks_are_refused_as_busy() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        handler.hold.store(true, SeqCst);
        let server = Server::start(&handler).await;
        let transport = client(server.address, |config| config.max_tasks = 6);
        let mut pendings = transport.ship(some(1, 50));
        pendings.extend(transport.ship(some(2, 50)));
        let refused = pendings.split_off(6);
        for outcome in join_all(refused).await {
            let error = outcome.expect_err("there are six already");
            assert_eq!((error.kind, error.retry), (ErrorKind::Busy, RetryHint::Later));
        }
        eventually("six are held", || handler.held() == 6).await;
        handler.release();
        for outcome in join_all(pendings).await {
            outcome.expect("there was room for it");
        }
        check_works(&transport).await;
    });
}

#[test]
fn too_many_shipments_are_refused_as_busy() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let transport = client(listener.local_addr().unwrap(), |config| {
            config.connect_timeout = NO_HANG * 2;
            config.max_tasks = 1;
        });
        // The stream never opens, and given-up shipments pile up before it.
        let error = loop {
            let mut task = some(1, 50);
            task.truncate(1);
            let shipped = transport.ship(task).remove(0);
            if let Ok(outcome) = tokio::time::timeout(Duration::from_millis(20), shipped).await {
                let error = outcome.expect_err("nobody answers");
                if !error.message.contains("tasks are under way") {
                    break error;
                }
            }
        };
        assert_eq!((error.kind, error.retry), (ErrorKind::Busy, RetryHint::Later), "{error}");
        assert!(error.message.contains("shipments wait for a stream"), "{error}");
    });
}

#[test]
fn a_shipment_gives_up_waiting_for_room() {
    run(async {
        let handler = TestHandler::new(4 * MIB);
        let server = Server::start(&handler).await;
        let blocker = handler.budget.lease(handler.budget.largest()).await.unwrap();
        let transport = client(server.address, |config| config.credit_timeout = Duration::from_millis(200));
        for outcome in join_all(transport.ship(some(1, 800))).await {
            let error = outcome.expect_err("there is no room");
            assert_eq!((error.kind, error.retry), (ErrorKind::Busy, RetryHint::Later));
            assert!(error.message.contains("no room"), "{error}");
        }
        drop(blocker);
        // What was asked for meanwhile is granted now, and given back or used.
        check_works(&transport).await;
        drop(transport);
        eventually("all memory is free", || handler.budget.used() == 0).await;
    });
}

/// A forward task that needs `kib` to `kib + 50` KiB at the server.
fn sized(rng: &mut Rng, kib: u64) -> outboard_transport::TaskRequest {
    let shape = Shape {
        tasks: 1,
        tokens: 2000,
        kv_heads: 1,
        head_dim: 64,
        v_head_dim: 64,
        ..Shape::small(Direction::Forward)
    };
    loop {
        let task = shipment(rng, shape).remove(0);
        // Two query heads: Q, O and LSE a row, K and V a key.
        let (rows, keys) = (task.header.task.q().len() as u64, task.header.task.kv().len() as u64);
        if (kib..kib + 50).contains(&((rows * (64 + 64 + 1) * 2 * 4 + keys * (64 + 64) * 4) >> 10)) {
            return task;
        }
    }
}

#[test]
fn clients_that_need_more_than_they_asked_for_do_not_wait_for_each_other() {
    run(async {
        // One request can get 3 MiB.
        let handler = TestHandler::new(4 * MIB);
        let server = Server::start(&handler).await;
        let blocker = handler.budget.lease(handler.budget.largest()).await.unwrap();
        let transports =
            [0, 1].map(|_| client(server.address, |config| config.credit_timeout = Duration::from_secs(5)));
        let mut rng = Rng(1);
        let mut pendings = Vec::new();
        for transport in &transports {
            // The first two go together, or the last two, and not all.
            let sizes = [600, 900, 1750];
            pendings.push(transport.ship(sizes.map(|kib| sized(&mut rng, kib)).into()));
        }
        // Both have asked for room for their first two tasks.
        tokio::time::sleep(Duration::from_millis(300)).await;
        for pending in &mut pendings {
            drop(pending.remove(0));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(blocker);
        for outcome in join_all(pendings.into_iter().flatten()).await {
            outcome.expect("there is room for one client after the other");
        }
        drop(transports);
        eventually("all memory is free", || handler.budget.used() == 0).await;
    });
}

#[test]
fn results_outlive_their_transport() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        handler.hold.store(true, SeqCst);
        let server = Server::start(&handler).await;
        let transport = client(server.address, |_| {});
        let pendings = transport.ship(some(1, 100));
        eventually("all tasks are held", || handler.held() == 4).await;
        drop(transport);
        handler.release();
        for outcome in join_all(pendings).await {
            outcome.expect("its stream lives on");
        }
        eventually("all memory is free", || handler.budget.used() == 0).await;
    });
}

#[test]
fn counters_can_be_asked_for() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        let server = Server::start(&handler).await;
        check_works(&client(server.address, |_| {})).await;
        let stats = server_stats(&server.address.to_string(), NO_HANG).await.unwrap();
        assert_eq!(stats.forward_tasks, 4);
    });
}

#[test]
fn what_is_no_address_is_refused() {
    run(async {
        for address in ["", "no port or host/", "a b:1"] {
            let error = GrpcTransport::new(ClientConfig::new(address), Handle::current());
            let Err(error) = error else { continue };
            assert_eq!(error.kind, ErrorKind::Invalid);
        }
        let mut config = ClientConfig::new("127.0.0.1:1");
        config.streams = 0;
        let error = GrpcTransport::new(config, Handle::current()).expect_err("no stream");
        assert!(error.message.contains("streams is 0"), "{error}");
    });
}

#[test]
fn handlers_are_shared_by_transports_of_both_kinds() {
    run(async {
        let handler = TestHandler::new(64 * MIB);
        let server = Server::start(&handler).await;
        let in_process = outboard_transport::InProcess::new(Arc::clone(&handler) as _, Handle::current());
        let remote = client(server.address, |_| {});
        tokio::join!(check_works(&in_process), check_works(&remote));
        assert_eq!(handler.computed.load(SeqCst), 8);
    });
}
