//! The attention servers a rank knows: how to reach each, what it is doing, and which are lost.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outboard_proto::v1::{ServerInfo, ServerReport};
use outboard_transport::{Traffic, Transport};

/// One server.
pub(crate) struct Peer {
    pub(crate) id: u64,
    /// For people: where it is.
    pub(crate) address: String,
    pub(crate) transport: Box<dyn Transport>,
    pub(crate) in_place: bool,
    lost: AtomicBool,
    /// FLOPs shipped and not yet answered.
    outstanding: AtomicU64,
    tasks: AtomicU64,
    compute_nanos: AtomicU64,
}

/// All servers met in a job. A server once lost stays lost under its id: when it comes back it registers anew, and gets
/// a new one.
#[derive(Default)]
pub(crate) struct Peers {
    by_id: Mutex<BTreeMap<u64, Arc<Peer>>>,
}

impl Peer {
    pub(crate) fn new(info: &ServerInfo, in_place: bool, transport: Box<dyn Transport>) -> Peer {
        Peer {
            id: info.id,
            address: info.address.clone(),
            transport,
            in_place,
            lost: AtomicBool::new(false),
            outstanding: AtomicU64::new(0),
            tasks: AtomicU64::new(0),
            compute_nanos: AtomicU64::new(0),
        }
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Marks the server lost; true when it was not before.
    pub(crate) fn lose(&self) -> bool {
        !self.lost.swap(true, Ordering::Relaxed)
    }

    pub(crate) fn shipped(&self, flops: f64) {
        self.outstanding.fetch_add(flops as u64, Ordering::Relaxed);
    }

    pub(crate) fn ended(&self, flops: f64) {
        self.outstanding.fetch_sub(flops as u64, Ordering::Relaxed);
    }

    pub(crate) fn computed(&self, time: Duration) {
        self.tasks.fetch_add(1, Ordering::Relaxed);
        self.compute_nanos.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    fn outstanding(&self) -> u64 {
        self.outstanding.load(Ordering::Relaxed)
    }
}

impl Peers {
    /// The server of this id, met now if it was not before.
    pub(crate) fn meet<E>(&self, id: u64, new: impl FnOnce() -> Result<Peer, E>) -> Result<Arc<Peer>, E> {
        let mut by_id = self.lock();
        if let Some(peer) = by_id.get(&id) {
            return Ok(Arc::clone(peer));
        }
        let peer = Arc::new(new()?);
        by_id.insert(id, Arc::clone(&peer));
        Ok(peer)
    }

    /// All servers, by id.
    pub(crate) fn all(&self) -> Vec<Arc<Peer>> {
        self.lock().values().cloned().collect()
    }

    /// Tensor bytes moved to and from all servers so far.
    pub(crate) fn traffic(&self) -> Traffic {
        self.all().iter().map(|peer| peer.transport.traffic()).fold(Traffic::default(), |a, b| Traffic {
            sent: a.sent + b.sent,
            received: a.received + b.received,
        })
    }

    /// What each server did since the last report.
    pub(crate) fn take_reports(&self) -> Vec<ServerReport> {
        let report = |peer: &Arc<Peer>| ServerReport {
            server_id: peer.id,
            tasks: peer.tasks.swap(0, Ordering::Relaxed),
            compute_seconds: peer.compute_nanos.swap(0, Ordering::Relaxed) as f64 / 1e9,
            lost: peer.is_lost(),
        };
        self.all().iter().map(report).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Peer>>> {
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Of the servers that may take a task over, the one with the least work outstanding; the lowest id among equals.
pub(crate) fn least_busy<'a>(candidates: impl Iterator<Item = &'a Arc<Peer>>) -> Option<&'a Arc<Peer>> {
    candidates.min_by_key(|peer| (peer.outstanding(), peer.id))
}
