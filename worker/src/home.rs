//! A rank's home: gives out the keys it holds to servers that compute for others, and gathers the gradients that these
//! deliver.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use outboard_attention::{Elements, HeadGeometry, TensorLayout, TensorSlice};
use outboard_proto::{ErrorKind, GradientHeader, KeyRange, LayerRef, RetryHint, TaskError};
use outboard_transport::grpc::{CancellationToken, LinkConfig, serve_home};
use outboard_transport::{HomeHandler, Homes, KeyGradient};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::plan::{Share, ShareKey, Shares};
use crate::{LayerCall, Qkv, WorkerError};

/// A rank's home service. Every rank of a job with placement has one; it ends when it is dropped.
#[derive(Debug)]
pub struct Home {
    address: String,
    pub(crate) store: Arc<HomeStore>,
    stop: CancellationToken,
}

/// What a rank holds for others, step by step.
#[derive(Debug)]
pub(crate) struct HomeStore {
    state: Mutex<State>,
    /// Rung at every change.
    changed: watch::Sender<()>,
    received: AtomicU64,
    sent: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    member: Option<Member>,
    /// The first step that is not over.
    first_step: u64,
    /// What is delivered in each step, as planned.
    shares: BTreeMap<u64, Arc<Shares>>,
    layers: BTreeMap<LayerRef, Layer>,
    /// Why the rank gives out nothing any more.
    closed: Option<String>,
}

/// Whose home it is.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) job: String,
    pub(crate) rank: u32,
    pub(crate) geometry: HeadGeometry,
}

#[derive(Debug, Default)]
struct Layer {
    keys: Option<(LayerCall, Elements, Elements)>,
    delivered: BTreeMap<ShareKey, Delivered>,
    /// True once the rank has taken what was delivered.
    taken: bool,
}

/// What has come of a share.
#[derive(Debug, Default)]
struct Delivered {
    sum: Option<KeyGradient>,
    /// By position.
    tasks: BTreeMap<u32, KeyGradient>,
}

impl Delivered {
    /// True when all of the share has come. A task that was sent again after its sum had come brings nothing new.
    fn is_whole(&self, share: &Share) -> bool {
        self.sum.is_some() || self.tasks.len() >= share.tasks.len()
    }

    fn take(&mut self, gradient: KeyGradient) {
        if gradient.header.summed > 0 {
            self.tasks.clear();
            self.sum.get_or_insert(gradient);
        } else if self.sum.is_none() {
            self.tasks.entry(gradient.header.position).or_insert(gradient);
        }
    }

    fn into_gradients(self) -> impl Iterator<Item = KeyGradient> {
        self.sum.into_iter().chain(self.tasks.into_values())
    }
}

impl Home {
    /// Listens; a port of 0 takes any. Others reach the home at `advertise`, "host:port", by default where it listens.
    ///
    /// # Errors
    /// [`WorkerError::Home`] when the address cannot be listened on.
    pub fn listen(
        listen: SocketAddr,
        advertise: Option<String>,
        runtime: &Handle,
    ) -> Result<Home, WorkerError> {
        let failed = |source| WorkerError::Home { address: listen, source };
        let listener = TcpListener::bind(listen).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        if advertise.is_none() && address.ip().is_unspecified() {
            let message = "no other process could reach it there; name the address to advertise";
            return Err(failed(std::io::Error::new(std::io::ErrorKind::InvalidInput, message)));
        }
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener).map_err(failed)?
        };
        let (store, stop) = (Arc::new(HomeStore::default()), CancellationToken::new());
        let serving = serve_home(listener, Arc::clone(&store) as _, LinkConfig::default(), stop.clone());
        runtime.spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(%address, %error, "the rank's home serves no more");
            }
        });
        Ok(Home { address: advertise.unwrap_or_else(|| address.to_string()), store, stop })
    }

    /// Where others reach it, "host:port".
    pub fn address(&self) -> &str {
        &self.address
    }

    /// This process's way to all homes, for its in-place server.
    pub fn homes(&self) -> Homes {
        Homes::beside(self.address.clone(), Arc::clone(&self.store) as _)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.store.close("the rank has left the job");
        self.stop.cancel();
    }
}

/// True when two tensors are the same, NaNs included.
fn same_bits(a: &Elements, b: &Elements) -> bool {
    let (x, y) = (a.values(), b.values());
    a.dtype() == b.dtype()
        && x.len() == y.len()
        && (x.as_ptr() == y.as_ptr() || x.iter().zip(&*y).all(|(x, y)| x.to_bits() == y.to_bits()))
}

impl Default for HomeStore {
    fn default() -> HomeStore {
        let (changed, _) = watch::channel(());
        HomeStore { state: Mutex::default(), changed, received: AtomicU64::new(0), sent: AtomicU64::new(0) }
    }
}

impl HomeStore {
    /// Says whose home it is.
    pub(crate) fn begin(&self, member: Member) {
        self.lock().member = Some(member);
        self.changed.send_replace(());
    }

