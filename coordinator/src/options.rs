//! What a coordinator is told when it starts.

use std::time::Duration;

use outboard_planner::DEFAULT_TOLERANCE;

use crate::Error;

/// Most ranks of a job.
pub const MAX_RANKS: u32 = 1 << 16;

/// Settings of a coordinator. Every wait, queue and list has its bound here.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// How long a server stays in the pool without a heartbeat. A server that a rank gave up stays out of plans as long.
    pub lease: Duration,
    /// How long a job waits for its ranks and servers, from the first rank that joins.
    pub join_timeout: Duration,
    /// How long a step waits for its last rank, from its first submission or the step before, whichever is later.
    pub step_timeout: Duration,
    /// How long a job none of whose ranks speaks is remembered, and how long the reason of its end.
    pub idle_timeout: Duration,
    /// How long calls in progress may take to end after a shutdown.
    pub drain_timeout: Duration,
    /// How many steps a rank may submit ahead of the oldest one that some rank has not received.
    pub steps_ahead: u32,
    /// Most servers in the pool.
    pub max_servers: usize,
    /// Most jobs at a time.
    pub max_jobs: usize,
    /// Most documents a rank submits for one step. In a job with placement all ranks together submit as many as each of
    /// them could, whoever submits them.
    pub max_documents: usize,
    /// How far the busiest slot may lie above the mean, as a fraction of it, in jobs that declare no rates.
    pub tolerance: f64,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            lease: Duration::from_secs(5),
            join_timeout: Duration::from_secs(300),
            step_timeout: Duration::from_secs(300),
            idle_timeout: Duration::from_secs(3600),
            drain_timeout: Duration::from_secs(5),
            steps_ahead: 4,
            max_servers: 1 << 16,
            max_jobs: 1 << 10,
            max_documents: 1 << 16,
            tolerance: DEFAULT_TOLERANCE,
        }
    }
}

impl Options {
    /// Checks that the settings can be worked with.
    ///
    /// # Errors
    /// An error of kind `Invalid` that names the field and its value.
    pub fn check(&self) -> Result<(), Error> {
        let longest = Duration::from_secs(30 * 24 * 3600);
        let times = [
            ("lease", self.lease),
            ("join_timeout", self.join_timeout),
            ("step_timeout", self.step_timeout),
            ("idle_timeout", self.idle_timeout),
            ("drain_timeout", self.drain_timeout),
        ];
        for (field, time) in times {
            if time < Duration::from_millis(1) || time > longest {
                return Err(Error::invalid(format!(
                    "{field} is {time:?}; it must be between 1 ms and 30 days"
                )));
            }
        }
        let counts = [
            ("steps_ahead", self.steps_ahead as usize, 1 << 10),
            ("max_servers", self.max_servers, 1 << 20),
            ("max_jobs", self.max_jobs, 1 << 20),
            ("max_documents", self.max_documents, 1 << 24),
        ];
        for (field, count, max) in counts {
            if !(1..=max).contains(&count) {
                return Err(Error::invalid(format!("{field} is {count}; it must be between 1 and {max}")));
            }
        }
        if (0.0..=1.0).contains(&self.tolerance) {
            Ok(())
        } else {
            Err(Error::invalid(format!("tolerance is {}; it must be between 0 and 1", self.tolerance)))
        }
    }

    /// How often leases and deadlines are looked at.
    pub(crate) fn sweep_period(&self) -> Duration {
        let shortest = self.lease.min(self.join_timeout).min(self.step_timeout);
        (shortest / 8).clamp(Duration::from_millis(1), Duration::from_millis(250))
    }
}
