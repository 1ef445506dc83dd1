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
    /// `NOT_LOST`, or the step from which on a plan that lists the server shows that it is back.
    lost_before: AtomicU64,
    lost_unreported: AtomicBool,
    /// FLOPs shipped and not yet answered.
    outstanding: AtomicU64,
    tasks: AtomicU64,
    compute_nanos: AtomicU64,
}

/// Work on its way to a server, counted for as long as this lives.
pub(crate) struct Load {
    peer: Arc<Peer>,
    flops: f64,
}

/// Value of `lost_before` of a server in use.
const NOT_LOST: u64 = 0;

/// All servers met in a job. A server that was lost is reported once, and is used again when a plan that was submitted
/// after the report lists it: then the coordinator has heard from it since.
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
            lost_before: AtomicU64::new(NOT_LOST),
            lost_unreported: AtomicBool::new(false),
            outstanding: AtomicU64::new(0),
            tasks: AtomicU64::new(0),
            compute_nanos: AtomicU64::new(0),
        }
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost_before.load(Ordering::Relaxed) != NOT_LOST
    }

    /// Marks the server lost; true when it was not before.
    pub(crate) fn lose(&self) -> bool {
        let was_in_use = self
            .lost_before
            .compare_exchange(NOT_LOST, u64::MAX, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok();
        if was_in_use {
            self.lost_unreported.store(true, Ordering::Relaxed);
        }
        was_in_use
    }

    /// Tells that the plan of `step` lists the server.
    pub(crate) fn listed(&self, step: u64) {
        if step >= self.lost_before.load(Ordering::Relaxed) {
            self.lost_before.store(NOT_LOST, Ordering::Relaxed);
        }
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

    /// What each server did since the last report. Steps from `next_step` on are not submitted yet.
    pub(crate) fn take_reports(&self, next_step: u64) -> Vec<ServerReport> {
        let report = |peer: &Arc<Peer>| {
            let lost = peer.lost_unreported.swap(false, Ordering::Relaxed);
            if lost {
                peer.lost_before.store(next_step.max(NOT_LOST + 1), Ordering::Relaxed);
            }
            ServerReport {
                server_id: peer.id,
                tasks: peer.tasks.swap(0, Ordering::Relaxed),
                compute_seconds: peer.compute_nanos.swap(0, Ordering::Relaxed) as f64 / 1e9,
                lost,
            }
        };
        self.all().iter().map(report).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Peer>>> {
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Load {
    pub(crate) fn new(peer: Arc<Peer>, flops: f64) -> Load {
        peer.outstanding.fetch_add(flops as u64, Ordering::Relaxed);
        Load { peer, flops }
    }

    pub(crate) fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    pub(crate) fn flops(&self) -> f64 {
        self.flops
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.peer.outstanding.fetch_sub(self.flops as u64, Ordering::Relaxed);
    }
}

/// Of the servers that may take a task over, the one with the least work outstanding; the lowest id among equals.
pub(crate) fn least_busy<'a>(candidates: impl Iterator<Item = &'a Arc<Peer>>) -> Option<&'a Arc<Peer>> {
    candidates.min_by_key(|peer| (peer.outstanding(), peer.id))
}
