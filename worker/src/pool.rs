//! Core attention through the pool.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use outboard_attention::Document;
use outboard_attention::kernel::Results;
use outboard_proto::v1::{PlanSummary, ServerInfo};
use outboard_proto::{KeyHome, LayerRef, TaskError};
use outboard_transport::grpc::{ClientConfig, GrpcTransport};
use outboard_transport::{Homes, InProcess, KeyGradient, TaskHandler, Traffic, Transport};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

use crate::assemble::{Part, merge_outputs, sum_gradients};
use crate::dispatch::{Dispatch, DispatchCounters};
use crate::home::{Home, Member};
use crate::job::{Job, StepReport};
use crate::peers::{Peer, Peers};
use crate::plan::{Holding, RankPlan};
use crate::request::{Shipping, requests};
use crate::{Attended, CoreAttention, JobOptions, LayerCall, OutputGradient, Qkv, QkvGradient, WorkerError};

/// Most steps submitted ahead of the one in hand.
const MAX_STEPS_AHEAD: usize = 4;

/// A rank's way to the pool: a joined job, its plans, and connections to the servers.
///
/// Its blocking calls must come from a thread that is not of the async runtime.
pub struct PoolAttention {
    job: Job,
    runtime: Handle,
    in_place: Option<Arc<dyn TaskHandler>>,
    /// In a job with placement, and the way to the other ranks'.
    home: Option<(Home, Homes)>,
    peers: Peers,
    counters: DispatchCounters,
    submissions: mpsc::Sender<Submission>,
    steps: Mutex<BTreeMap<u64, Step>>,
}

/// A step on its way to the coordinator.
struct Submission {
    step: u64,
    documents: Vec<Document>,
    planned: oneshot::Sender<Result<RankPlan, WorkerError>>,
}

/// A submitted step.
enum Step {
    /// The coordinator has not answered yet.
    Waiting(oneshot::Receiver<Result<RankPlan, WorkerError>>),
    /// There is no plan, and why.
    Failed(String),
    /// Its plan, and what has been done of it.
    Planned(Arc<PlannedStep>),
}

struct PlannedStep {
    plan: RankPlan,
    /// The servers of the plan and those that may take over.
    peers: BTreeMap<u64, Arc<Peer>>,
    at_start: Totals,
    times: Mutex<Times>,
}

/// Counters when a step began.
#[derive(Clone, Copy, Default)]
struct Totals {
    traffic: Traffic,
    /// Bytes that the rank's home gave out and took.
    at_home: u64,
    resent: u64,
}

#[derive(Clone, Copy, Default)]
struct Times {
    tasks: u64,
    attention: Duration,
    exposed: Duration,
    communication: Duration,
}

/// What a step's attention took on this rank.
#[derive(Clone, Debug, PartialEq)]
pub struct StepStats {
    /// Facts about the whole plan.
    pub summary: PlanSummary,
    /// Where the plan puts the attention of this rank's documents, in order of server.
    pub placed: Vec<Placed>,
    /// Tasks of this rank's documents, over all layers and both directions.
    pub tasks: u64,
    /// Tasks sent again.
    pub tasks_resent: u64,
    /// Ids of the servers that this rank found lost since the step before ended.
    pub servers_lost: Vec<u64>,
    /// Tensor bytes that left and entered this rank as a client, and as a home of keys.
    pub bytes_moved: u64,
    /// Wall time inside attention calls.
    pub attention: Duration,
    /// Of that, the time in which this rank's own device computed no attention, for anybody.
    pub exposed: Duration,
    /// Time that tensors of this rank's tasks were on their way, those to and from homes of keys included: for each call
    /// that of the longest task, summed.
    pub communication: Duration,
}

/// What a plan puts on one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Id of the server.
    pub server: u64,
    /// The rank it shares a device with; `None` for a dedicated server.
    pub rank: Option<u32>,
    /// Cells of one layer and direction, each counted once per kv head.
    pub cells: u64,
}

