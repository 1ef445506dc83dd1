//! The way to a home: fetches keys, delivers gradients.

use std::time::Duration;

use futures::StreamExt;
use futures::future::try_join_all;
use futures::stream::select_all;
use outboard_attention::{Span, TensorSlice};
use outboard_proto::v1::home_service_client::HomeServiceClient;
use outboard_proto::v1::{self, Chunk, deliver_gradient_request::Message};
use outboard_proto::{
    ErrorKind, GradientHeader, KeyHome, KeyRange, LayerRef, MAX_CHUNK_BYTES, PROTOCOL_VERSION, TaskError,
    TaskHeader, TensorKind,
};
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::ClientConfig;
use super::assembly::Assembly;
use super::elements::Outgoing;
use super::link::endpoint;
use crate::home::{Fetched, Source, named};
use crate::sizes::row_of;

/// How long a home may be silent while it sends, or takes, tensors.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to a home, made when it is first used, and again after it was lost.
#[derive(Clone, Debug)]
pub(crate) struct HomeLink(HomeServiceClient<Channel>);

impl HomeLink {
    /// # Errors
    /// [`ErrorKind::Invalid`] when the address is none.
    pub(crate) fn new(address: &str) -> Result<HomeLink, TaskError> {
        let channel = endpoint(&ClientConfig::new(address))?.connect_lazy();
        Ok(HomeLink(HomeServiceClient::new(channel)))
    }

    pub(crate) async fn await_keys(mut self, layer: &LayerRef, limit: Duration) -> Result<(), TaskError> {
        let request = v1::AwaitKeysRequest {
            protocol_version: PROTOCOL_VERSION,
            layer: Some(layer.into()),
            limit_ms: u32::try_from(limit.as_millis()).unwrap_or(u32::MAX),
        };
        // The home's own error says more than a deadline here.
        let answer = bounded(limit + STALL_TIMEOUT, self.0.await_keys(request)).await;
        answer.map(drop)
    }

    async fn fetch(mut self, range: &KeyRange) -> Result<Streaming<Chunk>, TaskError> {
        let request = v1::FetchKeysRequest { protocol_version: PROTOCOL_VERSION, range: Some(range.into()) };
        bounded(STALL_TIMEOUT, self.0.fetch_keys(request)).await
    }

    /// Delivers dK and dV, each holding the header's tokens.
    pub(crate) async fn deliver(
        mut self,
        header: GradientHeader,
        parts: [TensorSlice; 2],
    ) -> Result<(), TaskError> {
        let bytes: usize = parts.iter().map(TensorSlice::bytes).sum();
        let GradientHeader { range, group, position } = header;
        let (protocol_version, range) = (PROTOCOL_VERSION, Some((&range).into()));
        let header = v1::GradientHeader { protocol_version, range, group, position };
        let chunks = parts.map(Outgoing::new).into_iter().zip(0..).flat_map(|(tensor, id)| {
            (0..).step_by(MAX_CHUNK_BYTES).map_while(move |offset| tensor.chunk(0, id, offset))
        });
        let messages = std::iter::once(Message::Header(header)).chain(chunks.map(Message::Chunk));
        let messages = messages.map(|message| v1::DeliverGradientRequest { message: Some(message) });
        // A tensor has its time by its size, at a rate that no link is below.
        let limit = STALL_TIMEOUT + Duration::from_secs((bytes / MAX_CHUNK_BYTES) as u64);
        bounded(limit, self.0.deliver_gradient(tokio_stream::iter(messages))).await.map(drop)
    }
}

/// Fetches K and V of `tokens` from the sources of a task's homes, all at once.
pub(crate) async fn fetch(
    header: &TaskHeader,
    tokens: Span,
    sources: Vec<(&KeyHome, Source)>,
) -> Result<Fetched, TaskError> {
    let spans: Vec<Span> = sources.iter().map(|(home, _)| home.tokens).collect();
    let mut tensors =
        [TensorKind::K, TensorKind::V].map(|kind| Assembly::new(row_of(header, kind), tokens, &spans));
    let mut opening = Vec::new();
    for (part, (home, source)) in sources.into_iter().enumerate() {
        match source {
            Source::Here(slices) => {
                for (tensor, slice) in tensors.iter_mut().zip(&slices) {
                    tensor.fill(part, slice)?;
                }
            }
            Source::There(link, range) => opening.push(async move {
                let stream = link.fetch(&range).await.map_err(|error| named(error, home, "its keys"))?;
                Ok::<_, TaskError>(stream.map(move |chunk| (part, home, chunk)))
            }),
        }
    }
    let mut chunks = select_all(try_join_all(opening).await?);
    let mut received = 0;
    loop {
        let next = tokio::time::timeout(STALL_TIMEOUT, chunks.next()).await;
        let next =
            next.map_err(|_| TaskError::deadline("the next piece of the task's keys", STALL_TIMEOUT))?;
        let Some((part, home, chunk)) = next else { break };
        let failed = |error| named(error, home, "its keys");
        let chunk = chunk.map_err(|status| failed(TaskError::from(status)))?;
        let unknown = || TaskError::new(ErrorKind::Corrupt, format!("a chunk names tensor {}", chunk.tensor));
        let tensor = usize::try_from(chunk.tensor).ok().and_then(|n| tensors.get_mut(n));
        tensor.ok_or_else(unknown).and_then(|tensor| tensor.put(part, &chunk)).map_err(failed)?;
        received += chunk.data.len() as u64;
    }
    let [k, v] = tensors;
    Ok(Fetched { k: k.into_slice()?, v: v.into_slice()?, received })
}

async fn bounded<T>(
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, TaskError> {
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner).map_err(TaskError::from),
        Err(_) => Err(TaskError::deadline("the answer", limit)),
    }
}
