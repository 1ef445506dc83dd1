//! Calls of a home by the stock generated client: what it makes of those that err.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use outboard_attention::{DType, Direction, Elements};
use outboard_proto::v1::deliver_gradient_request::Message;
use outboard_proto::v1::home_service_client::HomeServiceClient;
use outboard_proto::v1::{self, Chunk, DeliverGradientRequest};
use outboard_proto::{ErrorKind, GradientHeader, KeyHome, MAX_CHUNK_BYTES, PROTOCOL_VERSION, TaskError};
use outboard_transport::grpc::{LinkConfig, serve_home};
use outboard_transport::{HomeHandler, Homes};
use support::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// A home of one document, one share of whose gradients it awaits.
struct Setup {
    home: Arc<TestHome>,
    server: Server,
    client: HomeServiceClient<Channel>,
    share: GradientHeader,
    geometry: outboard_attention::HeadGeometry,
}

impl Setup {
    async fn new(dtype: DType, tokens: usize) -> Setup {
        let home = Arc::new(TestHome::default());
        let shape = Shape { tasks: 1, tokens, dtype, ..Shape::small(Direction::Backward) };
        let Drawn { tasks, keys, geometry, .. } = drawn(&mut Rng(41), shape);
        let header = &tasks[0].header;
        let range = header.key_range(outboard_attention::Span::to(tokens));
        let document = header.task.document();
        home.hold(header.step, Held { document, keys, geometry, tokens: vec![range.tokens] });
        let share = GradientHeader { range, group: 4, position: 2, summed: 0 };
        home.expect(&share);
        let (handler, link) =
            (Arc::clone(&home), LinkConfig { stall_timeout: Duration::from_millis(300), ..quick() });
        let server = Server::of("127.0.0.1:0", |listener, stop| async move {
            serve_home(listener, handler, link, stop).await.unwrap();
        })
        .await;
        let client = HomeServiceClient::connect(format!("http://{}", server.address)).await.unwrap();
        Setup { home, server, client, share, geometry }
    }

    /// The values of dK, or of dV.
    fn values(&self, tensor: usize) -> Vec<f32> {
        let dims = [self.geometry.head_dim(), self.geometry.v_head_dim()];
        let count = self.share.range.tokens.len() * self.share.range.kv_heads.len() * dims[tensor];
        (0..count).map(|n| n as f32 + tensor as f32 / 2.0).collect()
    }

    /// A delivery as it should be.
    fn messages(&self) -> Vec<Message> {
        let GradientHeader { range, group, position, summed } = &self.share;
        let (group, position, range) = (*group, *position, Some(range.into()));
        let header = v1::GradientHeader {
            protocol_version: PROTOCOL_VERSION,
            range,
            group,
            position,
            summed: *summed,
        };
        let mut messages = vec![Message::Header(header)];
        for tensor in 0..2 {
            let bytes: Vec<u8> = self.values(tensor).iter().flat_map(|x| x.to_le_bytes()).collect();
            let mut at = 0;
            for data in bytes.chunks(1000) {
                let crc32c = crc32c::crc32c(data);
                let (offset, data) = (at, Bytes::copy_from_slice(data));
                at += data.len() as u64;
                messages.push(Message::Chunk(Chunk { task: 0, tensor: tensor as u64, offset, crc32c, data }));
            }
        }
        messages
    }

    async fn deliver(&self, messages: Vec<Message>) -> Result<(), TaskError> {
        let wire = |message| DeliverGradientRequest { message: Some(message) };
        let messages = tokio_stream::iter(messages.into_iter().map(wire));
        Ok(self.client.clone().deliver_gradient(messages).await.map(drop)?)
    }

    /// What was delivered was taken, as it was sent.
    fn check_taken(&self) {
        let taken = self.home.taken(&self.share).expect("it was taken");
        assert!(taken.dk == self.values(0) && taken.dv == self.values(1));
    }

    fn range(&self) -> v1::KeyRange {
        (&self.share.range).into()
    }
}

/// A bad delivery is refused and leaves no trace; the right one is taken after it.
fn bad_delivery(kind: ErrorKind, expected: &str, change: impl FnOnce(&mut Vec<Message>)) {
    run(async {
        let setup = Setup::new(DType::F32, 50).await;
        let mut messages = setup.messages();
        change(&mut messages);
        let error = setup.deliver(messages).await.expect_err(expected);
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.message.contains(expected), "{error}");
        assert_eq!(setup.home.deliveries.load(SeqCst), 0);
        setup.deliver(setup.messages()).await.expect("nothing is wrong with it");
        setup.check_taken();
    });
}

