//! The way to a home: fetches keys, delivers gradients.

use std::pin::pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::stream::{self, StreamExt, TryStreamExt};
use outboard_attention::{Span, TensorSlice};
use outboard_proto::v1::home_service_client::HomeServiceClient;
use outboard_proto::v1::{self, Chunk, deliver_gradient_request::Message};
use outboard_proto::{
    ErrorKind, GradientHeader, KeyHome, KeyRange, LayerRef, MAX_CHUNK_BYTES, PROTOCOL_VERSION, TaskError,
    TaskHeader, TensorKind,
};
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use tonic::transport::Channel;
use tonic::{Response, Status};

use super::assembly::Assembly;
use super::elements::Outgoing;
use super::link::endpoint;
use super::{ClientConfig, LinkConfig};
use crate::home::{Fetched, Source, named};
use crate::sizes::row_of;

/// Most parts of one task's keys, or of their gradients, that are on their way at once.
pub(crate) const MAX_PARTS: usize = 64;

/// K and V of a fetch, which its parts fill.
type Tensors = Mutex<[Assembly; 2]>;

/// A connection to a home, made when it is first used, and again after it was lost.
#[derive(Clone, Debug)]
pub(crate) struct HomeLink {
    client: HomeServiceClient<Channel>,
    /// See [`LinkConfig::stall_timeout`].
    stall_timeout: Duration,
}

impl HomeLink {
    /// # Errors
    /// [`ErrorKind::Invalid`] when the address is none.
    pub(crate) fn new(address: &str, link: &LinkConfig) -> Result<HomeLink, TaskError> {
        let mut config = ClientConfig::new(address);
        config.link = link.clone();
        let client = HomeServiceClient::new(endpoint(&config)?.connect_lazy());
        Ok(HomeLink { client, stall_timeout: link.stall_timeout })
    }

    pub(crate) async fn await_keys(mut self, layer: &LayerRef, limit: Duration) -> Result<(), TaskError> {
        let request = v1::AwaitKeysRequest {
            protocol_version: PROTOCOL_VERSION,
            layer: Some(layer.into()),
            limit_ms: u32::try_from(limit.as_millis()).unwrap_or(u32::MAX),
        };
        // The home's own error says more than a deadline here.
        let limit = limit.saturating_add(self.stall_timeout);
        answered(limit, self.client.await_keys(request)).await.map(drop)
    }

    /// Fetches a part of K and V. Gives back its bytes.
    async fn fetch(mut self, range: &KeyRange, part: usize, tensors: &Tensors) -> Result<u64, TaskError> {
        let request = v1::FetchKeysRequest { protocol_version: PROTOCOL_VERSION, range: Some(range.into()) };
        let mut chunks = answered(self.stall_timeout, self.client.fetch_keys(request)).await?;
        let due = || Instant::now() + self.stall_timeout;
        let late = |_| TaskError::deadline("sending the next piece", self.stall_timeout);
        // Small pieces are no way to take longer.
        let (mut received, mut next_due) = (0, due());
        while let Some(chunk) = timeout_at(next_due, chunks.message()).await.map_err(late)?? {
            put(tensors, part, &chunk)?;
            let before = received;
            received += chunk.data.len();
            if received / MAX_CHUNK_BYTES > before / MAX_CHUNK_BYTES {
                next_due = due();
            }
        }
        let tensors = tensors.lock().unwrap_or_else(PoisonError::into_inner);
        tensors.iter().try_for_each(|tensor| tensor.check_whole(part))?;
        Ok(received as u64)
    }

