//! Keys at home: what servers fetch from ranks that share a document, and what they deliver to them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{self, StreamExt, TryStreamExt};
use outboard_attention::kernel::Results;
use outboard_attention::{Span, TensorSlice};
use outboard_proto::{
    ErrorKind, GradientHeader, KeyHome, KeyRange, LayerRef, RetryHint, TaskError, TaskHeader, TensorKind,
};

use crate::grpc::LinkConfig;
use crate::grpc::home_client::{HomeLink, MAX_PARTS, fetch};
use crate::parts::{Claim, Part, Parts, Segment};
use crate::sizes::{Row, fetched_bytes, row_of};
use crate::sums::{Delivery, Member};
use crate::{TaskHandler, TaskOutcome};

/// Most connections to homes that are kept. All are given up when there would be more.
const MAX_LINKS: usize = 4096;

/// What a rank plugs in: the keys that it is home of, and their gradients.
pub trait HomeHandler: Send + Sync + 'static {
    /// Resolves once the rank has the keys of a layer.
    ///
    /// # Errors
    /// When they do not come within `limit`, or will not come any more.
    fn await_keys(&self, layer: LayerRef, limit: Duration) -> BoxFuture<'_, Result<(), TaskError>>;

    /// K and V of a range, each holding exactly the range's tokens and heads.
    ///
    /// # Errors
    /// When the rank does not have them, or not yet.
    fn keys(&self, range: &KeyRange) -> Result<[TensorSlice; 2], TaskError>;

    /// Elements of dK and of dV for one token of a share that the rank awaits. Asked before memory is taken for it.
    ///
    /// # Errors
    /// When the rank awaits no such share, for one because it is not home of all its tokens.
    fn expected(&self, header: &GradientHeader) -> Result<[usize; 2], TaskError>;

    /// Takes a share. The same once more is no error, and changes nothing.
    ///
    /// # Errors
    /// When the rank awaits no such share, or it has another size.
    fn take_gradient(&self, gradient: KeyGradient) -> Result<(), TaskError>;

    /// Counts tensor bytes as they cross the network.
    fn count_bytes(&self, received: u64, sent: u64);
}

/// One task's share of the gradients of a range of keys, or its group's.
#[derive(Clone, Debug)]
pub struct KeyGradient {
    /// Which task, and of what.
    pub header: GradientHeader,
    /// dK `[tokens, kv heads, head_dim]`.
    pub dk: Vec<f32>,
    /// dV `[tokens, kv heads, v_head_dim]`.
    pub dv: Vec<f32>,
}

/// A process's way to the homes of keys. Clones share its connections.
#[derive(Clone, Debug, Default)]
pub struct Homes(Arc<Inner>);

#[derive(Default)]
struct Inner {
    local: Option<Local>,
    config: LinkConfig,
    links: Mutex<HashMap<String, HomeLink>>,
    parts: Parts,
}

/// The home in this process, whose tensors go by pointer.
#[derive(Clone)]
struct Local {
    address: String,
    handler: Arc<dyn HomeHandler>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let local = self.local.as_ref().map(|local| &local.address);
        f.debug_struct("Homes").field("local", &local).finish_non_exhaustive()
    }
}

/// K and V of a task, and the bytes of them that came over the network.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) k: TensorSlice,
    pub(crate) v: TensorSlice,
    pub(crate) received: u64,
    /// For as long as these are held, other fetches of the same keys find them here.
    pub(crate) claims: Vec<Claim>,
}

/// Where one home's part of some keys comes from.
pub(crate) enum Source {
    Here([TensorSlice; 2]),
    /// At the home, or, sooner, where another fetch puts it.
    There(HomeLink, KeyRange, Option<Arc<Part>>),
}

impl Homes {
    /// The way to homes from the process of a rank whose own home listens at `address`.
    pub fn beside(address: String, handler: Arc<dyn HomeHandler>) -> Homes {
        Homes(Arc::new(Inner { local: Some(Local { address, handler }), ..Inner::default() }))
    }

    /// The same, with connections of its own by `config`.
    pub fn with_link(self, config: LinkConfig) -> Homes {
        Homes(Arc::new(Inner { local: self.0.local.clone(), config, ..Inner::default() }))
    }