fn header(messages: &mut [Message]) -> &mut v1::GradientHeader {
    match &mut messages[0] {
        Message::Header(header) => header,
        Message::Chunk(_) => panic!("the header comes first"),
    }
}

fn range(messages: &mut [Message]) -> &mut v1::KeyRange {
    header(messages).range.as_mut().unwrap()
}

fn chunk(messages: &mut [Message], n: usize) -> &mut Chunk {
    match &mut messages[1 + n] {
        Message::Chunk(chunk) => chunk,
        Message::Header(_) => panic!("chunks follow"),
    }
}

#[test]
fn headers_of_deliveries_that_do_not_hold_together_are_refused() {
    bad_delivery(ErrorKind::Unsupported, "protocol_version is 1", |m| header(m).protocol_version = 1);
    bad_delivery(ErrorKind::Invalid, "range is missing", |m| header(m).range = None);
    bad_delivery(ErrorKind::Invalid, "layer is missing", |m| range(m).layer = None);
    bad_delivery(ErrorKind::Invalid, "document is missing", |m| range(m).document = None);
    bad_delivery(ErrorKind::Invalid, "tokens is missing", |m| range(m).tokens = None);
    bad_delivery(ErrorKind::Invalid, "kv_heads is missing", |m| range(m).kv_heads = None);
    bad_delivery(ErrorKind::Invalid, "tokens", |m| range(m).tokens = Some(v1::Span { start: 3, end: 3 }));
    bad_delivery(ErrorKind::Invalid, "tokens", |m| range(m).tokens = Some(v1::Span { start: 3, end: 2 }));
    bad_delivery(ErrorKind::Invalid, "tokens", |m| {
        range(m).tokens = Some(v1::Span { start: 0, end: u64::MAX })
    });
    bad_delivery(ErrorKind::Invalid, "not awaited", |m| {
        range(m).tokens = Some(v1::Span { start: 0, end: 49 })
    });
    bad_delivery(ErrorKind::Invalid, "not awaited", |m| range(m).layer.as_mut().unwrap().layer += 1);
    bad_delivery(ErrorKind::Invalid, "not awaited", |m| header(m).position += 1);
    bad_delivery(ErrorKind::Invalid, "must be the header", |m| drop(m.remove(0)));
    bad_delivery(ErrorKind::Invalid, "must be the header", Vec::clear);
    bad_delivery(ErrorKind::Invalid, "a second header", |m| m.insert(2, m[0].clone()));
}

#[test]
fn chunks_of_deliveries_that_do_not_fit_are_refused() {
    bad_delivery(ErrorKind::Corrupt, "CRC-32C", |m| chunk(m, 1).crc32c ^= 1);
    bad_delivery(ErrorKind::Corrupt, "leaves a gap", |m| drop(m.remove(1)));
    bad_delivery(ErrorKind::Corrupt, "overlaps", |m| m.insert(1, m[1].clone()));
    bad_delivery(ErrorKind::Corrupt, "has 0 bytes", |m| chunk(m, 0).data = Bytes::new());
    bad_delivery(ErrorKind::Corrupt, "names tensor 2", |m| chunk(m, 0).tensor = 2);
    bad_delivery(ErrorKind::Corrupt, "names tensor 18446744073709551615", |m| chunk(m, 0).tensor = u64::MAX);
    bad_delivery(ErrorKind::Corrupt, "leaves a gap", |m| chunk(m, 0).offset = u64::MAX);
    bad_delivery(ErrorKind::Corrupt, "before dK and dV were whole", |m| drop(m.pop()));
    bad_delivery(ErrorKind::Corrupt, "before dK and dV were whole", |m| m.truncate(1));
    bad_delivery(ErrorKind::Corrupt, "beyond the tensor", |m| {
        let last = m.len() - 2;
        let mut more = chunk(m, last).clone();
        more.offset += more.data.len() as u64;
        m.push(Message::Chunk(more));
    });
}

#[test]
fn a_message_of_no_known_kind_is_refused() {
    run(async {
        let setup = Setup::new(DType::F32, 50).await;
        let messages = tokio_stream::iter([DeliverGradientRequest { message: None }]);
        let error = setup.client.clone().deliver_gradient(messages).await.expect_err("it says nothing");
        assert_eq!(TaskError::from(error).kind, ErrorKind::Invalid);
    });
}

