//! Ships requests to their servers and awaits every result; what a server loses or refuses goes to another.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use outboard_attention::kernel::Results;
use outboard_proto::{ErrorKind, RetryHint, TaskError};
use outboard_transport::{Pending, TaskOutcome};

use crate::assemble::Part;
use crate::peers::{Load, Peer, least_busy};
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
    /// Ids of servers found lost, in the order found.
    pub(crate) servers_lost: Mutex<Vec<u64>>,
}

/// What dispatching needs to know.
pub(crate) struct Dispatch<'a> {
    pub(crate) rank: u32,
    pub(crate) numerics_id: &'a str,
    /// Servers that may compute the tasks, planned and spare, by id.
    pub(crate) peers: &'a BTreeMap<u64, Arc<Peer>>,
    pub(crate) counters: &'a DispatchCounters,
    /// How long a task may take, however often it is sent.
    pub(crate) limit: Duration,
    /// Since when: the call, or the time when all homes had their keys.
    pub(crate) began: Mutex<Instant>,
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
    load: Load,
    shipped: Instant,
    /// How often it was sent.
    sends: u32,
    /// How often the present server was too full for it.
    busy: u32,
    /// Servers that failed it, with their errors.
    tried: Vec<(u64, String)>,
}

impl Dispatch<'_> {
    /// Ships all requests and returns their results in the same order. Those whose keys servers fetch are shipped once
    /// `gate` resolves: then all homes have them.
    pub(crate) async fn run(
        &self,
        call: &LayerCall,
        requests: Vec<PlacedRequest>,
        gate: impl Future<Output = Result<(), WorkerError>>,
    ) -> Result<Dispatched, WorkerError> {
        let mut communication = Duration::ZERO;
        let mut results: Vec<Option<Results>> = requests.iter().map(|_| None).collect();
        let mut flights: FuturesUnordered<BoxFuture<'_, Landed>> = FuturesUnordered::new();
        let (at_homes, here): (Vec<usize>, Vec<usize>) =
            (0..requests.len()).partition(|&i| requests[i].part.kv_row.is_none());
        self.take_off(&requests, here, &mut flights)?;
        let mut gate = Box::pin(gate.fuse());
        let mut waiting = (!at_homes.is_empty()).then_some(at_homes);
        loop {
            let landed = tokio::select! {
                biased;
                open = &mut gate, if waiting.is_some() => {
                    open?;
                    *self.began.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
                    self.take_off(&requests, waiting.take().unwrap_or_default(), &mut flights)?;
                    continue;
                }
                landed = flights.next(), if !flights.is_empty() => landed,
                else => break,
            };
            let Some((flight, outcome)) = landed else { continue };
            let request = &requests[flight.index];
            match outcome {
                Ok(outcome) => {
                    if !flight.load.peer().in_place {
                        let there = outcome.queued + outcome.compute;
                        communication = communication.max(flight.shipped.elapsed().saturating_sub(there));
                    }
                    results[flight.index] = Some(self.accept(call, request, &flight, outcome)?);
                }
                Err(error) => {
                    let (flight, wait) = self.next_try(request, flight, error)?;
                    flights.push(Box::pin(self.send(request, flight, wait)));
                }
            }
        }
        drop(flights);
        let with_result = |(request, result): (PlacedRequest, Option<Results>)| match result {
            Some(result) => Ok((request.part, result)),
            None => Err(call.no_result(&request.part.task)),
        };
        let results = requests.into_iter().zip(results).map(with_result).collect::<Result<_, _>>()?;
        Ok(Dispatched { results, communication })
    }

    /// Ships requests; those whose server is lost go to others.
    fn take_off<'f>(
        &'f self,
        requests: &'f [PlacedRequest],
        indices: Vec<usize>,
        flights: &mut FuturesUnordered<BoxFuture<'f, Landed>>,
    ) -> Result<(), WorkerError> {
        // Asked once: another thread may find a server lost, or back, meanwhile.
        let (flying, grounded): (Vec<usize>, Vec<usize>) =
            indices.into_iter().partition(|&i| self.peer(&requests[i]).is_some());
        for (flight, pending) in self.ship_all(requests, flying) {
            flights.push(Box::pin(land(flight, pending)));
        }
        // Tasks whose server was lost in an earlier call of the step never took off.
        for index in grounded {
            let request = &requests[index];
            let tried = vec![(request.server, "lost earlier".to_owned())];
            let flight = Flight { tried, ..Flight::new(index, request, self.other(request, &[])?) };
            flights.push(Box::pin(self.send(request, flight, Duration::ZERO)));
        }
        Ok(())
    }

    /// Ships each server's requests together, other machines first, so that transfer begins while this one computes.
    fn ship_all(&self, requests: &[PlacedRequest], flying: Vec<usize>) -> Vec<(Flight, Pending)> {
        let mut by_peer: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        for index in flying {
            by_peer.entry(requests[index].server).or_default().push(index);
        }
        let mut shipments: Vec<_> = by_peer
            .into_values()
            .filter_map(|of_peer| Some((self.peers.get(&requests[*of_peer.first()?].server)?, of_peer)))
            .collect();
        shipments.sort_by_key(|(peer, _)| (peer.in_place, peer.id));
        let mut shipped = Vec::with_capacity(requests.len());
        for (peer, indices) in shipments {
            let flights: Vec<_> = indices
                .iter()
                .map(|&i| Flight { sends: 1, ..Flight::new(i, &requests[i], Arc::clone(peer)) })
                .collect();
            let shipment = indices.iter().map(|&i| requests[i].request.clone()).collect();
            shipped.extend(flights.into_iter().zip(peer.transport.ship(shipment)));
        }
        shipped
    }

    /// The planned server of a task, unless it is lost.
    fn peer(&self, request: &PlacedRequest) -> Option<&Arc<Peer>> {
        self.peers.get(&request.server).filter(|peer| !peer.is_lost())
    }

    fn accept(
        &self,
        call: &LayerCall,
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
        if outcome.results.direction() != request.request.header.direction {
            return Err(call.no_result(&request.part.task));
        }
        flight.load.peer().computed(outcome.compute);
        Ok(outcome.results)
    }

    /// Where a failed task goes next, and after what wait: to the same server if that is merely full, else to another.
    fn next_try(
        &self,
        request: &PlacedRequest,
        mut flight: Flight,
        error: TaskError,
    ) -> Result<(Flight, Duration), WorkerError> {
        if error.retry == RetryHint::Never {
            let task = request.request.header.name();
            return Err(WorkerError::Refused { rank: self.rank, task, source: error });
        }
        if error.retry == RetryHint::Later && flight.busy < BUSY_RETRIES {
            let wait = BUSY_WAIT * 2u32.pow(flight.busy);
            flight.busy += 1;
            return Ok((flight, wait));
        }
        // A task that was late says nothing certain about its server; a connection that broke does.
        if error.kind == ErrorKind::Unavailable && flight.load.peer().lose() {
            let Peer { id, address, .. } = &**flight.load.peer();
            self.counters.servers_lost.lock().unwrap_or_else(PoisonError::into_inner).push(*id);
            tracing::warn!(rank = self.rank, server = id, address, %error, "server lost; its tasks go to the others");
        }
        flight.tried.push((flight.load.peer().id, error.message.clone()));
        let peer = self.other(request, &flight.tried)?;
        flight.load = Load::new(peer, flight.load.flops());
        flight.busy = 0;
        Ok((flight, Duration::ZERO))
    }

    /// Sends one task after a wait, with what is left of its time.
    async fn send(&self, request: &PlacedRequest, mut flight: Flight, wait: Duration) -> Landed {
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        let mut again = request.request.clone();
        let began = *self.began.lock().unwrap_or_else(PoisonError::into_inner);
        let left = self.limit.saturating_sub(began.elapsed());
        if left.is_zero() {
            let limit = again.header.deadline.unwrap_or_default();
            let late = TaskError::deadline("the task, sent to one server after another,", limit);
            return (flight, Err(TaskError { retry: RetryHint::Never, ..late }));
        }
        again.header.deadline = Some(left);
        again.header.attempt = flight.sends;
        self.counters.resent.fetch_add(u64::from(flight.sends > 0), Ordering::Relaxed);
        flight.sends += 1;
        flight.shipped = Instant::now();
        let pending = flight.load.peer().transport.ship(vec![again]).pop();
        let unanswered = || Pending::failed(TaskError::internal("the transport gave no answer for a task"));
        land(flight, pending.unwrap_or_else(unanswered)).await
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

/// A task that came back, or failed.
type Landed = (Flight, Result<TaskOutcome, TaskError>);

impl Flight {
    fn new(index: usize, request: &PlacedRequest, peer: Arc<Peer>) -> Flight {
        let header = &request.request.header;
        let flops = header.task.flops(&header.geometry, header.direction);
        let load = Load::new(peer, flops);
        Flight { index, load, shipped: Instant::now(), sends: 0, busy: 0, tried: Vec::new() }
    }
}

async fn land(flight: Flight, pending: Pending) -> Landed {
    let outcome = pending.await;
    (flight, outcome)
}
