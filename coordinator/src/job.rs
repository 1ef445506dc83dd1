//! One run of a job: its ranks gather, it runs, it is over. Pure; time and pool come in as arguments.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use outboard_attention::Document;
use outboard_proto::ErrorKind;

use crate::documents::Facts;
use crate::gathering::{Gathering, Joined};
use crate::pace::Pace;
use crate::placement::{Assignment, Takers, assign};
use crate::planning::{PlanInput, PlannedStep};
use crate::pool::{Candidate, Gone, Pool};
use crate::report::{RunTimes, StepReport};
use crate::server::ServerId;
use crate::slots::{Footing, Readiness};
use crate::steps::{Bounds, Steps};
use crate::terms::{RankSpec, Terms};
use crate::verdict::Awaited;
use crate::{Error, Options};

/// Names one run of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u64);

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One run of a job.
#[derive(Debug)]
pub(crate) struct Job {
    id: JobId,
    name: Arc<str>,
    terms: Terms,
    phase: Phase,
    /// When a rank last spoke.
    heard: Instant,
}

#[derive(Debug)]
enum Phase {
    Gathering(Gathering),
    Running(Box<Run>),
    Over(Over),
}

#[derive(Debug)]
struct Run {
    footing: Arc<Footing>,
    steps: Steps,
    assignment: Assignment,
    plan_epoch: u64,
    times: RunTimes,
    pace: Pace,
}

impl Run {
    fn stuck(&self, now: Instant) -> Option<Error> {
        self.steps.stuck(&self.footing.numerics_id, now)
    }

    /// Notes which servers are slow now, and says which have become so or are so no longer.
    fn compare_servers(&mut self, job: &str) {
        let slow = self.pace.slow();
        for (server, speed) in slow.iter().filter(|(id, _)| !self.times.slow.contains_key(id)) {
            tracing::warn!(job, %server, speed, "server is slower than the others and gives tasks to them");
        }
        for server in self.times.slow.keys().filter(|id| !slow.contains_key(id) && self.pace.knows(**id)) {
            tracing::info!(job, %server, "server is as fast as the others again");
        }
        self.times.slow = slow;
    }
}

/// How it ended: the error that its ranks get.
#[derive(Debug)]
struct Over {
    error: Error,
    since: Instant,
}

impl Job {
    pub(crate) fn new(id: JobId, terms: Terms, now: Instant) -> Job {
        let gathering = Gathering::new(terms.ranks, now);
        Job { id, name: terms.job.as_str().into(), terms, phase: Phase::Gathering(gathering), heard: now }
    }

    pub(crate) fn id(&self) -> JobId {
        self.id
    }

    /// What decides which documents its ranks may submit.
    pub(crate) fn facts(&self) -> Facts {
        let Terms { ranks, geometry, placement, .. } = self.terms;
        Facts { name: self.name.clone(), ranks, geometry, places: placement.is_some() }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// When it ended, if it has.
    pub(crate) fn over_since(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Over(over) => Some(over.since),
            _ => None,
        }
    }

    /// True when no rank has joined or is left that waits to.
    pub(crate) fn is_deserted(&self) -> bool {
        matches!(&self.phase, Phase::Gathering(g) if g.is_empty())
    }

    /// True when a run has ended, or none of its ranks has spoken for so long that another run may take its name.
    pub(crate) fn may_be_replaced(&self, options: &Options, now: Instant) -> bool {
        match &self.phase {
            Phase::Gathering(_) => false,
            Phase::Running(_) => now.saturating_duration_since(self.heard) >= options.step_timeout,
            Phase::Over(_) => true,
        }
    }