impl PoolAttention {
    /// Joins a job; returns when all its ranks have. `in_place` is the handler of the server that shares this process,
    /// `home` the rank's own in a job with placement, and only there.
    ///
    /// # Errors
    /// [`WorkerError::Options`] for a home without placement or the other way round, [`WorkerError::Coordinator`] when the coordinator cannot be reached or refuses, or ranks or servers are missing.
    pub fn join(
        options: JobOptions,
        runtime: Handle,
        in_place: Option<Arc<dyn TaskHandler>>,
        home: Option<Home>,
    ) -> Result<PoolAttention, WorkerError> {
        if options.placement.is_some() != home.is_some() {
            let message = "a job with placement needs a home on every rank, and no other job does".to_owned();
            return Err(WorkerError::Options { job: options.job, rank: options.rank, message });
        }
        if let Some(home) = &home {
            let JobOptions { job, rank, geometry, .. } = &options;
            home.store.begin(Member { job: job.clone(), rank: *rank, geometry: *geometry });
        }
        let address = home.as_ref().map_or_else(String::new, |home| home.address().to_owned());
        let job = runtime.block_on(Job::join(options, address))?;
        let (submissions, queue) = mpsc::channel(MAX_STEPS_AHEAD);
        runtime.spawn(submit_in_order(job.clone(), queue));
        Ok(PoolAttention {
            job,
            runtime,
            in_place,
            home: home.map(|home| {
                let homes = home.homes();
                (home, homes)
            }),
            submissions,
            peers: Peers::default(),
            counters: DispatchCounters::default(),
            steps: Mutex::default(),
        })
    }

    /// Equal ids give equal bits; fixed for the job.
    pub fn numerics_id(&self) -> &str {
        self.job.numerics_id()
    }

    /// Submits this rank's documents of a step, best one step before it is used. Does not wait for the plan. With placement
    /// one rank may submit the whole global batch, the others none; documents may come without homes.
    ///
    /// # Errors
    /// [`WorkerError::BadPlan`] when more steps than a few are outstanding.
    pub fn submit_step(&self, step: u64, documents: Vec<Document>) -> Result<(), WorkerError> {
        let mut steps = self.lock_steps();
        if steps.contains_key(&step) {
            return Err(self.bad_plan(step, "it was submitted before".to_owned()));
        }
        let (planned, waiting) = oneshot::channel();
        let submission = Submission { step, documents, planned };
        if steps.len() >= MAX_STEPS_AHEAD || self.submissions.try_send(submission).is_err() {
            let message = format!("{} steps are submitted and not finished; finish one first", steps.len());
            return Err(self.bad_plan(step, message));
        }
        steps.insert(step, Step::Waiting(waiting));
        Ok(())
    }

    /// Waits until the step is planned and says what the plan is like.
    ///
    /// # Errors
    /// [`WorkerError::NotSubmitted`], or why there is no plan.
    pub fn await_plan(&self, step: u64) -> Result<PlanSummary, WorkerError> {
        Ok(self.planned(step)?.plan.summary)
    }

    /// What this rank holds of a step's documents, in order of document and token, once the step is planned. With
    /// placement it is this that the rank loads.
    ///
    /// # Errors
    /// [`WorkerError::NotSubmitted`], or why there is no plan.
    pub fn holdings(&self, step: u64) -> Result<Vec<Holding>, WorkerError> {
        Ok(self.planned(step)?.plan.holdings.clone())
    }

    /// Ends a step: reports it and says what its attention took. `seconds` is the step's wall time on this rank. With
    /// placement the rank gives out its keys of the step until now: end it once all ranks have their gradients, as they
    /// have when these were added up.
    ///
    /// # Errors
    /// [`WorkerError::NotSubmitted`], or when the report does not reach the coordinator.
    pub fn finish_step(&self, step: u64, seconds: f64) -> Result<StepStats, WorkerError> {
        let planned = self.planned(step)?;
        let next_step = {
            let mut steps = self.lock_steps();
            let newest = steps.last_key_value().map_or(step, |(&newest, _)| newest);
            steps.remove(&step);
            newest + 1
        };
        if let Some((home, _)) = &self.home {
            home.store.finish(step);
        }
        let (now, start) = (self.totals(), planned.at_start);
        let times = *planned.times.lock().unwrap_or_else(PoisonError::into_inner);
        let report = StepReport {
            step,
            seconds,
            exposed_seconds: times.exposed.as_secs_f64(),
            servers: self.peers.take_reports(next_step),
        };
        self.runtime.block_on(self.job.report(report))?;
        let bytes = |t: Totals| t.traffic.sent + t.traffic.received + t.at_home;
        Ok(StepStats {
            summary: planned.plan.summary,
            placed: planned.plan.placed(),
            tasks: times.tasks,
            tasks_resent: now.resent - start.resent,
            servers_lost: std::mem::take(
                &mut *self.counters.servers_lost.lock().unwrap_or_else(PoisonError::into_inner),
            ),
            bytes_moved: bytes(now) - bytes(start),
            attention: times.attention,
            exposed: times.exposed,
            communication: times.communication,
        })
    }

