//! What ranks report of finished steps. It may change where tasks are placed (`pace`), and never a cut.

use std::collections::BTreeMap;

use crate::Error;
use crate::job::JobId;
use crate::server::ServerId;

/// Most servers in one report.
const MAX_REPORTED: usize = 1 << 16;
/// Most servers whose times are kept for a run.
const MAX_KEPT: usize = 1 << 16;

/// A rank's report of a finished step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// The run of the job.
    pub job: JobId,
    /// The rank.
    pub rank: u32,
    /// The training step.
    pub step: u64,
    /// Wall time of the step on this rank, in seconds.
    pub seconds: f64,
    /// Of that, waiting for attention while computing none, in seconds.
    pub exposed_seconds: f64,
    /// What each server did for this rank.
    pub servers: Vec<ServerReport>,
}

/// What a server did for a rank in a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ServerReport {
    /// The server.
    pub server: ServerId,
    /// Tasks it computed.
    pub tasks: u64,
    /// Its time for them, in seconds.
    pub compute_seconds: f64,
    /// True when the rank gave it up.
    pub lost: bool,
}

/// The last times that a run's ranks reported, and what followed of all of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunTimes {
    /// By rank.
    pub ranks: BTreeMap<u32, RankTimes>,
    /// By server, summed over the ranks that reported its last step.
    pub servers: BTreeMap<ServerId, ServerTimes>,
    /// The servers that are clearly slower than the others, each with its speed relative to them.
    pub slow: BTreeMap<ServerId, f64>,
    /// Steps in which slow servers gave tasks to others.
    pub corrected_steps: u64,
    /// The tasks that they gave, of one layer and direction.
    pub corrected_tasks: u64,
}

/// A rank's last reported step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RankTimes {
    /// The training step.
    pub step: u64,
    /// Wall time, in seconds.
    pub seconds: f64,
    /// Of that, waiting for attention while computing none, in seconds.
    pub exposed_seconds: f64,
}

/// A server's last reported step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ServerTimes {
    /// The training step.
    pub step: u64,
    /// Tasks it computed.
    pub tasks: u64,
    /// Its time for them, in seconds.
    pub compute_seconds: f64,
}

impl StepReport {
    /// Checks that the numbers make sense.
    ///
    /// # Errors
    /// An error of kind `Invalid` that names the field and its value.
    pub fn check(&self) -> Result<(), Error> {
        if self.servers.len() > MAX_REPORTED {
            return Err(Error::invalid(format!(
                "servers holds {} entries; at most {MAX_REPORTED} fit",
                self.servers.len()
            )));
        }
        check_seconds("seconds", self.seconds)?;
        check_seconds("exposed_seconds", self.exposed_seconds)?;
        for (n, server) in self.servers.iter().enumerate() {
            check_seconds(&format!("servers[{n}].compute_seconds"), server.compute_seconds)?;
        }
        Ok(())
    }
}

fn check_seconds(field: &str, seconds: f64) -> Result<(), Error> {
    if seconds.is_finite() && seconds >= 0.0 {
        Ok(())
    } else {
        Err(Error::invalid(format!("{field} is {seconds}; it must be finite and not below 0")))
    }
}

impl RunTimes {
    pub(crate) fn note(&mut self, report: &StepReport) {
        let &StepReport { rank, step, seconds, exposed_seconds, .. } = report;
        self.ranks.insert(rank, RankTimes { step, seconds, exposed_seconds });
        for server in &report.servers {
            if self.servers.len() >= MAX_KEPT && !self.servers.contains_key(&server.server) {
                continue;
            }
            let times = self.servers.entry(server.server).or_default();
            if times.step < step {
                *times = ServerTimes { step, ..ServerTimes::default() };
            }
            if times.step == step {
                times.tasks = times.tasks.saturating_add(server.tasks);
                times.compute_seconds += server.compute_seconds;
            }
        }
    }
}
