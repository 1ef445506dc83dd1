//! The coordinator on the network.

use std::future::Future;
use std::time::Duration;

use outboard_proto::v1::coordinator_service_server::{CoordinatorService, CoordinatorServiceServer};
use outboard_proto::{check_protocol_version, describe, v1};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::handle::Handle;
use crate::job::JobId;
use crate::server::ServerId;
use crate::{Error, MAX_RANKS, Options, wire};

/// Largest request, in bytes.
const MAX_REQUEST_BYTES: usize = 16 << 20;
/// Above this many mask slices a request is converted on a thread of its own.
const MANY_SLICES: usize = 256;
/// How often a silent connection is probed, so that calls of a dead host end.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// `outboard.v1.CoordinatorService`, over a [`Handle`].
#[derive(Clone, Debug)]
pub struct Service(Handle);

impl Service {
    /// The service of a coordinator.
    pub fn new(handle: Handle) -> Service {
        Service(handle)
    }
}

/// Runs a coordinator on `listener` until `shutdown` resolves; then all calls in progress end with an error, and the
/// function returns at the latest when the drain timeout of `options` is over.
///
/// # Errors
/// Kind `Invalid` for options that make no sense, `Unavailable` when the listener fails.
pub async fn serve(
    listener: TcpListener,
    options: Options,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    serve_handle(listener, Handle::start(options)?, shutdown).await
}

/// As [`serve`], for a coordinator that was started before.
///
/// # Errors
/// Kind `Unavailable` when the listener fails.
pub async fn serve_handle(
    listener: TcpListener,
    handle: Handle,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<CoordinatorServiceServer<Service>>().await;
    let service = CoordinatorServiceServer::new(Service::new(handle.clone()));
    let router = Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .max_concurrent_streams(MAX_RANKS)
        .add_service(health_service)
        .add_service(service.max_decoding_message_size(MAX_REQUEST_BYTES));
    let stop = CancellationToken::new();
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let serving = router.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
    tokio::pin!(serving);
    let failed =
        |error: tonic::transport::Error| Error::unavailable(format!("serving failed: {}", describe(&error)));
    tokio::select! {
        ended = &mut serving => return ended.map_err(failed),
        () = shutdown => {}
    }
    health.set_not_serving::<CoordinatorServiceServer<Service>>().await;
    handle.close();
    stop.cancel();
    match tokio::time::timeout(handle.options().drain_timeout, serving).await {
        Ok(ended) => ended.map_err(failed),
        Err(_) => {
            tracing::warn!("connections were still open at the end of the drain timeout");
            Ok(())
        }
    }
}

#[tonic::async_trait]
impl CoordinatorService for Service {
    async fn register_server(
        &self,
        request: Request<v1::RegisterServerRequest>,
    ) -> Result<Response<v1::RegisterServerResponse>, Status> {
        let request = request.into_inner();
        check_protocol_version(request.protocol_version)?;
        let server = self.0.register_server(wire::server_spec(request.server)?)?;
        let lease_ms = u32::try_from(self.0.options().lease.as_millis()).unwrap_or(u32::MAX);
        Ok(Response::new(v1::RegisterServerResponse { server_id: server.0, lease_ms }))
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatResponse>, Status> {
        let drain = self.0.heartbeat(ServerId(request.into_inner().server_id))?;
        Ok(Response::new(v1::HeartbeatResponse { drain }))
    }

    async fn drain_server(
        &self,
        request: Request<v1::DrainServerRequest>,
    ) -> Result<Response<v1::DrainServerResponse>, Status> {
        self.0.drain_server(ServerId(request.into_inner().server_id))?;
        Ok(Response::new(v1::DrainServerResponse {}))
    }

    async fn list_pool(
        &self,
        _request: Request<v1::ListPoolRequest>,
    ) -> Result<Response<v1::ListPoolResponse>, Status> {
        let servers = self.0.list_pool().iter().map(wire::pool_entry).collect();
        Ok(Response::new(v1::ListPoolResponse { servers }))
    }

    async fn join_job(
        &self,
        request: Request<v1::JoinJobRequest>,
    ) -> Result<Response<v1::JoinJobResponse>, Status> {
        let request = request.into_inner();
        check_protocol_version(request.protocol_version)?;
        let rank = wire::rank_spec(&request);
        let joined = self.0.join_job(rank, wire::terms(request)?).await?;
        Ok(Response::new(wire::joined(&joined)))
    }

    async fn submit_step(
        &self,
        request: Request<v1::SubmitStepRequest>,
    ) -> Result<Response<v1::SubmitStepResponse>, Status> {
        let request = request.into_inner();
        let facts = self.0.facts(JobId(request.job_id))?;
        let submission = if wire::slices(&request) > MANY_SLICES {
            let converted = tokio::task::spawn_blocking(move || wire::submission(request, &facts)).await;
            converted.map_err(|e| Error::internal(format!("reading the documents failed: {e}")))??
        } else {
            wire::submission(request, &facts)?
        };
        let plan = self.0.submit_step(submission).await?;
        Ok(Response::new(wire::rank_plan(&plan)))
    }

    async fn report_step(
        &self,
        request: Request<v1::ReportStepRequest>,
    ) -> Result<Response<v1::ReportStepResponse>, Status> {
        self.0.report_step(wire::step_report(request.into_inner()))?;
        Ok(Response::new(v1::ReportStepResponse {}))
    }

    async fn leave_job(
        &self,
        request: Request<v1::LeaveJobRequest>,
    ) -> Result<Response<v1::LeaveJobResponse>, Status> {
        let v1::LeaveJobRequest { job_id, rank, reason } = request.into_inner();
        self.0.leave_job(JobId(job_id), rank, &reason)?;
        Ok(Response::new(v1::LeaveJobResponse {}))
    }
}