    /// Adds a rank to the gathering.
    pub(crate) fn join(
        &mut self,
        spec: &RankSpec,
        terms: &Terms,
        options: &Options,
        now: Instant,
    ) -> Result<Awaited<Joined>, Error> {
        let heard = now.saturating_duration_since(self.heard).as_secs_f64();
        let rank = spec.rank;
        self.terms.check_same(terms, rank)?;
        let gathering = match &mut self.phase {
            Phase::Gathering(gathering) => gathering,
            Phase::Over(over) => return Err(over.error.clone()),
            Phase::Running(_) => {
                let message = format!(
                    "job {}: rank {rank} cannot join, since a run of that name is alive (run {}, heard of {heard:.1} s ago); end \
                     it, wait {:.0} s after its last sign of life, or choose another name",
                    self.name,
                    self.id,
                    options.step_timeout.as_secs_f64().ceil()
                );
                return Err(Error::invalid(message));
            }
        };
        let awaited = gathering.join(spec).map_err(|e| e.context(format_args!("job {}", self.name)))?;
        self.heard = now;
        Ok(awaited)
    }

    /// Takes a rank back whose call to join was given up. Nothing once the job runs.
    pub(crate) fn unjoin(&mut self, rank: u32) {
        if let Phase::Gathering(gathering) = &mut self.phase {
            gathering.unjoin(rank);
        }
    }

    /// Starts the job when its ranks and servers are there; looks at deadlines.
    pub(crate) fn advance(&mut self, pool: &Pool, options: &Options, now: Instant) {
        let idle = now.saturating_duration_since(self.heard) >= options.idle_timeout;
        match &self.phase {
            Phase::Gathering(_) => self.advance_gathering(pool, options, now),
            Phase::Running(run) => match run.stuck(now) {
                Some(error) => self.fail(error, now),
                None if idle => {
                    let limit = options.idle_timeout.as_secs_f64();
                    self.fail(
                        Error::new(ErrorKind::Aborted, format!("no rank has spoken for {limit:.1} s")),
                        now,
                    );
                }
                None => {}
            },
            Phase::Over(_) => {}
        }
    }

    fn advance_gathering(&mut self, pool: &Pool, options: &Options, now: Instant) {
        let Phase::Gathering(gathering) = &self.phase else { return };
        let late = now.saturating_duration_since(gathering.since()) >= options.join_timeout;
        let limit = options.join_timeout.as_secs_f64();
        if !gathering.is_complete() {
            if late {
                let error = gathering.incomplete(limit);
                self.fail(error, now);
            }
            return;
        }
        if let Some(error) = gathering.shared_address() {
            return self.fail(error, now);
        }
        match self.terms.readiness(&pool.candidates(&self.name)) {
            Readiness::Ready(footing) => self.start(footing, options, now),
            Readiness::Refused(error) => self.fail(error, now),
            Readiness::Waiting(what) if late => {
                let message = format!(
                    "{what} after {limit:.1} s; start attention servers with this coordinator's address"
                );
                self.fail(Error::unavailable(message), now);
            }
            Readiness::Waiting(_) => {}
        }
    }

    fn start(&mut self, footing: Footing, options: &Options, now: Instant) {
        let Phase::Gathering(gathering) = &self.phase else { return };
        for note in &footing.left_out {
            tracing::warn!(job = %self.name, "{note}; the job goes without it");
        }
        let (slots, numerics_id) = (footing.slots.clone(), footing.numerics_id.clone());
        tracing::info!(job = %self.name, run = %self.id, ranks = self.terms.ranks, slots = slots.len(), %numerics_id, "job started");
        let home_addresses = self.terms.placement.map_or_else(Vec::new, |_| gathering.addresses());
        gathering.give(Ok(Joined { job: self.id, slots, numerics_id, home_addresses }));
        let bounds = Bounds {
            ahead: options.steps_ahead,
            timeout: options.step_timeout,
            documents: options.max_documents.saturating_mul(self.terms.ranks as usize),
        };
        self.phase = Phase::Running(Box::new(Run {
            footing: Arc::new(footing),
            steps: Steps::new(self.terms.ranks, bounds),
            assignment: Assignment::default(),
            plan_epoch: 0,
            times: RunTimes::default(),
            pace: Pace::new(self.terms.ranks),
        }));
        self.heard = now;
    }