    /// Notes what servers will deliver in a step.
    pub(crate) fn expect(&self, step: u64, shares: Shares) {
        self.lock().shares.insert(step, Arc::new(shares));
        self.changed.send_replace(());
    }

    /// Gives out the keys of a layer from now on, until the step is over.
    ///
    /// # Errors
    /// When the layer had other keys before in the step: ranks may have read those. The same once more, as of activations
    /// that are computed again, changes nothing.
    pub(crate) fn publish(&self, call: &LayerCall, qkv: &Qkv) -> Result<(), TaskError> {
        let mut state = self.lock();
        let name = state.layer_of(call);
        let keys = &mut state.layers.entry(name.clone()).or_default().keys;
        let Some((_, k, v)) = keys.clone() else {
            *keys = Some((call.clone(), qkv.k.clone(), qkv.v.clone()));
            drop(state);
            self.changed.send_replace(());
            return Ok(());
        };
        drop(state);
        if same_bits(&k, &qkv.k) && same_bits(&v, &qkv.v) {
            return Ok(());
        }
        let message = format!(
            "{name}: the rank has given out other keys of it before; a layer whose documents ranks share has one set of keys a step"
        );
        Err(TaskError::invalid(message))
    }

    /// All that was to be delivered of a layer, waiting for what has not come.
    pub(crate) async fn delivered(
        &self,
        call: &LayerCall,
        limit: Duration,
    ) -> Result<Vec<KeyGradient>, TaskError> {
        let mut changes = self.changed.subscribe();
        let until = Instant::now() + limit;
        loop {
            let missing = {
                let mut state = self.lock();
                let name = state.layer_of(call);
                let unknown = || TaskError::invalid(format!("{name}: the step is over, or not planned"));
                let shares = state.shares.get(&call.step).cloned().ok_or_else(unknown)?;
                let Some(expected) = shares.get(&call.tick) else { return Ok(Vec::new()) };
                let layer = state.layers.entry(name.clone()).or_default();
                if layer.taken {
                    let message = format!(
                        "{name}: the gradients of its keys were taken before; a layer whose documents ranks share goes backward once a step"
                    );
                    return Err(TaskError::invalid(message));
                }
                let whole =
                    |key, share| layer.delivered.get(key).is_some_and(|d: &Delivered| d.is_whole(share));
                let mut missing = expected.iter().filter(|(key, share)| !whole(*key, *share));
                match missing.next() {
                    None => {
                        layer.taken = true;
                        let delivered = std::mem::take(&mut layer.delivered).into_values();
                        return Ok(delivered.flat_map(Delivered::into_gradients).collect());
                    }
                    Some((_, share)) => (share.clone(), 1 + missing.count()),
                }
            };
            let late = |_| {
                let (Share { document, tokens, owner, .. }, count) = &missing;
                let message = format!(
                    "{count} shares of its keys' gradients did not come within {:.1} s, among them that of document {document}, \
                     keys {tokens}, for queries of rank {owner}; see whether that rank is lost or stuck",
                    limit.as_secs_f64()
                );
                TaskError::new(ErrorKind::DeadlineExceeded, message)
            };
            // The sender lives in `self`, so that a change is all that can come.
            let _ = timeout_at(until, changes.changed()).await.map_err(late)?;
        }
    }

    /// Forgets a step and all before it.
    pub(crate) fn finish(&self, step: u64) {
        let mut state = self.lock();
        state.first_step = state.first_step.max(step + 1);
        let first = state.first_step;
        state.layers.retain(|layer, _| layer.step >= first);
        state.shares.retain(|&step, _| step >= first);
        drop(state);
        self.changed.send_replace(());
    }

    /// Gives out nothing from now on; whoever waits learns why.
    pub(crate) fn close(&self, why: &str) {
        let mut state = self.lock();
        state.closed.get_or_insert_with(|| why.to_owned());
        state.layers.clear();
        drop(state);
        self.changed.send_replace(());
    }

