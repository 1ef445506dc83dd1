//! The coordinator itself: pool and jobs behind one lock that is never held over an await or a plan.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use outboard_attention::Document;

use crate::documents::{Facts, check_documents};
use crate::gathering::Joined;
use crate::job::JobId;
use crate::jobs::Jobs;
use crate::planning::{PlacedTask, PlanInput, PlannedStep, plan_step};
use crate::pool::{Gone, Pool, PoolEntry};
use crate::report::{RunTimes, StepReport};
use crate::server::{InPlace, ServerId, ServerSpec};
use crate::terms::{RankSpec, Terms};
use crate::text::listed;
use crate::{Error, Options};

/// A coordinator. Clones share it; it ends with the last of them.
#[derive(Clone, Debug)]
pub struct Handle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    options: Options,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    pool: Pool,
    jobs: Jobs,
    closed: bool,
}

/// A rank's documents of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Submission {
    /// The run of the job.
    pub job: JobId,
    /// The rank.
    pub rank: u32,
    /// The training step.
    pub step: u64,
    /// The documents whose ids carry this rank. In a job with placement one rank may speak for all, and homes may name
    /// any ranks, or none.
    pub documents: Vec<Document>,
}

/// A rank's part of a step's plan.
#[derive(Clone, Debug)]
pub struct RankPlan {
    /// The rank.
    pub rank: u32,
    /// The whole plan.
    pub whole: Arc<PlannedStep>,
}

impl RankPlan {
    /// The documents that the rank is home of tokens of, with their homes, in order of id. None without placement.
    pub fn documents(&self) -> impl Iterator<Item = &Document> {
        self.whole.documents_of(self.rank)
    }

    /// The tasks whose queries or keys the rank is home of, in plan order.
    pub fn tasks(&self) -> impl Iterator<Item = &PlacedTask> {
        self.whole.tasks_of(self.rank)
    }
}

impl Handle {
    /// Starts a coordinator in this process. Call it within a tokio runtime.
    ///
    /// # Errors
    /// An error of kind `Invalid` for options that make no sense.
    pub fn start(options: Options) -> Result<Handle, Error> {
        options.check()?;
        // Ids of an earlier coordinator at this address must mean nothing to this one, so they start at the time.
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let first_id = (since_epoch.as_millis() as u64).max(1);
        let pool = Pool::new(options.lease, options.max_servers, first_id);
        let period = options.sweep_period();
        let state = Mutex::new(State { pool, jobs: Jobs::new(first_id), closed: false });
        let handle = Handle(Arc::new(Shared { options, state }));
        tokio::spawn(sweep(Arc::downgrade(&handle.0), period));
        Ok(handle)
    }

    /// Its options.
    pub fn options(&self) -> &Options {
        &self.0.options
    }

    /// Adds a server, in the place of older ones with the same address or the same rank of the same job. It stays for
    /// one lease from now and from each heartbeat.
    ///
    /// # Errors
    /// Kind `Invalid` for a server that cannot be put to use, `Busy` for a full pool.
    pub fn register_server(&self, spec: ServerSpec) -> Result<ServerId, Error> {
        let (address, numerics) = (spec.address.clone(), listed(spec.numerics.values()));
        let id = self.change(|state, now| {
            if let Some(place) = &spec.in_place
                && state.jobs.is_running(&place.job, self.options(), now)
                && let Some(other) = state.pool.live_elsewhere(place, &spec.address, now)
            {
                let InPlace { job, rank } = place;
                return Err(Error::invalid(format!(
                    "job {job} runs, and its rank {rank} has a live server at {other}; give another run another job name"
                )));
            }
            let (id, replaced) = state.pool.register(spec, now)?;
            state.jobs.servers_gone(&replaced, now);
            // A job may have waited for this server.
            state.advance(self.options(), now);
            Ok(id)
        })?;
        tracing::info!(server = %id, %address, %numerics, "server registered");
        Ok(id)
    }

    /// Renews a server's lease. True when it should drain.
    ///
    /// # Errors
    /// Kind `NotFound` for a server that is not in the pool: it registers anew.
    pub fn heartbeat(&self, server: ServerId) -> Result<bool, Error> {
        self.lock().pool.heartbeat(server, Instant::now())
    }

    /// Takes a server out of new plans for good.
    ///
    /// # Errors
    /// Kind `NotFound` for a server that is not in the pool.
    pub fn drain_server(&self, server: ServerId) -> Result<(), Error> {
        self.lock().pool.drain(server)?;
        tracing::info!(%server, "server drains");
        Ok(())
    }

    /// The pool in order of id.
    pub fn list_pool(&self) -> Vec<PoolEntry> {
        self.lock().pool.list(Instant::now())
    }

    /// Joins a rank to a job; returns when all its ranks have joined and its servers are there. A call that is dropped
    /// before takes the rank back.
    ///
    /// # Errors
    /// Kind `Invalid` for terms that make no sense, differ from other ranks' or name a run that is alive, `Aborted` for
    /// ranks and `Unavailable` for servers that did not come in time, `Unsupported` for servers that cannot serve it.
    pub async fn join_job(&self, rank: RankSpec, terms: Terms) -> Result<Arc<Joined>, Error> {
        let options = self.options();
        let (job, awaited) = self.change(|state, now| {
            let joined = state.jobs.join(&rank, &terms, options, now)?;
            state.advance(options, now);
            Ok(joined)
        })?;
        let _seat = Seat { handle: self, job, rank: rank.rank };
        awaited.answer().await
    }

