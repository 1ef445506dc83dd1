//! Ships requests to their servers and awaits every result; what a server loses or refuses goes to another.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use outboard_attention::kernel::Results;
use outboard_proto::{ErrorKind, RetryHint, TaskError};
use outboard_transport::{Pending, TaskOutcome};

use crate::assemble::Part;
use crate::peers::{Peer, least_busy};
use crate::request::PlacedRequest;
use crate::{LayerCall, WorkerError};

/// How often a server that is full is asked again before the task goes elsewhere.
const BUSY_RETRIES: u32 = 5;
/// How long to wait before the first of these; each later wait is twice as long.
const BUSY_WAIT: Duration = Duration::from_millis(20);

/// Counts of what dispatching met with.
#[derive(Debug, Default)]
pub(crate) struct DispatchCounters {
    pub(crate) resent: AtomicU64,
    pub(crate) servers_lost: AtomicU64,
}

/// What dispatching needs to know.
pub(crate) struct Dispatch<'a> {
    pub(crate) rank: u32,
    pub(crate) numerics_id: &'a str,
    /// Servers that may compute the tasks, planned and spare, by id.
    pub(crate) peers: &'a BTreeMap<u64, Arc<Peer>>,
    pub(crate) counters: &'a DispatchCounters,
}

/// Results of all tasks in the order of their requests.
pub(crate) struct Dispatched {
    pub(crate) results: Vec<(Part, Results)>,
    /// The longest that tensors of one task, there and back, were on their way: its time with another machine less what
    /// it waited and was computed there.
    pub(crate) communication: Duration,
}

/// One task on its way.
struct Flight {
    index: usize,
    peer: Arc<Peer>,
    shipped: Instant,
    flops: f64,
    busy: u32,
    /// Servers that failed it, with their errors.
    tried: Vec<(u64, String)>,
}

