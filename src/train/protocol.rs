//! What the launcher and its rank processes tell each other: one JSON object a line, on standard input and output.

use std::net::SocketAddr;
use std::path::PathBuf;

use outboard_trainer::{Corpus, ModelConfig, TrainConfig, TrainerError};
use serde::{Deserialize, Serialize};

use super::probe::Speed;

/// Who computes core attention.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mode {
    /// Each rank its own.
    Local,
    /// The attention servers.
    Pool,
}

impl Mode {
    /// As it stands in tables and JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Mode::Local => "local",
            Mode::Pool => "pool",
        }
    }
}

/// From the launcher to a rank.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ToRank {
    /// First: everything the rank needs to set itself up.
    Setup(Box<Setup>),
    /// Where each rank takes connections of the gradient exchange, in rank order.
    Exchange { addresses: Vec<SocketAddr> },
    /// All ranks are done: leave.
    Finish,
}

/// How fast the job's servers compute and its links carry, as declared by whoever starts it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct JobRates {
    /// Of a server.
    pub(crate) flops_per_second: f64,
    /// Of its link, each way.
    pub(crate) bytes_per_second: f64,
}

/// How the planner places tokens, where it does.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Placement {
    /// How far above the mean the tokens of a rank may lie, as a fraction of it.
    pub(crate) token_slack: f64,
}

impl From<Placement> for outboard_worker::Placement {
    fn from(Placement { token_slack }: Placement) -> Self {
        outboard_worker::Placement { token_slack }
    }
}

impl From<JobRates> for outboard_worker::Rates {
    fn from(JobRates { flops_per_second, bytes_per_second }: JobRates) -> Self {
        outboard_worker::Rates { flops_per_second, bytes_per_second }
    }
}

impl From<JobRates> for outboard_planner::Rates {
    fn from(JobRates { flops_per_second, bytes_per_second }: JobRates) -> Self {
        outboard_planner::Rates { flops_per_second, bytes_per_second }
    }
}

/// A rank's part in a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) job: String,
    pub(crate) model: ModelConfig,
    pub(crate) train: TrainConfig,
    /// Trainings to run, alternating step by step.
    pub(crate) modes: Vec<Mode>,
    pub(crate) coordinator: Option<String>,
    /// Whether the rank brings an attention server of its own into the pool.
    pub(crate) in_place: bool,
    /// Servers that must be in the pool before the job starts.
    pub(crate) min_servers: u32,
    /// What steps are planned with; `None` to balance them.
    pub(crate) rates: Option<JobRates>,
    /// How the tokens of the pooled training are placed; `None` to leave documents where they are dealt to.
    pub(crate) placement: Option<Placement>,
    /// Cores to run on; the kernel has as many threads.
    pub(crate) cores: Vec<usize>,
    /// Whether to measure the rank's speed first.
    pub(crate) probe: bool,
    /// Memory of the in-place server, in bytes.
    pub(crate) memory_bytes: u64,
    /// The documents.
    pub(crate) data: Data,
}

/// Where documents come from. Every rank lists them anew, in the same order.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Data {
    /// All files of a folder.
    Folder(PathBuf),
    /// The sources of the packages that this program was built from, under this cargo home.
    Cargo(PathBuf),
}

impl Data {
    /// Lists the documents.
    pub(crate) fn corpus(&self) -> Result<Corpus, TrainerError> {
        match self {
            Data::Folder(folder) => Corpus::from_folder(folder),
            Data::Cargo(home) => Corpus::from_cargo(include_str!("../../Cargo.lock"), home),
        }
    }
}

/// From a rank to the launcher.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FromRank {
    /// Where it takes connections of the gradient exchange, and its speed where that was asked for and could be measured.
    Listening { address: SocketAddr, speed: Option<Speed> },
    /// It has joined the job and begins.
    Started { numerics_id: String },
    /// A step of one training is done.
    Step(RankStep),
    /// All steps are done.
    Done,
    /// It cannot go on.
    Failed { message: String },
}

/// One step of one training, as one rank saw it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RankStep {
    pub(crate) step: u64,
    pub(crate) mode: Mode,
    /// The global loss: the same bits on all ranks.
    pub(crate) loss: f64,
    /// Wall time of the step.
    pub(crate) seconds: f64,
    /// Of that, inside core attention.
    pub(crate) attention_seconds: f64,
    /// Of that, in the gradient exchange but not waiting.
    pub(crate) exchange_seconds: f64,
    /// Of that, waiting for the slowest rank's backward pass.
    pub(crate) wait_seconds: f64,
    pub(crate) tokens: u64,
    /// Tokens of each of the rank's documents, or of each range of one that it holds.
    pub(crate) documents: Vec<usize>,
    /// Documents whose first token the rank holds: over all ranks, every document once.
    pub(crate) documents_begun: u64,
    /// Bytes of the step's files, on all ranks, dropped because a rank's budget was full.
    pub(crate) dropped_bytes: u64,
    /// Attention cells of the rank's documents, or of the rows of them that it holds.
    pub(crate) cells: u64,
    pub(crate) pool: Option<PoolStep>,
}

/// What a pooled step took besides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PoolStep {
    pub(crate) imbalance_before: f64,
    pub(crate) imbalance_after: f64,
    /// Tasks of all ranks, of one layer and direction.
    pub(crate) planned_tasks: u64,
    /// Where the plan puts the attention of this rank's documents, or of its rows of them.
    pub(crate) placed: Vec<PlacedCells>,
    /// Tasks of this rank's documents, over all layers and both directions.
    pub(crate) tasks: u64,
    pub(crate) tasks_resent: u64,
    /// Ids of servers that this rank found lost.
    pub(crate) servers_lost: Vec<u64>,
    pub(crate) bytes_moved: u64,
    /// Bytes of all ranks, over all layers and both directions, as the plan predicts them.
    pub(crate) bytes_predicted: u64,
    /// Most over mean tokens of a rank where the planner places them; 0 where it does not.
    pub(crate) tokens_imbalance: f64,
    /// Time inside attention in which the rank's device computed none.
    pub(crate) exposed_seconds: f64,
    /// Time that tensors of this rank's tasks were on their way.
    pub(crate) communication_seconds: f64,
    /// Wall time of planning at the coordinator.
    pub(crate) plan_seconds: f64,
}

/// What a plan puts on one server.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PlacedCells {
    pub(crate) server: u64,
    /// The rank it shares its cores with; `None` for a dedicated server.
    pub(crate) rank: Option<u32>,
    /// Cells of one layer and direction, each counted once per kv head.
    pub(crate) cells: u64,
}
