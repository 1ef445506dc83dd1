//! What the transports' tests share: a handler whose results depend on every bit of its inputs, random tasks, and servers
//! to kill.
#![allow(dead_code, unreachable_pub, unused_imports, reason = "each test file uses a part of it")]

mod handler;
mod raw;
mod tasks;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

pub use handler::{ADMIT_FAILS, COMPUTE_FAILS, NUMERICS_ID, TestHandler, compute, numerics_id};
use outboard_attention::{DType, Direction};
use outboard_transport::grpc::{
    CancellationToken, ClientConfig, GrpcTransport, LinkConfig, ServerConfig, router, serve,
};
use outboard_transport::{InProcess, Transport};
pub use raw::{Raw, Script, elements, greeting, script, script_of};
pub use tasks::{Rng, Shape, shipment};
use tokio::net::TcpListener;
use tokio::runtime::{Handle, Runtime};

/// Longer than anything here takes, unless it hangs.
pub const NO_HANG: Duration = Duration::from_secs(60);

/// A transport to test.
#[derive(Clone, Copy, Debug)]
pub enum Link {
    InProcess,
    Grpc { streams: usize },
}

/// A transport to test, and the element type of what it carries.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub link: Link,
    pub dtype: DType,
}

impl Kind {
    pub fn small(self, direction: Direction) -> Shape {
        Shape { dtype: self.dtype, ..Shape::small(direction) }
    }

    pub fn random(self, rng: &mut Rng) -> Shape {
        Shape { dtype: self.dtype, ..Shape::random(rng) }
    }
}

/// A server with a runtime of its own, so that it can die at once.
pub struct Server {
    pub address: SocketAddr,
    pub drain: CancellationToken,
    pub served: tokio::sync::oneshot::Receiver<()>,
    runtime: Option<Runtime>,
}

impl Server {
    pub async fn start(handler: &Arc<TestHandler>) -> Server {
        Server::start_at(handler, "127.0.0.1:0", ServerConfig::default()).await
    }

    pub async fn start_at(handler: &Arc<TestHandler>, address: &str, config: ServerConfig) -> Server {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let drain = CancellationToken::new();
        let (address, handler, stop) = (address.to_owned(), Arc::clone(handler), drain.clone());
        let (bound, address) = {
            let (tell, told) = tokio::sync::oneshot::channel();
            let (ended, served) = tokio::sync::oneshot::channel();
            runtime.spawn(async move {
                let listener = TcpListener::bind(&address).await.unwrap();
                tell.send(listener.local_addr().unwrap()).unwrap();
                let homes = outboard_transport::Homes::default();
                serve(router(handler, homes, &config, stop.clone()), listener, stop).await.unwrap();
                ended.send(()).ok();
            });
            (served, told.await.unwrap())
        };
        Server { address, drain, served: bound, runtime: Some(runtime) }
    }

    /// Ends the server as SIGKILL would: no goodbye on any connection.
    pub fn kill(mut self) -> SocketAddr {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A handler and a transport to it.
pub struct Bench {
    pub handler: Arc<TestHandler>,
    pub transport: Box<dyn Transport>,
    pub server: Option<Server>,
}

impl Bench {
    pub async fn new(kind: Kind, memory: u64) -> Bench {
        Bench::with(kind, TestHandler::new(memory)).await
    }

    pub async fn with(kind: Kind, handler: Arc<TestHandler>) -> Bench {
        match kind.link {
            Link::InProcess => {
                let transport = InProcess::new(handler.clone(), Handle::current());
                Bench { handler, transport: Box::new(transport), server: None }
            }
            Link::Grpc { streams } => {
                let server = Server::start(&handler).await;
                let transport = client(server.address, |config| config.streams = streams);
                Bench { handler, transport: Box::new(transport), server: Some(server) }
            }
        }
    }
}

/// A gRPC transport with short keep-alives.
pub fn client(address: SocketAddr, change: impl FnOnce(&mut ClientConfig)) -> GrpcTransport {
    let mut config = ClientConfig::new(address.to_string());
    config.job = "test".to_owned();
    config.link = LinkConfig {
        keep_alive_interval: Duration::from_millis(500),
        keep_alive_timeout: Duration::from_secs(2),
        ..LinkConfig::default()
    };
    change(&mut config);
    GrpcTransport::new(config, Handle::current()).unwrap()
}

/// Waits until `condition` holds.
#[track_caller]
pub fn eventually(what: &str, condition: impl Fn() -> bool) -> impl Future<Output = ()> {
    let caller = std::panic::Location::caller();
    let what = what.to_owned();
    async move {
        let wait = async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(NO_HANG, wait).await.is_err() {
            panic!("{caller}: {what} never came true");
        }
    }
}

/// Runs a scenario on a runtime of its own; fails when it hangs.
pub fn run(scenario: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(NO_HANG, scenario).await.expect("the scenario hangs") });
    runtime.shutdown_background();
}
