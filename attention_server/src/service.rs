//! The service edge: listens, joins the pool, and shuts down in three phases - gate, drain, tear down.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outboard_attention::MAX_HEAD_DIM;
use outboard_proto::v1::attention_service_server::AttentionServiceServer;
use outboard_proto::v1::{DType, ServerInfo};
use outboard_transport::TaskHandler;
use outboard_transport::grpc::{self, ServerConfig};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic_health::server::HealthReporter;

use crate::registration::Registration;
use crate::{Engine, EngineOptions, ServerError, ServiceOptions};

/// How long results that are computed may take to go out, even when the time to drain is over.
const LAST_RESULTS: Duration = Duration::from_secs(1);

/// A server on the network. Dropping it ends it at once; [`Service::shut_down`] lets tasks in hand finish.
#[derive(Debug)]
pub struct Service {
    engine: Engine,
    address: SocketAddr,
    options: ServiceOptions,
    /// Ends the streams once they are idle.
    drain: CancellationToken,
    serving: JoinHandle<Result<(), ServerError>>,
    health: HealthReporter,
    heartbeat: Option<Heartbeat>,
}

/// The task that renews the lease.
#[derive(Debug)]
struct Heartbeat {
    stop: CancellationToken,
    task: JoinHandle<Registration>,
}

/// Starts the engine, listens, and registers with the coordinator if there is one.
///
/// # Errors
/// [`ServerError`] when any of this fails; then nothing is left running.
pub async fn serve(engine: &EngineOptions, options: ServiceOptions) -> Result<Service, ServerError> {
    let engine = engine.clone();
    // Opening a device may take a while.
    let started = tokio::task::spawn_blocking(move || Engine::start(&engine)).await;
    let engine = started.map_err(|e| ServerError::Kernel(e.to_string()))??;
    serve_engine(engine, options).await
}

/// As [`serve`], for an engine that runs already.
///
/// # Errors
/// [`ServerError`] when any of this fails; then the engine is closed, and nothing is left running.
pub async fn serve_engine(engine: Engine, options: ServiceOptions) -> Result<Service, ServerError> {
    let listening = listen(&engine, &options).await;
    let (listener, address, registration) = listening.inspect_err(|_| engine.close())?;
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<AttentionServiceServer<()>>().await;
    let handler: Arc<dyn TaskHandler> = Arc::new(engine.clone());
    let drain = CancellationToken::new();
    let router = grpc::router(handler, options.homes.clone(), &ServerConfig::default(), drain.clone())
        .add_service(health_service);
    let draining = drain.clone();
    let serving = tokio::spawn(async move {
        let served = grpc::serve(router, listener, draining).await;
        served.map_err(|e| ServerError::Serve { address, message: e.message })
    });
    let heartbeat = registration.map(|registration| {
        let stop = CancellationToken::new();
        let task = tokio::spawn(registration.keep(engine.clone(), stop.clone()));
        Heartbeat { stop, task }
    });
    Ok(Service { engine, address, options, drain, serving, health, heartbeat })
}

async fn listen(
    engine: &Engine,
    options: &ServiceOptions,
) -> Result<(TcpListener, SocketAddr, Option<Registration>), ServerError> {
    let listen_error = |source| ServerError::Listen { address: options.listen, source };
    let listener = TcpListener::bind(options.listen).await.map_err(listen_error)?;
    let address = listener.local_addr().map_err(listen_error)?;
    if options.coordinator.is_some() && options.advertise.is_none() && address.ip().is_unspecified() {
        return Err(ServerError::NoAddress { address });
    }
    let registration = register(engine, address, options).await?;
    Ok((listener, address, registration))
}

async fn register(
    engine: &Engine,
    address: SocketAddr,
    options: &ServiceOptions,
) -> Result<Option<Registration>, ServerError> {
    let Some(url) = &options.coordinator else { return Ok(None) };
    let (job, rank) = match &options.in_place {
        Some(in_place) => (in_place.job.clone(), Some(in_place.rank)),
        None => (String::new(), None),
    };
    let server = ServerInfo {
        id: 0,
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        address: options.advertise.clone().unwrap_or_else(|| address.to_string()),
        device: engine.device().to_owned(),
        memory_bytes: engine.memory_bytes(),
        dtypes: engine.numerics().map(|(dtype, _)| DType::from(&dtype).into()).collect(),
        max_head_dim: MAX_HEAD_DIM as u32,
        numerics_ids: engine.numerics().map(|(_, id)| id.to_owned()).collect(),
        job,
        rank,
        socket: String::new(),
    };
    Registration::new(url, server, options.coordinator_timeout).await.map(Some)
}

impl Service {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The engine, for a rank in the same process.
    pub fn engine(&self) -> Engine {
        self.engine.clone()
    }

    /// Resolves when the server should be shut down although nobody here asked for it: serving failed, or the
    /// coordinator asks it to drain, or the device is lost. Then call [`Service::shut_down`].
    ///
    /// # Errors
    /// [`ServerError::Serve`] and [`ServerError::Device`].
    pub async fn ended(&mut self) -> Result<(), ServerError> {
        let asked_to_drain = async {
            while !self.engine.is_draining() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::select! {
            served = &mut self.serving => served.unwrap_or_else(|e| {
                Err(ServerError::Serve { address: self.address, message: e.to_string() })
            }),
            () = asked_to_drain => match self.engine.lost() {
                None => Ok(()),
                Some(error) => Err(ServerError::Device {
                    device: self.engine.device().to_owned(),
                    message: error.message.clone(),
                }),
            },
        }
    }

    /// Takes no new tasks, tells the coordinator, finishes those in hand within the drain timeout, and ends.
    ///
    /// # Errors
    /// [`ServerError::DrainTimeout`] when tasks were cut off.
    pub async fn shut_down(mut self) -> Result<(), ServerError> {
        let deadline = Instant::now() + self.options.drain_timeout;
        self.engine.drain();
        self.health.set_not_serving::<AttentionServiceServer<()>>().await;
        if let Some(Heartbeat { stop, task }) = self.heartbeat.take() {
            stop.cancel();
            // The task ends at the token, or has panicked, and then there is no lease to give back.
            if let Ok(registration) = task.await {
                registration.leave().await;
            }
        }
        let idle = self.engine.idle(deadline.saturating_duration_since(Instant::now())).await;
        self.drain.cancel();
        // Streams end once their last result is out; clients that do not read it are cut off.
        let left = deadline.saturating_duration_since(Instant::now()).max(LAST_RESULTS);
        // A task that has ended may have been awaited already, and must not be again.
        let cut_off =
            !self.serving.is_finished() && tokio::time::timeout(left, &mut self.serving).await.is_err();
        self.engine.close();
        if cut_off {
            self.serving.abort();
            tracing::warn!(address = %self.address, "cut off clients that did not read their results");
        }
        idle
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.engine.close();
        self.serving.abort();
        if let Some(heartbeat) = &self.heartbeat {
            heartbeat.stop.cancel();
        }
    }
}
