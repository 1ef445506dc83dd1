//! A server's place in the pool: it registers with the coordinator and renews its lease.

use std::time::Duration;

use outboard_proto::v1::coordinator_service_client::CoordinatorServiceClient;
use outboard_proto::v1::{DrainServerRequest, HeartbeatRequest, RegisterServerRequest, ServerInfo};
use outboard_proto::{ErrorKind, PROTOCOL_VERSION, TaskError, describe};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use crate::{Engine, ServerError};

/// A lease on a place in the pool.
#[derive(Debug)]
pub(crate) struct Registration {
    client: CoordinatorServiceClient<Channel>,
    url: String,
    server: ServerInfo,
    id: u64,
    lease: Duration,
}

impl Registration {
    /// Registers `server` with the coordinator at `url`.
    pub(crate) async fn new(url: &str, server: ServerInfo, timeout: Duration) -> Result<Self, ServerError> {
        let failed = |message: String| ServerError::Register { url: url.to_owned(), message };
        let endpoint = Endpoint::from_shared(url.to_owned())
            .map_err(|e| failed(format!("{e}; give it as http://host:port")))?
            .connect_timeout(timeout)
            .timeout(timeout);
        let channel = endpoint
            .connect()
            .await
            .map_err(|e| failed(format!("{}; is `outboard coordinator` running there?", describe(&e))))?;
        let client = CoordinatorServiceClient::new(channel);
        let mut registration =
            Registration { client, url: url.to_owned(), server, id: 0, lease: Duration::from_secs(1) };
        registration.register().await.map_err(|e| failed(e.message))?;
        Ok(registration)
    }

    /// Renews the lease until `stop`. A coordinator that does not answer is asked again at every heartbeat, and one
    /// that has forgotten the server gets it registered anew; when it asks the server to drain, the engine does.
    pub(crate) async fn keep(mut self, engine: Engine, stop: CancellationToken) -> Registration {
        let mut reachable = true;
        loop {
            tokio::select! {
                () = tokio::time::sleep(self.lease / 3) => {}
                () = stop.cancelled() => return self,
            }
            let error = match self.heartbeat(&engine).await {
                Ok(()) => {
                    if !reachable {
                        tracing::info!(url = %self.url, "the coordinator answers again");
                    }
                    reachable = true;
                    continue;
                }
                Err(error) => error,
            };
            if error.kind == ErrorKind::NotFound && !engine.is_draining() {
                match self.register().await {
                    Ok(()) => {
                        tracing::warn!(url = %self.url, id = self.id, "registered anew with the coordinator")
                    }
                    Err(error) => {
                        tracing::warn!(url = %self.url, %error, "cannot register anew; will try again")
                    }
                }
            } else if reachable {
                reachable = false;
                tracing::warn!(url = %self.url, %error, "the coordinator does not answer; will keep trying");
            }
        }
    }

    /// Asks the coordinator to plan without this server from now on. A coordinator that cannot be told finds out when
    /// the lease ends.
    pub(crate) async fn leave(mut self) {
        let request = DrainServerRequest { server_id: self.id };
        if let Err(status) = self.client.drain_server(request).await {
            tracing::warn!(url = %self.url, message = status.message(), "cannot tell the coordinator of the shutdown");
        }
    }

    async fn register(&mut self) -> Result<(), TaskError> {
        let request =
            RegisterServerRequest { protocol_version: PROTOCOL_VERSION, server: Some(self.server.clone()) };
        let response = self.client.register_server(request).await.map_err(TaskError::from)?.into_inner();
        self.id = response.server_id;
        self.lease = Duration::from_millis(u64::from(response.lease_ms.max(30)));
        Ok(())
    }

    async fn heartbeat(&mut self, engine: &Engine) -> Result<(), TaskError> {
        let request = HeartbeatRequest { server_id: self.id };
        let response = self.client.heartbeat(request).await.map_err(TaskError::from)?.into_inner();
        if response.drain && !engine.is_draining() {
            tracing::info!("the coordinator asks this server to drain");
            engine.drain();
        }
        Ok(())
    }
}
