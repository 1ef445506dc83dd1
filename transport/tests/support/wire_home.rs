//! Homes whose service is made by hand, and misbehaves.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::StreamExt;
use outboard_proto::v1::deliver_gradient_request::Message;
use outboard_proto::v1::home_service_server::{HomeService, HomeServiceServer};
use outboard_proto::v1::{self, Chunk, DeliverGradientRequest};
use outboard_proto::{GradientHeader, KeyRange};
use outboard_transport::{HomeHandler, KeyGradient};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use super::{TestHome, wire_bytes};

/// What is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireFault {
    /// Sends half, and the rest when it is released.
    Holds,
    /// Never answers.
    Silent,
    /// Sends half, and never more.
    Stalls,
    /// Sends half, and says that this is all.
    EndsEarly,
    /// Sends half, and then an error.
    Breaks,
    WrongChecksum,
    LeavesAGap,
    SendsTooMuch,
    NamesAnotherTensor,
    /// Sends byte after byte, so slowly that no wait for one is long.
    Trickles,
    /// Takes no deliveries, nor refuses them.
    TakesNothing,
}

pub struct WireHome {
    home: Arc<TestHome>,
    fault: WireFault,
    released: watch::Sender<bool>,
    /// Fetches under way.
    pub fetches: Arc<AtomicUsize>,
    /// All there have been.
    pub begun: AtomicUsize,
}

struct UnderWay(Arc<AtomicUsize>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl WireHome {
    pub fn new(home: Arc<TestHome>, fault: WireFault) -> WireHome {
        let (released, _) = watch::channel(false);
        WireHome { home, fault, released, fetches: Arc::default(), begun: AtomicUsize::new(0) }
    }

    pub fn release(&self) {
        self.released.send_replace(true);
    }

    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let service = HomeServiceServer::from_arc(Arc::new(Edge(self)));
        let mut server =
            tonic::transport::Server::builder().http2_max_pending_accept_reset_streams(Some(1024));
        let router = server.add_service(service);
        router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
    }

    fn chunks(&self, range: &KeyRange) -> Result<Vec<Chunk>, Status> {
        let mut chunks = Vec::new();
        for (tensor, slice) in self.home.keys(range)?.iter().enumerate() {
            let bytes = wire_bytes(slice);
            for (n, data) in bytes.chunks(bytes.len().div_ceil(2).min(50_000)).enumerate() {
                let (offset, crc32c) = (chunks_before(&bytes, n), crc32c::crc32c(data));
                let (tensor, data) = (tensor as u64, Bytes::copy_from_slice(data));
                chunks.push(Chunk { task: 0, tensor, offset, crc32c, data });
            }
        }
        match self.fault {
            WireFault::WrongChecksum => chunks[1].crc32c ^= 1,
            WireFault::LeavesAGap => drop(chunks.remove(0)),
            WireFault::NamesAnotherTensor => chunks[0].tensor = 7,
            WireFault::SendsTooMuch => {
                let mut more = chunks[chunks.len() - 1].clone();
                more.offset += more.data.len() as u64;
                chunks.push(more);
            }
            _ => {}
        }
        Ok(chunks)
    }
}

fn chunks_before(bytes: &[u8], n: usize) -> u64 {
    (n * bytes.len().div_ceil(2).min(50_000)) as u64
}

struct Edge(Arc<WireHome>);

#[tonic::async_trait]
impl HomeService for Edge {
    type FetchKeysStream = ReceiverStream<Result<Chunk, Status>>;

    async fn await_keys(
        &self,
        _request: Request<v1::AwaitKeysRequest>,
    ) -> Result<Response<v1::AwaitKeysResponse>, Status> {
        if self.0.fault == WireFault::Silent {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(v1::AwaitKeysResponse {}))
    }

    async fn fetch_keys(
        &self,
        request: Request<v1::FetchKeysRequest>,
    ) -> Result<Response<Self::FetchKeysStream>, Status> {
        let fault = self.0.fault;
        if fault == WireFault::Silent {
            std::future::pending::<()>().await;
        }
        let range = KeyRange::try_from(request.into_inner().range.unwrap())?;
        let mut chunks = self.0.chunks(&range)?;
        let (sender, receiver) = mpsc::channel(1);
        let mut released = self.0.released.subscribe();
        self.0.fetches.fetch_add(1, Ordering::SeqCst);
        self.0.begun.fetch_add(1, Ordering::SeqCst);
        let under_way = UnderWay(Arc::clone(&self.0.fetches));
        tokio::spawn(async move {
            let _under_way = under_way;
            if fault == WireFault::Trickles {
                let chunk = chunks.remove(0);
                for n in 0..chunk.data.len() {
                    let data = chunk.data.slice(n..=n);
                    let piece = Chunk { offset: n as u64, crc32c: crc32c::crc32c(&data), data, ..chunk };
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    if sender.send(Ok(piece)).await.is_err() {
                        return;
                    }
                }
            }
            let half = chunks.len() / 2;
            for (n, chunk) in chunks.into_iter().enumerate() {
                if n == half {
                    match fault {
                        WireFault::Holds => tokio::select! {
                            _ = released.wait_for(|&released| released) => {}
                            () = sender.closed() => return,
                        },
                        WireFault::Stalls => return sender.closed().await,
                        WireFault::EndsEarly => return,
                        WireFault::Breaks => {
                            sender.send(Err(Status::internal("broke on purpose"))).await.ok();
                            return;
                        }
                        _ => {}
                    }
                }
                if sender.send(Ok(chunk)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn deliver_gradient(
        &self,
        request: Request<Streaming<DeliverGradientRequest>>,
    ) -> Result<Response<v1::DeliverGradientResponse>, Status> {
        if self.0.fault == WireFault::TakesNothing {
            std::future::pending::<()>().await;
        }
        let mut messages = request.into_inner();
        let (mut header, mut tensors) = (None, [Vec::new(), Vec::new()]);
        while let Some(message) = messages.next().await {
            match message?.message.unwrap() {
                Message::Header(first) => header = Some(GradientHeader::try_from(first)?),
                Message::Chunk(chunk) => {
                    let tensor: &mut Vec<u8> = &mut tensors[chunk.tensor as usize];
                    assert_eq!(
                        (chunk.offset, chunk.crc32c),
                        (tensor.len() as u64, crc32c::crc32c(&chunk.data))
                    );
                    tensor.extend_from_slice(&chunk.data);
                }
            }
        }
        let floats = |bytes: Vec<u8>| {
            bytes.chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect()
        };
        let [dk, dv] = tensors.map(floats);
        self.0.home.take_gradient(KeyGradient { header: header.unwrap(), dk, dv })?;
        Ok(Response::new(v1::DeliverGradientResponse {}))
    }
}