    /// Resolves once a home has the keys of a layer.
    ///
    /// # Errors
    /// When they do not come within `limit`, naming the rank.
    pub async fn await_keys(
        &self,
        home: &KeyHome,
        layer: &LayerRef,
        limit: Duration,
    ) -> Result<(), TaskError> {
        let waited = match self.local(home) {
            Some(handler) => handler.await_keys(layer.clone(), limit).await,
            None => self.link(home)?.await_keys(layer, limit).await,
        };
        waited.map_err(|error| named(error, home, &format!("waiting for its keys of {layer}")))
    }

    /// Memory that fetching a task's K and V takes here: none where they go by pointer.
    pub(crate) fn fetched_bytes(&self, header: &TaskHeader) -> u64 {
        match &header.key_homes[..] {
            [home] if self.local(home).is_some() => 0,
            _ => fetched_bytes(header),
        }
    }

    /// Fetches K and V of a task that names their homes; memory for them has been counted. What another fetch of this
    /// process has, or will have, is not fetched again.
    pub(crate) async fn fetch(&self, header: &TaskHeader, tokens: Span) -> Result<Fetched, TaskError> {
        let (mut sources, mut elsewhere) = (Vec::with_capacity(header.key_homes.len()), Vec::new());
        for home in &header.key_homes {
            let range = header.key_range(home.tokens);
            let Some(handler) = self.local(home) else {
                elsewhere.push((home, self.link(home)?, range));
                continue;
            };
            let keys = handler.keys(&range).and_then(|keys| fit(header, &range, keys));
            let keys = keys.map_err(|error| named(error, home, "its keys"))?;
            sources.push((home, home.tokens, Source::Here(keys)));
        }
        if let ([], [(_, _, Source::Here([k, v]))]) = (&elsewhere[..], &sources[..]) {
            return Ok(Fetched { k: k.clone(), v: v.clone(), received: 0, claims: Vec::new() });
        }
        let wanted: Vec<(KeyRange, &str)> =
            elsewhere.iter().map(|(home, _, range)| (range.clone(), &*home.address)).collect();
        let mut claims = Vec::new();
        for ((home, link, range), segments) in elsewhere.into_iter().zip(self.0.parts.claim(&wanted)) {
            for segment in segments {
                let (tokens, part) = match segment {
                    Segment::Held(part, tokens) => (tokens, Some(part)),
                    Segment::New(claim) => {
                        let tokens = claim.tokens();
                        claims.push(claim);
                        (tokens, None)
                    }
                };
                let range = KeyRange { tokens, ..range.clone() };
                sources.push((home, tokens, Source::There(link.clone(), range, part)));
            }
        }
        let Fetched { k, v, received, .. } = fetch(header, tokens, sources).await?;
        claims.iter().for_each(|claim| claim.give(&k, &v));
        Ok(Fetched { k, v, received, claims })
    }

    /// Delivers dK and dV of a backward task, or of its group, each home its tokens. Gives back the bytes that went over the
    /// network.
    pub(crate) async fn deliver(&self, header: &TaskHeader, delivery: Delivery) -> Result<u64, TaskError> {
        let Delivery { kv, position, summed, gradients: [dk, dv] } = delivery;
        if !header.fetched_keys().unwrap_or_default().covers(kv) {
            let homes = header.fetched_keys().unwrap_or_default();
            let message = format!("its group reads keys {kv}, and key_homes names homes of {homes}");
            return Err(TaskError::invalid(message));
        }
        let whole = |kind, values| {
            let Row { heads, dim, .. } = row_of(header, kind);
            let unfit =
                |error| TaskError::internal(format!("the server computed a {kind} that is none: {error}"));
            TensorSlice::contiguous("gradient", values, kv, heads, dim).map_err(unfit)
        };
        let whole = [whole(TensorKind::DK, dk)?, whole(TensorKind::DV, dv)?];
        let mut deliveries = Vec::new();
        for home in &header.key_homes {
            let tokens = home.tokens.intersect(kv);
            if tokens.is_empty() {
                continue;
            }
            let missing = || TaskError::internal(format!("a gradient does not hold tokens {tokens}"));
            let part = |whole: &TensorSlice| whole.with_tokens(tokens).ok_or_else(missing);
            let (range, group) = (header.key_range(tokens), header.group);
            let summed = summed.iter().filter(|kv| !kv.intersect(tokens).is_empty()).count() as u32;
            let named_by = GradientHeader { range, group, position, summed };
            deliveries.push(self.deliver_part(home, named_by, [part(&whole[0])?, part(&whole[1])?]));
        }
        let sent = stream::iter(deliveries).buffer_unordered(MAX_PARTS);
        sent.try_fold(0, async |sum, bytes| Ok(sum + bytes)).await
    }

