//! How a rank takes part in a job.

use std::time::Duration;

use outboard_attention::HeadGeometry;
use outboard_proto::v1::{Placement, Rates};

/// A rank of a job, and the limits on its waiting.
#[derive(Clone, Debug)]
pub struct JobOptions {
    /// The coordinator's URL.
    pub coordinator: String,
    /// The job's name, the same on all ranks.
    pub job: String,
    /// This rank.
    pub rank: u32,
    /// How many ranks the job has.
    pub ranks: u32,
    /// Heads of its layers.
    pub geometry: HeadGeometry,
    /// Servers that must be in the pool before the job starts.
    pub min_servers: u32,
    /// How fast slots compute and links carry, the same on all ranks. With them each step is planned for the least layer
    /// time, so that slow links carry less; without them every step is balanced.
    pub rates: Option<Rates>,
    /// Given, the same on all ranks, when documents may come without homes, which the planner then chooses.
    pub placement: Option<Placement>,
    /// How long to wait for the coordinator to be reached.
    pub connect_timeout: Duration,
    /// How long to wait for the other ranks, to join and to submit each step. Longer than the coordinator's own limits,
    /// whose errors name the ranks that are missing.
    pub barrier_timeout: Duration,
    /// How long one task may take, transfer included.
    pub task_timeout: Duration,
}

impl JobOptions {
    /// Options with the usual limits.
    pub fn new(
        coordinator: String,
        job: String,
        rank: u32,
        ranks: u32,
        geometry: HeadGeometry,
    ) -> JobOptions {
        JobOptions {
            coordinator,
            job,
            rank,
            ranks,
            geometry,
            min_servers: 1,
            rates: None,
            placement: None,
            connect_timeout: Duration::from_secs(10),
            barrier_timeout: Duration::from_secs(360),
            task_timeout: Duration::from_secs(300),
        }
    }
}