#[test]
fn chunks_of_dk_and_dv_may_interleave_and_a_share_may_come_again() {
    run(async {
        let setup = Setup::new(DType::F32, 50).await;
        let mut messages = setup.messages();
        messages[1..].sort_by_key(|message| match message {
            Message::Chunk(chunk) => (chunk.offset, 1 - chunk.tensor),
            Message::Header(_) => (0, 0),
        });
        for _ in 0..3 {
            setup.deliver(messages.clone()).await.expect("it may come at any time");
            setup.check_taken();
        }
        assert_eq!((setup.home.deliveries.load(SeqCst), setup.home.count_taken(5)), (3, 1));
        let bytes = setup.values(0).len() + setup.values(1).len();
        assert_eq!(setup.home.received.load(SeqCst), 3 * 4 * bytes as u64);
    });
}

#[test]
fn a_delivery_that_is_cut_off_or_falls_silent_leaves_no_trace() {
    run(async {
        let setup = Setup::new(DType::F32, 50).await;
        let all = setup.messages();
        for cut_off in [true, false] {
            for sent in [0, 1, all.len() / 2, all.len() - 1] {
                let (sender, receiver) = mpsc::channel(64);
                for message in &all[..sent] {
                    sender.try_send(DeliverGradientRequest { message: Some(message.clone()) }).unwrap();
                }
                let mut client = setup.client.clone();
                let call = client.deliver_gradient(ReceiverStream::new(receiver));
                if cut_off {
                    // The call is dropped on its way.
                    tokio::time::timeout(Duration::from_millis(20), call).await.expect_err("it waits");
                } else {
                    let error = TaskError::from(call.await.expect_err("it is late"));
                    assert_eq!(error.kind, ErrorKind::DeadlineExceeded, "{error}");
                }
                drop(sender);
                assert_eq!(setup.home.deliveries.load(SeqCst), 0);
            }
        }
        setup.deliver(all).await.expect("nothing is wrong with it");
        setup.check_taken();
    });
}

#[test]
fn keys_come_in_order_in_the_bytes_that_they_have() {
    run(async {
        for dtype in DType::ALL {
            // Some tensors of several chunks.
            let setup = Setup::new(dtype, 50_000).await;
            let range = Some(setup.range());
            let request = v1::FetchKeysRequest { protocol_version: PROTOCOL_VERSION, range };
            let mut chunks = setup.client.clone().fetch_keys(request).await.unwrap().into_inner();
            let mut tensors = [Vec::new(), Vec::new()];
            while let Some(chunk) = chunks.next().await.transpose().unwrap() {
                let tensor: &mut Vec<u8> = &mut tensors[chunk.tensor as usize];
                assert_eq!((chunk.offset, chunk.crc32c), (tensor.len() as u64, crc32c::crc32c(&chunk.data)));
                assert!((1..=MAX_CHUNK_BYTES).contains(&chunk.data.len()));
                tensor.extend_from_slice(&chunk.data);
            }
            let expected = setup.home.keys(&setup.share.range).unwrap();
            let sent = (tensors[0].len() + tensors[1].len()) as u64;
            assert!(tensors == expected.map(|slice| wire_bytes(&slice)));
            assert_eq!(setup.home.sent.load(SeqCst), sent);
        }
    });
}

#[test]
fn keys_that_are_not_there_are_not_given_out() {
    run(async {
        let setup = Setup::new(DType::F32, 50).await;
        let good = v1::FetchKeysRequest { protocol_version: PROTOCOL_VERSION, range: Some(setup.range()) };
        let check = async |kind, expected: &str, change: fn(&mut v1::FetchKeysRequest)| {
            let mut request = good.clone();
            change(&mut request);
            let error = setup.client.clone().fetch_keys(request).await.expect_err(expected);
            let error = TaskError::from(error);
            assert_eq!(error.kind, kind, "{error}");
            assert!(error.message.contains(expected), "{error}");
        };
        check(ErrorKind::Unsupported, "protocol_version is 9", |r| r.protocol_version = 9).await;
        check(ErrorKind::Invalid, "range is missing", |r| r.range = None).await;
        check(ErrorKind::Invalid, "layer is missing", |r| r.range.as_mut().unwrap().layer = None).await;
        check(ErrorKind::Invalid, "tokens", |r| {
            r.range.as_mut().unwrap().tokens = Some(v1::Span { start: 1, end: 1 });
        })
        .await;
        check(ErrorKind::NotFound, "not held here", |r| {
            r.range.as_mut().unwrap().tokens = Some(v1::Span { start: 1, end: 51 });
        })
        .await;
        check(ErrorKind::NotFound, "not held here", |r| {
            r.range.as_mut().unwrap().layer.as_mut().unwrap().step += 1;
        })
        .await;
        *setup.home.fault.lock().unwrap() = Fault::Short;
        check(ErrorKind::Internal, "gave out tokens", |_| {}).await;
    });
}

