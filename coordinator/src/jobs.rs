//! All jobs: runs by id, and the run that each name stands for. Pure.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use outboard_proto::ErrorKind;

use crate::gathering::Joined;
use crate::job::{Job, JobId};
use crate::planning::PlanInput;
use crate::pool::{Gone, Pool};
use crate::terms::{RankSpec, Terms};
use crate::verdict::Awaited;
use crate::{Error, Options};

/// The runs.
#[derive(Debug)]
pub(crate) struct Jobs {
    next_id: u64,
    runs: BTreeMap<JobId, Job>,
    by_name: HashMap<String, JobId>,
}

impl Jobs {
    /// No jobs; ids start at `first_id`.
    pub(crate) fn new(first_id: u64) -> Jobs {
        Jobs { next_id: first_id, runs: BTreeMap::new(), by_name: HashMap::new() }
    }

    /// Adds a rank to the job of that name, which begins with its first rank.
    pub(crate) fn join(
        &mut self,
        rank: &RankSpec,
        terms: &Terms,
        options: &Options,
        now: Instant,
    ) -> Result<(JobId, Awaited<Joined>), Error> {
        terms.check()?;
        rank.check(terms)?;
        let current = self.by_name.get(&terms.job).copied();
        let id = match current.and_then(|id| self.runs.get_mut(&id)) {
            Some(job) if !job.may_be_replaced(options, now) => job.id(),
            older => {
                if let Some(job) = older {
                    job.fail(Error::new(ErrorKind::Aborted, "another run of that name has begun"), now);
                }
                self.begin(terms, options, now)?
            }
        };
        let job = self.get(id)?;
        Ok((id, job.join(rank, terms, options, now)?))
    }

    /// True when a run of that name is alive, so that no other may take its name.
    pub(crate) fn is_running(&self, name: &str, options: &Options, now: Instant) -> bool {
        let current = self.by_name.get(name).and_then(|id| self.runs.get(id));
        current.is_some_and(|job| !job.may_be_replaced(options, now))
    }

    fn begin(&mut self, terms: &Terms, options: &Options, now: Instant) -> Result<JobId, Error> {
        if self.runs.len() >= options.max_jobs {
            let over = self.runs.iter().filter_map(|(&id, job)| Some((job.over_since()?, id))).min();
            let Some((_, oldest)) = over else {
                let message = format!(
                    "the coordinator has {} jobs, its limit; end one or raise the limit",
                    self.runs.len()
                );
                return Err(Error::new(ErrorKind::Busy, message));
            };
            self.remove(oldest);
        }
        let id = JobId(self.next_id);
        self.next_id += 1;
        self.runs.insert(id, Job::new(id, terms.clone(), now));
        self.by_name.insert(terms.job.clone(), id);
        Ok(id)
    }

    /// The run of that id.
    pub(crate) fn get(&mut self, id: JobId) -> Result<&mut Job, Error> {
        let unknown = || {
            let message = format!(
                "job_id {id} names no run of a job (it ended, or the coordinator started anew); join again"
            );
            Error::new(ErrorKind::NotFound, message)
        };
        self.runs.get_mut(&id).ok_or_else(unknown)
    }

    /// Takes a rank back whose call to join was given up.
    pub(crate) fn unjoin(&mut self, id: JobId, rank: u32) {
        if let Some(job) = self.runs.get_mut(&id) {
            job.unjoin(rank);
            if job.is_deserted() {
                self.remove(id);
            }
        }
    }

    /// Starts what can start, ends what is overdue, and forgets what ended long ago.
    pub(crate) fn advance(&mut self, pool: &Pool, options: &Options, now: Instant) {
        let mut forgotten = Vec::new();
        for (&id, job) in &mut self.runs {
            job.advance(pool, options, now);
            if job
                .over_since()
                .is_some_and(|since| now.saturating_duration_since(since) >= options.idle_timeout)
            {
                forgotten.push(id);
            }
        }
        forgotten.into_iter().for_each(|id| self.remove(id));
    }

    /// Everything that can be planned now.
    pub(crate) fn next_plans(&mut self, pool: &Pool, options: &Options, now: Instant) -> Vec<PlanInput> {
        let plans =
            |job: &mut Job| std::iter::from_fn(|| job.next_plan(pool, options, now)).collect::<Vec<_>>();
        self.runs.values_mut().flat_map(plans).collect()
    }

    /// Ends the runs that lose a rank with these servers.
    pub(crate) fn servers_gone(&mut self, gone: &[Gone], now: Instant) {
        for server in gone.iter().filter(|g| g.spec.in_place.is_some()) {
            self.runs.values_mut().for_each(|job| job.server_gone(server, now));
        }
    }

    /// Ends all runs.
    pub(crate) fn fail_all(&mut self, error: &Error, now: Instant) {
        self.runs.values_mut().for_each(|job| job.fail(error.clone(), now));
    }

    fn remove(&mut self, id: JobId) {
        if let Some(job) = self.runs.remove(&id)
            && self.by_name.get(job.name()) == Some(&id)
        {
            self.by_name.remove(job.name());
        }
    }
}