    /// Delivers dK and dV, each holding the header's tokens. Gives back their bytes.
    pub(crate) async fn deliver(
        mut self,
        header: GradientHeader,
        parts: [TensorSlice; 2],
    ) -> Result<u64, TaskError> {
        let bytes: usize = parts.iter().map(TensorSlice::bytes).sum();
        let GradientHeader { range, group, position, summed } = header;
        let (protocol_version, range) = (PROTOCOL_VERSION, Some((&range).into()));
        let header = v1::GradientHeader { protocol_version, range, group, position, summed };
        let chunks = parts.map(Outgoing::new).into_iter().zip(0..).flat_map(|(tensor, id)| {
            (0..).step_by(MAX_CHUNK_BYTES).map_while(move |offset| tensor.chunk(0, id, offset))
        });
        let (moved, mut moves) = watch::channel(());
        let messages = std::iter::once(Message::Header(header)).chain(chunks.map(Message::Chunk));
        let messages = messages.map(move |message| {
            moved.send_replace(());
            v1::DeliverGradientRequest { message: Some(message) }
        });
        let late = |_| TaskError::deadline("taking the next piece", self.stall_timeout);
        let mut call = pin!(self.client.deliver_gradient(stream::iter(messages)));
        loop {
            tokio::select! {
                answer = &mut call => {
                    answer?;
                    break;
                }
                moved = timeout(self.stall_timeout, moves.changed()) => {
                    // Once all has been sent, what is left is the answer.
                    if moved.map_err(late)?.is_err() {
                        timeout(self.stall_timeout, call).await.map_err(late)??;
                        break;
                    }
                }
            }
        }
        Ok(bytes as u64)
    }
}

/// Fetches K and V of `tokens` from the sources of a task's homes, many at once.
pub(crate) async fn fetch(
    header: &TaskHeader,
    tokens: Span,
    sources: Vec<(&KeyHome, Span, Source)>,
) -> Result<Fetched, TaskError> {
    let spans: Vec<Span> = sources.iter().map(|(_, tokens, _)| *tokens).collect();
    let tensor = |kind| Assembly::new(row_of(header, kind), tokens, &spans);
    let tensors = Mutex::new([TensorKind::K, TensorKind::V].map(tensor));
    let fill = async |part, home, source| {
        let filled = match source {
            Source::Here(slices) => copy(&tensors, part, &slices),
            Source::There(link, range, held) => {
                let held = match held {
                    Some(held) => held.wait(range.tokens).await,
                    None => None,
                };
                match held {
                    Some(slices) => copy(&tensors, part, &slices),
                    None => link.fetch(&range, part, &tensors).await,
                }
            }
        };
        filled.map_err(|error| named(error, home, "its keys"))
    };
    let parts: Vec<_> =
        sources.into_iter().enumerate().map(|(part, (home, _, source))| fill(part, home, source)).collect();
    let received = stream::iter(parts).buffer_unordered(MAX_PARTS);
    let received = received.try_fold(0, async |sum, bytes| Ok(sum + bytes)).await?;
    let [k, v] = tensors.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(Fetched { k: k.into_slice()?, v: v.into_slice()?, received, claims: Vec::new() })
}

fn put(tensors: &Tensors, part: usize, chunk: &Chunk) -> Result<(), TaskError> {
    let unknown = || TaskError::new(ErrorKind::Corrupt, format!("a chunk names tensor {}", chunk.tensor));
    let mut tensors = tensors.lock().unwrap_or_else(PoisonError::into_inner);
    let tensor = usize::try_from(chunk.tensor).ok().and_then(|n| tensors.get_mut(n));
    tensor.ok_or_else(unknown)?.put(part, chunk)
}

/// Copies a part that is in this process, so that no byte of it crosses the network.
fn copy(tensors: &Tensors, part: usize, slices: &[TensorSlice; 2]) -> Result<u64, TaskError> {
    let mut tensors = tensors.lock().unwrap_or_else(PoisonError::into_inner);
    tensors.iter_mut().zip(slices).try_for_each(|(tensor, slice)| tensor.fill(part, slice))?;
    Ok(0)
}

async fn answered<T>(
    limit: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, TaskError> {
    match timeout(limit, call).await {
        Ok(answer) => answer.map(Response::into_inner).map_err(TaskError::from),
        Err(_) => Err(TaskError::deadline("the answer", limit)),
    }
}
