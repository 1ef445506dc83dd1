//! The server's end: one service over a handler.

use std::sync::Arc;

use outboard_proto::TaskError;
use outboard_proto::v1::attention_service_server::{AttentionService, AttentionServiceServer};
use outboard_proto::v1::{AttendRequest, AttendResponse, GetServerStatsRequest, GetServerStatsResponse};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::{Router, TcpIncoming};
use tonic::{Request, Response, Status, Streaming};

use super::ServerConfig;
use super::config::FRAME_BYTES;
use super::session::{Shared, attend};
use crate::{Homes, TaskHandler};

/// Messages that wait for the connection, of at most a chunk each.
const MAX_MESSAGES: usize = 4;

struct Edge(Shared);

/// AttentionService over `handler`, which fetches keys by `homes`, in a router that may get further services. Once
/// `drain` is cancelled, clients are told to end their streams when they have no task left; refusing new tasks meanwhile
/// is the handler's part.
pub fn router(
    handler: Arc<dyn TaskHandler>,
    homes: Homes,
    config: &ServerConfig,
    drain: CancellationToken,
) -> Router {
    let shared = Shared { handler, homes, config: config.clone(), drain };
    let link = &config.link;
    tonic::transport::Server::builder()
        .initial_stream_window_size(link.window_bytes)
        .initial_connection_window_size(link.window_bytes)
        .max_frame_size(FRAME_BYTES)
        .http2_keepalive_interval(Some(link.keep_alive_interval))
        .http2_keepalive_timeout(Some(link.keep_alive_timeout))
        .add_service(AttentionServiceServer::new(Edge(shared)))
}

/// Serves until `drain` is cancelled and the last stream has ended. Dropping the future cuts all streams.
///
/// # Errors
/// [`outboard_proto::ErrorKind::Unavailable`] when the listener fails.
pub async fn serve(router: Router, listener: TcpListener, drain: CancellationToken) -> Result<(), TaskError> {
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let served = router.serve_with_incoming_shutdown(incoming, drain.cancelled_owned()).await;
    served.map_err(|error| TaskError::unavailable(format!("serving failed: {error}")))
}

#[tonic::async_trait]
impl AttentionService for Edge {
    type AttendStream = ReceiverStream<Result<AttendResponse, Status>>;

    async fn attend(
        &self,
        request: Request<Streaming<AttendRequest>>,
    ) -> Result<Response<Self::AttendStream>, Status> {
        let (outbound, messages) = mpsc::channel(MAX_MESSAGES);
        tokio::spawn(attend(self.0.clone(), request.into_inner(), outbound));
        Ok(Response::new(ReceiverStream::new(messages)))
    }

    async fn get_server_stats(
        &self,
        _request: Request<GetServerStatsRequest>,
    ) -> Result<Response<GetServerStatsResponse>, Status> {
        Ok(Response::new(self.0.handler.stats()))
    }
}