impl Dispatch<'_> {
    /// Ships all requests and returns their results in the same order.
    pub(crate) async fn run(
        &self,
        call: &LayerCall,
        requests: Vec<PlacedRequest>,
    ) -> Result<Dispatched, WorkerError> {
        let mut communication = Duration::ZERO;
        let mut results: Vec<Option<Results>> = requests.iter().map(|_| None).collect();
        let mut flights: FuturesUnordered<_> = FuturesUnordered::new();
        for flight in self.ship_all(&requests)? {
            flights.push(land(flight.0, flight.1));
        }
        while let Some((flight, outcome)) = flights.next().await {
            flight.peer.ended(flight.flops);
            let request = &requests[flight.index];
            match outcome {
                Ok(outcome) => {
                    if !flight.peer.in_place {
                        let there = outcome.queued + outcome.compute;
                        communication = communication.max(flight.shipped.elapsed().saturating_sub(there));
                    }
                    results[flight.index] = Some(self.accept(request, &flight, outcome)?);
                }
                Err(error) => {
                    let (flight, pending) = self.retry(request, flight, error).await?;
                    flights.push(land(flight, pending));
                }
            }
        }
        let with_result = |(request, result): (PlacedRequest, Option<Results>)| match result {
            Some(result) => Ok((request.part, result)),
            None => Err(call.no_result(&request.part.task)),
        };
        let results = requests.into_iter().zip(results).map(with_result).collect::<Result<_, _>>()?;
        Ok(Dispatched { results, communication })
    }

    /// Ships each server's requests together, other machines first, so that transfer begins while this one computes.
    fn ship_all(&self, requests: &[PlacedRequest]) -> Result<Vec<(Flight, Pending)>, WorkerError> {
        let mut by_peer: BTreeMap<(bool, u64), (Arc<Peer>, Vec<usize>)> = BTreeMap::new();
        let mut homeless = Vec::new();
        for (index, request) in requests.iter().enumerate() {
            match self.peers.get(&request.server).filter(|peer| !peer.is_lost()) {
                Some(peer) => {
                    let entry = by_peer.entry((peer.in_place, peer.id));
                    entry.or_insert_with(|| (Arc::clone(peer), Vec::new())).1.push(index);
                }
                None => homeless.push(index),
            }
        }
        let mut shipped = Vec::with_capacity(requests.len());
        for (peer, indices) in by_peer.into_values() {
            let flights = indices.iter().map(|&i| {
                let flight = Flight::new(i, &requests[i], Arc::clone(&peer));
                flight.peer.shipped(flight.flops);
                flight
            });
            let flights: Vec<_> = flights.collect();
            let shipment = indices.iter().map(|&i| requests[i].request.clone()).collect();
            shipped.extend(flights.into_iter().zip(peer.transport.ship(shipment)));
        }
        for index in homeless {
            let request = &requests[index];
            let tried = vec![(request.server, "lost earlier".to_owned())];
            let peer = self.other(request, &tried)?;
            shipped.push(self.resend(request, Flight { tried, ..Flight::new(index, request, peer) }));
        }
        Ok(shipped)
    }

    fn accept(
        &self,
        request: &PlacedRequest,
        flight: &Flight,
        outcome: TaskOutcome,
    ) -> Result<Results, WorkerError> {
        if *outcome.numerics_id != *self.numerics_id {
            return Err(WorkerError::NumericsChanged {
                rank: self.rank,
                task: request.request.header.name(),
                expected: self.numerics_id.to_owned(),
                actual: outcome.numerics_id.to_string(),
            });
        }
        flight.peer.computed(outcome.compute);
        Ok(outcome.results)
    }

    /// Sends a failed task again, to the same server if it is merely full, else to another.
    async fn retry(
        &self,
        request: &PlacedRequest,
        mut flight: Flight,
        error: TaskError,
    ) -> Result<(Flight, Pending), WorkerError> {
        let task = request.request.header.name();
        if error.retry == RetryHint::Never {
            return Err(WorkerError::Refused { rank: self.rank, task, source: error });
        }
        if error.retry == RetryHint::Later && flight.busy < BUSY_RETRIES {
            tokio::time::sleep(BUSY_WAIT * 2u32.pow(flight.busy)).await;
            flight.busy += 1;
            return Ok(self.resend(request, flight));
        }
        if matches!(error.kind, ErrorKind::Unavailable | ErrorKind::DeadlineExceeded) && flight.peer.lose() {
            self.counters.servers_lost.fetch_add(1, Ordering::Relaxed);
            let Peer { id, address, .. } = &*flight.peer;
            tracing::warn!(rank = self.rank, server = id, address, %error, "server lost; its tasks go to the others");
        }
        flight.tried.push((flight.peer.id, error.message));
        flight.peer = self.other(request, &flight.tried)?;
        flight.busy = 0;
        Ok(self.resend(request, flight))
    }

    fn resend(&self, request: &PlacedRequest, mut flight: Flight) -> (Flight, Pending) {
        flight.shipped = Instant::now();
        self.counters.resent.fetch_add(1, Ordering::Relaxed);
        let mut again = request.request.clone();
        again.header.attempt = flight.tried.len() as u32 + flight.busy;
        flight.peer.shipped(flight.flops);
        let pending = flight.peer.transport.ship(vec![again]).pop();
        let lost = || Pending::failed(TaskError::internal("the transport gave no answer for a task"));
        (flight, pending.unwrap_or_else(lost))
    }

    /// Another server for a task that those of `tried` failed.
    fn other(&self, request: &PlacedRequest, tried: &[(u64, String)]) -> Result<Arc<Peer>, WorkerError> {
        let untried = |peer: &&Arc<Peer>| !peer.is_lost() && tried.iter().all(|(id, _)| *id != peer.id);
        least_busy(self.peers.values().filter(untried)).cloned().ok_or_else(|| {
            let tried = tried.iter().map(|(id, error)| format!("server {id} ({error})"));
            WorkerError::NoServerLeft {
                rank: self.rank,
                task: request.request.header.name(),
                tried: tried.collect::<Vec<_>>().join(", "),
            }
        })
    }
}

impl Flight {
    fn new(index: usize, request: &PlacedRequest, peer: Arc<Peer>) -> Flight {
        let header = &request.request.header;
        let flops = header.task.flops(&header.geometry, header.direction);
        Flight { index, peer, shipped: Instant::now(), flops, busy: 0, tried: Vec::new() }
    }
}

async fn land(flight: Flight, pending: Pending) -> (Flight, Result<TaskOutcome, TaskError>) {
    let outcome = pending.await;
    (flight, outcome)
}