#[test]
fn calls_given_up_many_at_once_leave_their_connection_to_others() {
    run(async {
        let setup = Setup::new(DType::F32, 5000).await;
        for _ in 0..20 {
            let fetch = async || {
                let range = Some(setup.range());
                let request = v1::FetchKeysRequest { protocol_version: PROTOCOL_VERSION, range };
                setup.client.clone().fetch_keys(request).await
            };
            let calls = futures::future::join_all((0..200).map(|_| fetch()));
            // They are dropped on their way, or as soon as they are answered.
            let _ = tokio::time::timeout(Duration::from_millis(1), calls).await;
            let mut chunks = fetch().await.expect("the connection is alive").into_inner();
            while let Some(chunk) = chunks.next().await {
                chunk.expect("the connection is alive");
            }
        }
    });
}

#[test]
fn whoever_asks_for_keys_waits_for_them() {
    run(async {
        let setup = Setup::new(DType::F32, 50).await;
        let (layer, limit_ms) = (Some((&setup.share.range.layer).into()), 50);
        let good = v1::AwaitKeysRequest { protocol_version: PROTOCOL_VERSION, layer, limit_ms };
        let ask = |request| async { setup.client.clone().await_keys(request).await.map_err(TaskError::from) };
        ask(good.clone()).await.expect("they are there");
        let error = ask(v1::AwaitKeysRequest { protocol_version: 0, ..good.clone() }).await;
        assert_eq!(error.expect_err("another version").kind, ErrorKind::Unsupported);
        let error = ask(v1::AwaitKeysRequest { layer: None, ..good }).await.expect_err("of what");
        assert!(error.kind == ErrorKind::Invalid && error.message.contains("layer is missing"), "{error}");

        // The same by the client of our own, whether the home is here or there.
        let address = setup.server.address.to_string();
        let home = KeyHome { tokens: setup.share.range.tokens, rank: 7, address: address.clone() };
        let beside = Homes::beside(address, Arc::clone(&setup.home) as _);
        for homes in [Homes::default().with_link(quick()), beside] {
            let mut layer = setup.share.range.layer.clone();
            homes.await_keys(&home, &layer, Duration::MAX).await.expect("they are there");
            layer.step += 1;
            let error =
                homes.await_keys(&home, &layer, Duration::from_millis(50)).await.expect_err("not yet");
            assert_eq!(error.kind, ErrorKind::Aborted);
            for said in ["rank 7", &home.address, "step 6"] {
                assert!(error.message.contains(said), "{error}");
            }
        }
    });
}

/// A home that gives out more than elements of its type: only bytes travel, so that the server sees too many.
#[test]
fn keys_of_another_element_type_do_not_pass_for_the_right_ones() {
    run(async {
        for (held, asked) in [(DType::F32, DType::Bf16), (DType::Bf16, DType::F32)] {
            for spec in [Spec::Real, Spec::Beside] {
                let places = Places::start(&[spec]).await;
                let kind = Kind { link: Link::InProcess, dtype: asked };
                let bench = Bench::with_homes(kind, TestHandler::new(64 << 20), places.way(quick())).await;
                let mut drawn = drawn(&mut Rng(42), few_keys(kind, Direction::Forward));
                let right = drawn.keys.clone();
                drawn.keys = right.map(|keys| Elements::rounded(held, keys.values().iter().copied()));
                let homed = at_homes(&mut Rng(43), drawn, 0, &places, Cut { parts: 1, at: &[0] });
                for pending in bench.transport.ship(homed.tasks) {
                    assert_eq!(pending.await.expect_err("other bytes").kind, ErrorKind::Aborted);
                }
                check_freed(bench).await;
            }
        }
    });
}