    /// Submits a rank's documents of a step; returns its part of the plan when all ranks have spoken.
    ///
    /// # Errors
    /// Kind `Invalid` for documents that make no sense or differ from what the rank submitted before, `Busy` for a step
    /// too far ahead, `Aborted` when a rank is lost, late or has left, `NotFound` for an unknown run.
    pub async fn submit_step(&self, submission: Submission) -> Result<RankPlan, Error> {
        let Submission { job, rank, step, documents } = submission;
        let facts = self.facts(job)?;
        check_documents(&documents, rank, &facts, self.options().max_documents)
            .map_err(|e| e.context(format_args!("job {}, step {step}, rank {rank}", facts.name)))?;
        let documents = Arc::new(documents);
        let awaited = self.change(|state, now| state.jobs.get(job)?.submit(rank, step, documents, now))?;
        let whole = awaited.answer().await?;
        if let Ok(job) = self.lock().jobs.get(job) {
            job.fetched(rank, step);
        }
        Ok(RankPlan { rank, whole })
    }

    /// What decides which documents the ranks of a run may submit.
    pub(crate) fn facts(&self, job: JobId) -> Result<Facts, Error> {
        Ok(self.lock().jobs.get(job)?.facts())
    }

    /// Keeps a rank's times. A server that the rank gave up gets no plans until it proves itself alive one lease later.
    ///
    /// # Errors
    /// Kind `Invalid` for numbers that make no sense, `NotFound` for an unknown run, or the error that ended the run.
    pub fn report_step(&self, report: StepReport) -> Result<(), Error> {
        report.check()?;
        let lost = self.change(|state, now| {
            let lost = state.jobs.get(report.job)?.report(&report, &state.pool, now)?;
            lost.iter().for_each(|&id| state.pool.suspect(id, now));
            Ok(lost)
        })?;
        for server in lost {
            tracing::warn!(%server, run = %report.job, rank = report.rank, step = report.step, "server given up by a rank");
        }
        Ok(())
    }

    /// What the ranks of a run have reported, `None` unless it runs.
    pub fn times(&self, job: JobId) -> Option<RunTimes> {
        self.lock().jobs.get(job).ok()?.times().cloned()
    }

    /// Takes a rank out of its job. With a reason the whole job ends, and the others get it as their error; without,
    /// the job ends when all have left, or when others submit a step that this rank did not.
    ///
    /// # Errors
    /// Kind `Invalid` for a rank that the job does not have, `NotFound` for an unknown run.
    pub fn leave_job(&self, job: JobId, rank: u32, reason: &str) -> Result<(), Error> {
        self.change(|state, now| state.jobs.get(job)?.leave(rank, reason, now))
    }

    /// Ends all jobs and waiting calls, and refuses new ones.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.jobs.fail_all(&closing(), Instant::now());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whoever panicked with the lock broke one job at most; the others go on.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, then plans the steps that can be planned now.
    fn change<T>(&self, change: impl FnOnce(&mut State, Instant) -> Result<T, Error>) -> Result<T, Error> {
        let (outcome, plans) = {
            let mut state = self.lock();
            if state.closed {
                return Err(closing());
            }
            let now = Instant::now();
            let outcome = change(&mut state, now);
            let State { pool, jobs, .. } = &mut *state;
            (outcome, jobs.next_plans(pool, &self.0.options, now))
        };
        plans.into_iter().for_each(|input| self.plan(input));
        outcome
    }

    /// Plans a step on a thread of its own and answers all who wait for it.
    fn plan(&self, input: PlanInput) {
        let handle = self.clone();
        tokio::spawn(async move {
            let (job, step) = (input.job, input.step);
            let planned = tokio::task::spawn_blocking(move || plan_step(&input)).await;
            let defect =
                |e| Error::internal(format!("step {step}: the planner failed, please report it: {e}"));
            let planned = planned.unwrap_or_else(|e| Err(defect(e)));
            if let Ok(job) = handle.lock().jobs.get(job) {
                job.planned(step, planned, Instant::now());
            }
        });
    }
}

impl State {
    /// Removes servers whose lease has ended, and the jobs that lose a rank with them.
    fn expire(&mut self, now: Instant) {
        let gone = self.pool.expire(now);
        for Gone { id, spec, drained, why } in &gone {
            tracing::warn!(server = %id, address = %spec.address, drained, "server left the pool: {why}");
        }
        self.jobs.servers_gone(&gone, now);
    }

    /// Starts the jobs that can start, ends what is overdue.
    fn advance(&mut self, options: &Options, now: Instant) {
        self.jobs.advance(&self.pool, options, now);
    }
}

/// Looks at leases and deadlines for as long as the coordinator is there.
async fn sweep(shared: Weak<Shared>, period: Duration) {
    loop {
        tokio::time::sleep(period).await;
        let Some(shared) = shared.upgrade() else { return };
        let handle = Handle(shared);
        let swept = handle.change(|state, now| {
            state.expire(now);
            state.advance(handle.options(), now);
            Ok(())
        });
        if swept.is_err() {
            return;
        }
    }
}

/// A rank's seat in a gathering, given back when its call is dropped.
struct Seat<'a> {
    handle: &'a Handle,
    job: JobId,
    rank: u32,
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.handle.lock().jobs.unjoin(self.job, self.rank);
    }
}

fn closing() -> Error {
    Error::unavailable("the coordinator is shutting down")
}