    /// Leaves the job. `reason` is for the other ranks; empty when the work is done.
    ///
    /// # Errors
    /// When the coordinator cannot be told.
    pub fn leave(&self, reason: &str) -> Result<(), WorkerError> {
        self.runtime.block_on(self.job.leave(reason.to_owned()))
    }

    fn run(
        &self,
        call: &LayerCall,
        qkv: &Qkv,
        gradient: Option<&OutputGradient>,
    ) -> Result<Vec<(Part, Results)>, WorkerError> {
        call.check(qkv).map_err(|e| call.invalid(e))?;
        gradient.map_or(Ok(()), |g| call.check_gradient(g)).map_err(|e| call.invalid(e))?;
        let started = Instant::now();
        let step = self.planned(call.step)?;
        let options = self.job.options();
        if call.geometry != options.geometry {
            let message = format!("the call has {:?}, the job {:?}", call.geometry, options.geometry);
            return Err(self.bad_plan(call.step, message));
        }
        step.plan.check_call(call).map_err(|message| self.bad_plan(call.step, message))?;
        if let (Some((home, _)), None) = (&self.home, gradient) {
            home.store.publish(call, qkv).map_err(|source| self.shared(call, source))?;
        }
        let busy_before = self.device_busy();
        let shipping = Shipping { options, numerics_id: self.job.numerics_id(), plan: &step.plan };
        let requests = requests(shipping, call, qkv, gradient).map_err(|e| call.invalid(e))?;
        let tasks = requests.len() as u64;
        let dispatch = Dispatch {
            rank: options.rank,
            numerics_id: self.job.numerics_id(),
            peers: &step.peers,
            counters: &self.counters,
            limit: options.task_timeout,
            began: Mutex::new(started),
        };
        // Backward, every home has given its keys out already.
        let elsewhere =
            if gradient.is_none() { self.homes_elsewhere(&step.plan, call.tick) } else { Vec::new() };
        let gate = self.await_keys(call, elsewhere);
        let dispatched = self.runtime.block_on(dispatch.run(call, requests, gate))?;
        let elapsed = started.elapsed();
        let busy = self.device_busy().saturating_sub(busy_before);
        let mut times = step.times.lock().unwrap_or_else(PoisonError::into_inner);
        times.tasks += tasks;
        times.attention += elapsed;
        times.exposed += elapsed.saturating_sub(busy);
        times.communication += dispatched.communication;
        Ok(dispatched.results)
    }

    /// The other ranks that servers fetch keys from for this rank's tasks of a tick.
    fn homes_elsewhere(&self, plan: &RankPlan, tick: u32) -> Vec<KeyHome> {
        let fetched = plan.fetches.iter().filter(|fetch| fetch.tick == tick).flat_map(|fetch| &fetch.homes);
        let own = self.job.options().rank;
        let by_rank: BTreeMap<u32, &KeyHome> =
            fetched.filter(|home| home.rank != own).map(|home| (home.rank, home)).collect();
        by_rank.into_values().cloned().collect()
    }

    /// Waits until ranks have the keys of a call's layer: only then are tasks shipped that read them, so that no server
    /// waits for a rank.
    async fn await_keys(&self, call: &LayerCall, homes: Vec<KeyHome>) -> Result<(), WorkerError> {
        let JobOptions { job, task_timeout, .. } = self.job.options();
        let Some((_, way)) = &self.home else { return Ok(()) };
        let layer = LayerRef { job: job.clone(), step: call.step, layer: call.layer, tick: call.tick };
        let waits = homes.iter().map(|home| way.await_keys(home, &layer, *task_timeout));
        try_join_all(waits).await.map(drop).map_err(|source| self.shared(call, source))
    }

    /// The gradients of this rank's keys that servers deliver for one call.
    fn delivered(&self, call: &LayerCall) -> Result<Vec<KeyGradient>, WorkerError> {
        let Some((home, _)) = &self.home else { return Ok(Vec::new()) };
        let delivered = home.store.delivered(call, self.job.options().task_timeout);
        self.runtime.block_on(delivered).map_err(|source| self.shared(call, source))
    }

    fn shared(&self, call: &LayerCall, source: TaskError) -> WorkerError {
        let JobOptions { job, rank, .. } = self.job.options();
        WorkerError::Shared { job: job.clone(), rank: *rank, step: call.step, layer: call.layer, source }
    }