    /// Ends the run; all its waiting calls, and all later ones, get the error.
    pub(crate) fn fail(&mut self, error: Error, now: Instant) {
        let error = error.context(format_args!("job {}", self.name));
        match &self.phase {
            Phase::Gathering(gathering) => gathering.give(Err(error.clone())),
            Phase::Running(run) => run.steps.fail(&error),
            Phase::Over(_) => return,
        }
        tracing::warn!(run = %self.id, "{error}");
        self.phase = Phase::Over(Over { error, since: now });
    }

    /// Takes a rank's documents of a step.
    pub(crate) fn submit(
        &mut self,
        rank: u32,
        step: u64,
        documents: Arc<Vec<Document>>,
        now: Instant,
    ) -> Result<Awaited<PlannedStep>, Error> {
        let name = self.name.clone();
        let run = self.run_of(rank, now)?;
        let awaited = run.steps.submit(rank, step, documents, now);
        let awaited = awaited.map_err(|e| e.context(format_args!("job {name}, step {step}, rank {rank}")))?;
        if let Some(error) = run.stuck(now) {
            self.fail(error, now);
        }
        Ok(awaited)
    }

    /// The run, if it runs and the rank is part of it. The rank counts as alive.
    fn run_of(&mut self, rank: u32, now: Instant) -> Result<&mut Run, Error> {
        let (name, all) = (&self.name, self.terms.ranks);
        if rank >= all {
            return Err(Error::invalid(format!("rank is {rank}; job {name} has {all} ranks")));
        }
        match &mut self.phase {
            Phase::Gathering(_) => {
                Err(Error::invalid(format!("job {name} has not started; rank {rank} must join first")))
            }
            Phase::Over(over) => Err(over.error.clone()),
            Phase::Running(run) if run.steps.has_left(rank) => {
                Err(Error::invalid(format!("job {name}: rank {rank} has left it and cannot call any more")))
            }
            Phase::Running(run) => {
                self.heard = now;
                Ok(run)
            }
        }
    }

    /// What to plan next, if a step has all its submissions and some server takes its tasks.
    pub(crate) fn next_plan(&mut self, pool: &Pool, options: &Options, now: Instant) -> Option<PlanInput> {
        let Phase::Running(run) = &mut self.phase else { return None };
        if !run.steps.has_complete() {
            return None;
        }
        let servers = usable(pool, &self.name, &run.footing, &self.terms);
        let in_place = run.footing.in_place.iter().map(|(&rank, &id)| (rank, id));
        let takes = |id: ServerId| servers.binary_search_by_key(&id, |s| s.0).is_ok();
        let takers = Takers {
            in_place: in_place.filter(|&(_, id)| takes(id)).collect(),
            dedicated: servers
                .iter()
                .filter(|(_, spec)| spec.in_place.is_none())
                .map(|&(id, _)| id)
                .collect(),
        };
        run.pace.retain(takes);
        let assignment = assign(&run.footing.slots, &run.assignment, &takers)?;
        let (step, submissions) = run.steps.next_complete(now)?;
        if assignment != run.assignment {
            // The first placement is epoch 0.
            run.plan_epoch += u64::from(run.assignment != Assignment::default());
            run.assignment = assignment.clone();
        }
        Some(PlanInput {
            job: self.id,
            step,
            ranks: self.terms.ranks,
            geometry: self.terms.geometry,
            footing: run.footing.clone(),
            submissions,
            assignment,
            plan_epoch: run.plan_epoch,
            servers,
            slow: run.pace.slow(),
            tolerance: options.tolerance,
        })
    }

    /// Answers all who wait for a step; a step that cannot be planned ends the run.
    pub(crate) fn planned(&mut self, step: u64, plan: Result<PlannedStep, Error>, now: Instant) {
        match (plan, &mut self.phase) {
            (Ok(mut plan), Phase::Running(run)) => {
                run.pace.planned(step, std::mem::take(&mut plan.given));
                if plan.corrected > 0 {
                    run.times.corrected_steps += 1;
                    run.times.corrected_tasks += plan.corrected;
                    let tasks = plan.corrected;
                    tracing::info!(job = %self.name, step, tasks, "slow servers give tasks to others");
                }
                run.steps.planned(step, Arc::new(plan));
            }
            (Err(error), Phase::Running(_)) => self.fail(error, now),
            _ => {}
        }
    }