    /// Tensor bytes that came and went.
    pub(crate) fn traffic(&self) -> u64 {
        self.received.load(Ordering::Relaxed) + self.sent.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn layer_of(&self, call: &LayerCall) -> LayerRef {
        let job = self.member.as_ref().map_or_else(String::new, |member| member.job.clone());
        LayerRef { job, step: call.step, layer: call.layer, tick: call.tick }
    }

    /// The layer, once its keys are here; `None` while they may come.
    fn with_keys(&self, name: &LayerRef) -> Result<Option<&(LayerCall, Elements, Elements)>, TaskError> {
        if let Some(why) = &self.closed {
            return Err(TaskError::new(ErrorKind::Aborted, why.clone()));
        }
        let Some(member) = &self.member else { return Ok(None) };
        if name.job != member.job {
            let message =
                format!("this is rank {} of job {}; {name} is none of its own", member.rank, member.job);
            return Err(TaskError::new(ErrorKind::NotFound, message));
        }
        if name.step < self.first_step {
            let message =
                format!("rank {} has finished step {}, and forgotten its keys", member.rank, name.step);
            return Err(TaskError::new(ErrorKind::NotFound, message));
        }
        Ok(self.layers.get(name).and_then(|layer| layer.keys.as_ref()))
    }

    /// The share that a delivery is, or is a part of.
    fn share(&self, header: &GradientHeader) -> Result<(ShareKey, &Share), TaskError> {
        let GradientHeader { range, group, position, summed } = header;
        let LayerRef { step, tick, .. } = range.layer;
        if self.with_keys(&range.layer)?.is_none() && !self.shares.contains_key(&step) {
            let message = format!("the rank has no plan of step {step} yet");
            return Err(TaskError {
                retry: RetryHint::Elsewhere,
                ..TaskError::new(ErrorKind::Busy, message)
            });
        }
        let shares = self.shares.get(&step).and_then(|shares| shares.get(&tick));
        let upto = (*group, range.tokens.start());
        let share = shares.and_then(|shares| shares.range((*group, 0)..=upto).next_back());
        let fits = |(_, share): &(&ShareKey, &Share)| {
            // The sum of some of them would pass for that of all.
            let expected = match *summed as usize {
                0 => share.tasks.get(position),
                tasks => Some(&share.tokens).filter(|_| tasks == share.tasks.len()),
            };
            let same = (share.document, share.kv_heads) == (range.document, range.kv_heads);
            same && expected == Some(&range.tokens)
        };
        let unknown = || {
            let what = match summed {
                0 => format!("share of task {position}"),
                tasks => format!("sum of {tasks} tasks"),
            };
            TaskError::invalid(format!("{range}: no such {what} of group {group} is planned here"))
        };
        share.filter(fits).map(|(key, share)| (*key, share)).ok_or_else(unknown)
    }

    fn dims(&self, share: &Share) -> [usize; 2] {
        let dims = |member: &Member| [member.geometry.head_dim(), member.geometry.v_head_dim()];
        self.member.as_ref().map_or([0, 0], dims).map(|dim| dim * share.kv_heads.len())
    }
}

impl HomeHandler for HomeStore {
    fn await_keys(&self, layer: LayerRef, limit: Duration) -> BoxFuture<'_, Result<(), TaskError>> {
        let wait = async move {
            let mut changes = self.changed.subscribe();
            let until = Instant::now() + limit;
            while self.lock().with_keys(&layer)?.is_none() {
                let late = |_| {
                    let message = format!("it did not reach {layer} within {:.1} s", limit.as_secs_f64());
                    TaskError::new(ErrorKind::DeadlineExceeded, message)
                };
                let _ = timeout_at(until, changes.changed()).await.map_err(late)?;
            }
            Ok(())
        };
        wait.boxed()
    }

    fn keys(&self, range: &KeyRange) -> Result<[TensorSlice; 2], TaskError> {
        let state = self.lock();
        let KeyRange { layer, document, tokens, kv_heads } = range;
        let not_yet = || TaskError::new(ErrorKind::Busy, format!("{layer} is not computed here yet"));
        let (call, k, v) = state.with_keys(layer)?.ok_or_else(not_yet)?;
        let all = call.geometry.kv_heads();
        let row = call.row_of(*document, *tokens).filter(|_| kv_heads.end() <= all);
        let row = row.ok_or_else(|| TaskError::invalid(format!("{range}: these keys are not held here")))?;
        let slice = |name, elements: &Elements, dim: usize| {
            let offset = row * all * dim + kv_heads.start() * dim;
            let layout =
                TensorLayout { offset, stride: all * dim, tokens: *tokens, heads: kv_heads.len(), dim };
            TensorSlice::new(name, elements.clone(), layout)
        };
        Ok([slice("k", k, call.geometry.head_dim())?, slice("v", v, call.geometry.v_head_dim())?])
    }

    fn expected(&self, header: &GradientHeader) -> Result<[usize; 2], TaskError> {
        let state = self.lock();
        let (_, share) = state.share(header)?;
        Ok(state.dims(share))
    }

    fn take_gradient(&self, gradient: KeyGradient) -> Result<(), TaskError> {
        let mut state = self.lock();
        let (key, share) = state.share(&gradient.header)?;
        let tokens = gradient.header.range.tokens.len();
        let sizes = state.dims(share).map(|elements| elements * tokens);
        if sizes != [gradient.dk.len(), gradient.dv.len()] {
            let message = format!(
                "{}: dK and dV have {} and {} elements; {} and {} are needed",
                gradient.header.range,
                gradient.dk.len(),
                gradient.dv.len(),
                sizes[0],
                sizes[1]
            );
            return Err(TaskError::invalid(message));
        }
        let layer = state.layers.entry(gradient.header.range.layer.clone()).or_default();
        // A task that was sent again brings the same bits.
        if !layer.taken {
            layer.delivered.entry(key).or_default().take(gradient);
        }
        drop(state);
        self.changed.send_replace(());
        Ok(())
    }

    fn count_bytes(&self, received: u64, sent: u64) {
        self.received.fetch_add(received, Ordering::Relaxed);
        self.sent.fetch_add(sent, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