    async fn deliver_part(
        &self,
        home: &KeyHome,
        header: GradientHeader,
        parts: [TensorSlice; 2],
    ) -> Result<u64, TaskError> {
        let failed = |error| named(error, home, "taking gradients of its keys");
        let Some(handler) = self.local(home) else {
            return self.link(home)?.deliver(header, parts).await.map_err(failed);
        };
        let [dk, dv] = [values(&parts[0])?, values(&parts[1])?];
        handler.take_gradient(KeyGradient { header, dk, dv }).map(|()| 0).map_err(failed)
    }

    fn local(&self, home: &KeyHome) -> Option<&Arc<dyn HomeHandler>> {
        self.0.local.as_ref().filter(|local| local.address == home.address).map(|local| &local.handler)
    }

    fn link(&self, home: &KeyHome) -> Result<HomeLink, TaskError> {
        let mut links = self.0.links.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(link) = links.get(&home.address) {
            return Ok(link.clone());
        }
        if links.len() >= MAX_LINKS {
            links.clear();
        }
        let link = HomeLink::new(&home.address, &self.0.config)
            .map_err(|error| named(error, home, "reaching it"))?;
        links.insert(home.address.clone(), link.clone());
        Ok(link)
    }
}

/// Sends the gradients of keys that have homes of their own there, alone or as a part of a sum; the rest is for the task's
/// client.
pub(crate) async fn deliver(
    homes: &Homes,
    handler: &dyn TaskHandler,
    header: &TaskHeader,
    member: Option<Member>,
    mut outcome: TaskOutcome,
) -> Result<TaskOutcome, TaskError> {
    if let (false, Results::Backward { dk, dv, .. }) = (header.key_homes.is_empty(), &mut outcome.results) {
        let gradients = [std::mem::take(dk), std::mem::take(dv)];
        let sent = match member {
            Some(member) => member.give(homes, header, gradients).await?,
            None => {
                let (kv, position) = (header.task.kv(), header.position);
                homes.deliver(header, Delivery { kv, position, summed: Vec::new(), gradients }).await?
            }
        };
        handler.count_bytes(0, sent);
    }
    Ok(outcome)
}

/// K and V as a home gave them out, if they are what the task reads.
fn fit(header: &TaskHeader, range: &KeyRange, keys: [TensorSlice; 2]) -> Result<[TensorSlice; 2], TaskError> {
    for (kind, slice) in [TensorKind::K, TensorKind::V].into_iter().zip(&keys) {
        let (tokens, row, expected) = (slice.tokens(), Row::of(slice), row_of(header, kind));
        if tokens != range.tokens || row != expected {
            return Err(TaskError::internal(format!(
                "it has {kind} of tokens {tokens} as {row}, and {range} are to be {expected}"
            )));
        }
    }
    Ok(keys)
}

/// The elements of an f32 tensor.
fn values(part: &TensorSlice) -> Result<Vec<f32>, TaskError> {
    let view = part.view().f32("gradient")?;
    let tokens = 0..part.tokens().len();
    let mut values = Vec::with_capacity(tokens.len() * part.heads() * part.dim());
    tokens.for_each(|token| values.extend_from_slice(view.token(token)));
    Ok(values)
}

/// What went wrong at a home. That says nothing about the server that found out, which may try again, and others too;
/// unless the home itself will never have what is asked.
pub(crate) fn named(error: TaskError, home: &KeyHome, doing: &str) -> TaskError {
    let retry = match error.kind {
        ErrorKind::Invalid | ErrorKind::NotFound | ErrorKind::Unsupported => RetryHint::Never,
        _ => RetryHint::Later,
    };
    let KeyHome { rank, address, .. } = home;
    let message = format!("rank {rank}, home of keys at {address}: {doing}: {}", error.message);
    TaskError { kind: ErrorKind::Aborted, message, retry }
}