    /// Notes that a rank has received its part of a step.
    pub(crate) fn fetched(&mut self, rank: u32, step: u64) {
        if let Phase::Running(run) = &mut self.phase {
            run.steps.fetched(rank, step);
        }
    }

    /// Keeps a rank's times; names the servers that it gave up.
    pub(crate) fn report(
        &mut self,
        report: &StepReport,
        pool: &Pool,
        now: Instant,
    ) -> Result<Vec<ServerId>, Error> {
        let name = self.name.clone();
        let run = self.run_of(report.rank, now)?;
        run.times.note(report);
        if run.pace.reported(report) {
            run.compare_servers(&name);
        }
        let lost: BTreeSet<ServerId> = report.servers.iter().filter(|s| s.lost).map(|s| s.server).collect();
        // A rank can only give up servers that its plans may name.
        Ok(lost.into_iter().filter(|&id| pool.serves(id, &self.name)).collect())
    }

    /// What ranks have reported, while the job runs.
    pub(crate) fn times(&self) -> Option<&RunTimes> {
        match &self.phase {
            Phase::Running(run) => Some(&run.times),
            _ => None,
        }
    }

    /// Takes a rank out: for good work when `reason` is empty, else with the whole job.
    pub(crate) fn leave(&mut self, rank: u32, reason: &str, now: Instant) -> Result<(), Error> {
        match &self.phase {
            Phase::Over(_) => return Ok(()),
            Phase::Running(run) if run.steps.has_left(rank) => return Ok(()),
            _ => {}
        }
        let run = self.run_of(rank, now)?;
        if !reason.is_empty() {
            self.fail(Error::new(ErrorKind::Aborted, format!("rank {rank} left it: {reason}")), now);
        } else if run.steps.leave(rank) {
            self.finish(now);
        } else if let Some(error) = run.stuck(now) {
            self.fail(error, now);
        }
        Ok(())
    }

    fn finish(&mut self, now: Instant) {
        tracing::info!(job = %self.name, run = %self.id, "job finished");
        let message = format!("job {} has finished: all its ranks have left it", self.name);
        let error = Error::new(ErrorKind::Aborted, message);
        if let Phase::Running(run) = &self.phase {
            run.steps.fail(&error);
        }
        self.phase = Phase::Over(Over { error, since: now });
    }

    /// Ends the run if the server was in place at one of its ranks, which is lost with it.
    pub(crate) fn server_gone(&mut self, gone: &Gone, now: Instant) {
        let (Phase::Running(run), Some(place)) = (&self.phase, &gone.spec.in_place) else { return };
        let ours = place.job == *self.name && run.footing.in_place.get(&place.rank) == Some(&gone.id);
        // One that was told to drain leaves its rank behind, alive.
        if ours && !gone.drained && !run.steps.has_left(place.rank) {
            let message = format!(
                "rank {} is lost: its in-place server {} at {} is gone ({})",
                place.rank, gone.id, gone.spec.address, gone.why
            );
            self.fail(Error::new(ErrorKind::Aborted, message), now);
        }
    }
}

/// The servers that may take the job's tasks, in order of id. None of another numerics id ever does.
fn usable(pool: &Pool, name: &str, footing: &Footing, terms: &Terms) -> Vec<Candidate> {
    let mut servers = pool.candidates(name);
    servers.retain(|(id, spec)| {
        let ours = spec.in_place.as_ref().is_none_or(|place| footing.in_place.get(&place.rank) == Some(id));
        let same = spec.numerics_id(terms.geometry.dtype()) == Some(&*footing.numerics_id);
        ours && same && spec.unsuited_for(&terms.geometry).is_none()
    });
    servers
}
