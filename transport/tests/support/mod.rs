//! What the transports' tests share: a handler whose results depend on every bit of its inputs, random tasks, and servers
//! to kill.
#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    unused_macros,
    reason = "each test file uses a part of it"
)]

/// Tests that run each scenario against every transport, for every element type.
macro_rules! scenarios {
    ($($name:ident),* $(,)?) => {
        scenarios!(@link in_process, Link::InProcess, [$($name)*]);
        scenarios!(@link grpc, Link::Grpc { streams: 1 }, [$($name)*]);
        scenarios!(@link grpc_three_streams, Link::Grpc { streams: 3 }, [$($name)*]);
    };
    (@link $module:ident, $link:expr, $names:tt) => {
        mod $module {
            use super::*;
            scenarios!(@dtype of_f32, $link, DType::F32, $names);
            scenarios!(@dtype of_bf16, $link, DType::Bf16, $names);
            scenarios!(@dtype of_f16, $link, DType::F16, $names);
        }
    };
    (@dtype $module:ident, $link:expr, $dtype:expr, [$($name:ident)*]) => {
        mod $module {
            use super::*;
            $(#[test] fn $name() { run(super::super::$name(Kind { link: $link, dtype: $dtype })); })*
        }
    };
}

mod handler;
mod home;
mod homed;
mod raw;
mod tasks;
mod wire_home;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

pub use handler::{ADMIT_FAILS, COMPUTE_FAILS, NUMERICS_ID, TestHandler, compute, numerics_id};
pub use home::{Fault, Held, Place, Places, Spec, TestHome, quick};
pub use homed::{Cut, Homed, at_homes, check_all, everywhere, few_keys, reading_second};
use outboard_attention::{DType, Direction};
use outboard_transport::grpc::{
    CancellationToken, ClientConfig, GrpcTransport, LinkConfig, ServerConfig, router, serve,
};
use outboard_transport::{Homes, InProcess, Transport};
pub use raw::{Raw, Script, elements, greeting, script, script_at_homes, script_of, wire_bytes};
pub use tasks::{Drawn, Rng, Shape, drawn, shipment};
use tokio::net::TcpListener;
use tokio::runtime::{Handle, Runtime};
pub use wire_home::{WireFault, WireHome};

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
        Server::start_with(handler, address, config, Homes::default()).await
    }

    /// A server that fetches keys by `homes`.
    pub async fn start_with(
        handler: &Arc<TestHandler>,
        address: &str,
        config: ServerConfig,
        homes: Homes,
    ) -> Server {
        let handler = Arc::clone(handler);
        Server::of(address, move |listener, stop| async move {
            serve(router(handler, homes, &config, stop.clone()), listener, stop).await.unwrap();
        })
        .await
    }

    /// Any service, on a runtime of its own.
    pub async fn of<S: Future<Output = ()> + Send + 'static>(
        address: &str,
        serving: impl FnOnce(TcpListener, CancellationToken) -> S + Send + 'static,
    ) -> Server {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let drain = CancellationToken::new();
        let (address, stop) = (address.to_owned(), drain.clone());
        let (tell, told) = tokio::sync::oneshot::channel();
        let (ended, served) = tokio::sync::oneshot::channel();
        runtime.spawn(async move {
            let listener = TcpListener::bind(&address).await.unwrap();
            tell.send(listener.local_addr().unwrap()).unwrap();
            serving(listener, stop).await;
            ended.send(()).ok();
        });
        Server { address: told.await.unwrap(), drain, served, runtime: Some(runtime) }
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
        Bench::with_homes(kind, handler, Homes::default()).await
    }

    pub async fn with_homes(kind: Kind, handler: Arc<TestHandler>, homes: Homes) -> Bench {
        match kind.link {
            Link::InProcess => {
                let transport = InProcess::new(handler.clone(), Handle::current()).with_homes(homes);
                Bench { handler, transport: Box::new(transport), server: None }
            }
            Link::Grpc { streams } => {
                let config = ServerConfig::default();
                let server = Server::start_with(&handler, "127.0.0.1:0", config, homes).await;
                let transport = client(server.address, |config| config.streams = streams);
                Bench { handler, transport: Box::new(transport), server: Some(server) }
            }
        }
    }
}

/// All memory comes back once the transport is gone.
pub async fn check_freed(bench: Bench) {
    let Bench { handler, transport, server } = bench;
    drop(transport);
    eventually("all memory is free", || handler.budget.used() == 0).await;
    drop(server);
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