    /// The plan of a submitted step, awaited if need be.
    fn planned(&self, step: u64) -> Result<Arc<PlannedStep>, WorkerError> {
        let waiting = {
            let mut steps = self.lock_steps();
            match steps.remove(&step) {
                None => {
                    let JobOptions { job, rank, .. } = self.job.options();
                    return Err(WorkerError::NotSubmitted { job: job.clone(), rank: *rank, step });
                }
                Some(Step::Planned(planned)) => {
                    steps.insert(step, Step::Planned(Arc::clone(&planned)));
                    return Ok(planned);
                }
                Some(Step::Failed(message)) => {
                    steps.insert(step, Step::Failed(message.clone()));
                    return Err(self.bad_plan(step, message));
                }
                Some(Step::Waiting(waiting)) => waiting,
            }
        };
        let cut_off = |_| Err(self.bad_plan(step, "its submission was cut off".to_owned()));
        let mut plan = self.runtime.block_on(waiting).unwrap_or_else(cut_off).inspect_err(|error| {
            self.lock_steps().insert(step, Step::Failed(error.to_string()));
        })?;
        if let Some((home, _)) = &self.home {
            home.store.expect(step, std::mem::take(&mut plan.shares));
        }
        let meet = |info: &ServerInfo| {
            let peer = self.peers.meet(info.id, || self.peer(info));
            let failed = |e: TaskError| self.bad_plan(step, format!("server {}: {e}", info.id));
            let peer = peer.map_err(failed)?;
            peer.listed(step);
            Ok((info.id, peer))
        };
        let peers = plan.servers.values().map(meet).collect::<Result<_, WorkerError>>()?;
        let planned = PlannedStep { plan, peers, at_start: self.totals(), times: Mutex::default() };
        let planned = Arc::new(planned);
        self.lock_steps().insert(step, Step::Planned(Arc::clone(&planned)));
        Ok(planned)
    }

    fn peer(&self, info: &ServerInfo) -> Result<Peer, TaskError> {
        let JobOptions { job, rank, task_timeout, connect_timeout, .. } = self.job.options();
        let handler = self.in_place.as_ref().filter(|_| info.job == *job && info.rank == Some(*rank));
        let transport: Box<dyn Transport> = match handler {
            Some(handler) => {
                let homes = self.home.as_ref().map(|(_, homes)| homes.clone()).unwrap_or_default();
                Box::new(InProcess::new(Arc::clone(handler), self.runtime.clone()).with_homes(homes))
            }
            None => {
                let config = ClientConfig {
                    job: job.clone(),
                    rank: *rank,
                    numerics_id: Some(self.job.numerics_id().to_owned()),
                    connect_timeout: *connect_timeout,
                    // Shorter than the task's own time, so that a server without room is known as such.
                    credit_timeout: *task_timeout / 2,
                    ..ClientConfig::new(&info.address)
                };
                Box::new(GrpcTransport::new(config, self.runtime.clone())?)
            }
        };
        Ok(Peer::new(info, handler.is_some(), transport))
    }

    /// Time that the in-place server has computed so far, for anybody.
    fn device_busy(&self) -> Duration {
        let seconds = self.in_place.as_ref().map_or(0.0, |handler| handler.stats().compute_seconds);
        Duration::from_secs_f64(seconds)
    }

    fn totals(&self) -> Totals {
        let at_home = self.home.as_ref().map_or(0, |(home, _)| home.store.traffic());
        let resent = self.counters.resent.load(Ordering::Relaxed);
        Totals { traffic: self.peers.traffic(), at_home, resent }
    }

    fn bad_plan(&self, step: u64, message: String) -> WorkerError {
        let JobOptions { job, rank, .. } = self.job.options();
        WorkerError::BadPlan { job: job.clone(), rank: *rank, step, message }
    }

    fn lock_steps(&self) -> MutexGuard<'_, BTreeMap<u64, Step>> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Submits steps one after another, since the coordinator takes a rank's steps in order.
async fn submit_in_order(job: Job, mut queue: mpsc::Receiver<Submission>) {
    while let Some(Submission { step, documents, planned }) = queue.recv().await {
        // Nobody waits when the rank has ended meanwhile.
        let _ = planned.send(job.submit(step, documents).await);
    }
}

impl CoreAttention for PoolAttention {
    fn forward(&self, call: &LayerCall, qkv: &Qkv) -> Result<Attended, WorkerError> {
        let finished = self.run(call, qkv, None)?;
        merge_outputs(call, &finished).map_err(|e| call.invalid(e))
    }

    fn backward(
        &self,
        call: &LayerCall,
        qkv: &Qkv,
        gradient: &OutputGradient,
    ) -> Result<QkvGradient, WorkerError> {
        let finished = self.run(call, qkv, Some(gradient))?;
        let delivered = self.delivered(call)?;
        sum_gradients(call, &finished, &delivered).map_err(|e| call.invalid(e))
    }
}
