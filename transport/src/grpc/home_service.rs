//! A rank's home on the network.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use outboard_attention::{DType, TensorSlice};
use outboard_proto::v1::deliver_gradient_request::Message;
use outboard_proto::v1::home_service_server::{HomeService, HomeServiceServer};
use outboard_proto::v1::{self, Chunk, DeliverGradientRequest};
use outboard_proto::{
    ErrorKind, GradientHeader, KeyRange, LayerRef, MAX_CHUNK_BYTES, TaskError, check_protocol_version,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

use super::LinkConfig;
use super::config::FRAME_BYTES;
use super::elements::{Destination, Outgoing};
use crate::{HomeHandler, KeyGradient};

/// Calls of one connection that are served at once; more wait.
const MAX_CALLS: u32 = 1024;

struct Edge {
    handler: Arc<dyn HomeHandler>,
    stall_timeout: Duration,
}

/// Serves `handler` on `listener` until `stop` is cancelled. Dropping the future cuts all calls.
///
/// # Errors
/// [`ErrorKind::Unavailable`] when the listener fails.
pub async fn serve_home(
    listener: TcpListener,
    handler: Arc<dyn HomeHandler>,
    link: LinkConfig,
    stop: CancellationToken,
) -> Result<(), TaskError> {
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let router = tonic::transport::Server::builder()
        .initial_stream_window_size(link.window_bytes)
        .initial_connection_window_size(link.window_bytes)
        .max_frame_size(FRAME_BYTES)
        .max_concurrent_streams(MAX_CALLS)
        // Whoever gives up a fetch gives up all its calls at once, which is no attack on the connection.
        .http2_max_pending_accept_reset_streams(Some(MAX_CALLS as usize))
        .http2_keepalive_interval(Some(link.keep_alive_interval))
        .http2_keepalive_timeout(Some(link.keep_alive_timeout))
        .add_service(HomeServiceServer::new(Edge { handler, stall_timeout: link.stall_timeout }));
    let served = router.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await;
    served.map_err(|error| TaskError::unavailable(format!("serving failed: {error}")))
}

fn required<W, D: TryFrom<W, Error = TaskError>>(field: &str, value: Option<W>) -> Result<D, TaskError> {
    let missing = || TaskError::invalid(format!("{field} is missing; it must be given"));
    value.ok_or_else(missing)?.try_into().map_err(|error: TaskError| error.context(field))
}

#[tonic::async_trait]
impl HomeService for Edge {
    type FetchKeysStream = BoxStream<'static, Result<Chunk, Status>>;

    async fn await_keys(
        &self,
        request: Request<v1::AwaitKeysRequest>,
    ) -> Result<Response<v1::AwaitKeysResponse>, Status> {
        let v1::AwaitKeysRequest { protocol_version, layer, limit_ms } = request.into_inner();
        check_protocol_version(protocol_version)?;
        let layer: LayerRef = required("layer", layer)?;
        self.handler.await_keys(layer, Duration::from_millis(limit_ms.into())).await?;
        Ok(Response::new(v1::AwaitKeysResponse {}))
    }

    async fn fetch_keys(
        &self,
        request: Request<v1::FetchKeysRequest>,
    ) -> Result<Response<Self::FetchKeysStream>, Status> {
        let v1::FetchKeysRequest { protocol_version, range } = request.into_inner();
        check_protocol_version(protocol_version)?;
        let range: KeyRange = required("range", range)?;
        let tensors = self.handler.keys(&range)?;
        for tensor in &tensors {
            check_given_out(&range, tensor)?;
        }
        let tensors = tensors.map(Outgoing::new);
        let handler = Arc::clone(&self.handler);
        let chunks = tensors.into_iter().zip(0..).flat_map(|(tensor, id)| {
            (0..).step_by(MAX_CHUNK_BYTES).map_while(move |offset| tensor.chunk(0, id, offset))
        });
        let counted = chunks.map(move |chunk| {
            handler.count_bytes(0, chunk.data.len() as u64);
            Ok(chunk)
        });
        Ok(Response::new(tokio_stream::iter(counted).boxed()))
    }

    async fn deliver_gradient(
        &self,
        request: Request<Streaming<DeliverGradientRequest>>,
    ) -> Result<Response<v1::DeliverGradientResponse>, Status> {
        let inbound = Inbound { stream: request.into_inner(), stall_timeout: self.stall_timeout };
        take(&*self.handler, inbound).await?;
        Ok(Response::new(v1::DeliverGradientResponse {}))
    }
}

/// Refuses a tensor of other tokens or heads than were asked for.
fn check_given_out(range: &KeyRange, tensor: &TensorSlice) -> Result<(), TaskError> {
    let (tokens, heads) = (tensor.tokens(), tensor.heads());
    if tokens == range.tokens && heads == range.kv_heads.len() {
        return Ok(());
    }
    Err(TaskError::internal(format!(
        "the rank gave out tokens {tokens} of {heads} heads where {range} were asked for"
    )))
}

/// What a server sends with a delivery.
struct Inbound {
    stream: Streaming<DeliverGradientRequest>,
    stall_timeout: Duration,
}

async fn take(handler: &dyn HomeHandler, mut inbound: Inbound) -> Result<(), TaskError> {
    let Some(Message::Header(header)) = inbound.next().await? else {
        return Err(TaskError::invalid(
            "the first message must be the header; send GradientHeader, then chunks",
        ));
    };
    check_protocol_version(header.protocol_version)?;
    let header = GradientHeader::try_from(header)?;
    let tokens = header.range.tokens.len();
    let room = |elements: usize| {
        Destination::new(DType::F32, elements.saturating_mul(tokens).saturating_mul(DType::F32.bytes()))
    };
    let mut tensors = handler.expected(&header)?.map(room);
    while let Some(message) = inbound.next().await? {
        let Message::Chunk(chunk) = message else {
            return Err(TaskError::invalid("a second header; a stream has one"));
        };
        handler.count_bytes(chunk.data.len() as u64, 0);
        let unknown = || TaskError::new(ErrorKind::Corrupt, format!("a chunk names tensor {}", chunk.tensor));
        let tensor = usize::try_from(chunk.tensor).ok().and_then(|n| tensors.get_mut(n));
        tensor.ok_or_else(unknown)?.put(&chunk)?;
    }
    if !tensors.iter().all(Destination::is_whole) {
        return Err(TaskError::new(ErrorKind::Corrupt, "the stream ended before dK and dV were whole"));
    }
    let [dk, dv] = tensors.map(|tensor| tensor.into_elements().into_f32().unwrap_or_default());
    handler.take_gradient(KeyGradient { header, dk, dv })
}

impl Inbound {
    async fn next(&mut self) -> Result<Option<Message>, TaskError> {
        let Inbound { stream, stall_timeout } = self;
        let late = |_| TaskError::deadline("the next message of a delivery", *stall_timeout);
        let message = tokio::time::timeout(*stall_timeout, stream.message()).await.map_err(late)??;
        let unknown =
            || TaskError::invalid("a message of no known kind; run one version of Outboard on both sides");
        message.map(|message| message.message.ok_or_else(unknown)).transpose()
    }
}
