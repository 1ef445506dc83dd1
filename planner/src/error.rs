//! Why a problem cannot be planned.

use outboard_attention::DocumentId;

/// A problem that makes no sense. Every variant names the field and the values at fault.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// Nobody to compute anything.
    #[error("slots is empty; a plan needs at least one")]
    NoSlots,
    /// More slots than a plan can number.
    #[error("slots holds {slots} entries; at most {max} are planned")]
    TooManySlots {
        /// How many there are.
        slots: usize,
        /// The most there may be.
        max: usize,
    },
    /// A weight that is not a positive finite number.
    #[error("slots[{slot}].weight is {weight}; it must be finite and above zero")]
    BadWeight {
        /// Index of the slot.
        slot: usize,
        /// Its weight.
        weight: f64,
    },
    /// Weights too far apart to be shares of one total.
    #[error(
        "slots[].weight add up to {total:e}, the smallest is {smallest:e}; the sum may be at most 1e12 times the smallest"
    )]
    WeightRange {
        /// The sum.
        total: f64,
        /// The smallest.
        smallest: f64,
    },
    /// Two in-place slots of one rank.
    #[error("slots[{first}].rank and slots[{second}].rank are both {rank}; a rank has one in-place slot")]
    SharedRank {
        /// The rank.
        rank: u32,
        /// Index of one slot.
        first: usize,
        /// Index of the other.
        second: usize,
    },
    /// A rate that is not a positive finite number.
    #[error("rates.{name} is {rate}; it must be finite and above zero")]
    BadRate {
        /// Which one.
        name: &'static str,
        /// Its value.
        rate: f64,
    },
    /// A slot that would hold more than it may, however the work is dealt.
    #[error(
        "slots[{slot}] would hold {bytes} bytes of other ranks' tokens in tick {tick}, and may hold {memory}; \
         raise its memory, or add servers"
    )]
    NoMemory {
        /// The slot.
        slot: usize,
        /// The tick.
        tick: u32,
        /// What it would hold.
        bytes: u64,
        /// What it may.
        memory: u64,
    },
    /// A slot's link that is not a number, or absurd.
    #[error("slots[{slot}].link is {link}; it must be between {least} and {most}")]
    BadLink {
        /// The slot.
        slot: usize,
        /// Its link.
        link: f64,
        /// The least that is allowed.
        least: f64,
        /// The most.
        most: f64,
    },
    /// A device's profile that makes no sense.
    #[error("profile.{field} {what}")]
    BadProfile {
        /// Which field of the profile.
        field: String,
        /// What it is, and what it must be.
        what: String,
    },
    /// A cost of the rest of the model that is negative or not a finite number.
    #[error("costs.rest_seconds_per_token is {seconds}; it must be finite and at least zero")]
    BadRest {
        /// What was given.
        seconds: f64,
    },
    /// A step that takes longer than can be said.
    #[error("by its costs the step takes {seconds} s; flops_per_second or bytes_per_second is too low")]
    Endless {
        /// What it takes.
        seconds: f64,
    },
    /// A document whose home is still to be chosen, where that is too late.
    #[error("document {document} has no home; settle the step before it is planned")]
    NoHome {
        /// The document.
        document: DocumentId,
    },
    /// Nobody to hold a document's tokens.
    #[error(
        "document {document} has no home, and there is no rank to hold it: no slot is on a rank's device"
    )]
    NoRank {
        /// A document without a home.
        document: DocumentId,
    },
    /// A slack that is negative or not a number, or above one.
    #[error("token_slack is {slack}; it must be between 0 and 1")]
    BadSlack {
        /// What was given.
        slack: f64,
    },
    /// Documents with homes of their own that exceed what a rank may hold.
    #[error(
        "rank {rank} is home of {tokens} tokens of tick {tick} already, document {document} the most; it may hold {most}"
    )]
    PinnedTooMany {
        /// The rank.
        rank: u32,
        /// The tick.
        tick: u32,
        /// What it holds.
        tokens: usize,
        /// What it may hold.
        most: usize,
        /// The document with most of them.
        document: DocumentId,
    },
    /// Homes that were chosen wrongly: a mistake of the planner.
    #[error("the planner chose homes that do not fit, please report it: {0}")]
    BadHomes(String),
    /// Slots that keep nothing could compute nothing.
    #[error("kept is 0; slots hold the tensors of one layer at least")]
    NothingKept,
    /// More ranks than can be counted with.
    #[error("ranks is {ranks}; at most {max} can be placed on")]
    TooManyRanks {
        /// Ranks.
        ranks: u32,
        /// The most there may be.
        max: u32,
    },
    /// A tolerance that is negative or not a number, or above one.
    #[error("tolerance is {tolerance}; it must be between 0 and 1")]
    BadTolerance {
        /// What was given.
        tolerance: f64,
    },
    /// Two documents of one name.
    #[error("documents holds {document} twice; ids must be unique within a step")]
    DuplicateDocument {
        /// The name.
        document: DocumentId,
    },
    /// A step too large to count.
    #[error("documents holds {cells} cells over {kv_heads} kv heads; at most {max} are planned")]
    TooManyCells {
        /// How many cells, up to the document at which counting stopped.
        cells: u128,
        /// Kv heads of the geometry.
        kv_heads: usize,
        /// The most there may be.
        max: u64,
    },
    /// More tasks than a plan can number.
    #[error("the plan needs more than {max} tasks")]
    TooManyTasks {
        /// The most there may be.
        max: u32,
    },
}
