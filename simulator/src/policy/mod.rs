//! Policies: who computes and sends what.

mod alone;
mod flexsp;
mod groups;
mod hdp;
mod pool;
mod wlb;

use std::fmt;
use std::str::FromStr;

use crate::engine::Program;
use crate::memory::Held;
use crate::scenario::Sequences;
use crate::setting::Setting;
use crate::{Layout, SimulationError};

/// A way to share the work of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Policy {
    /// Attention servers, planned by Outboard's planner, which chooses homes too.
    Outboard,
    /// The same, with homes in the order of the documents.
    OutboardFixedHomes,
    /// Plain packing.
    Fixed,
    /// Variable-length packing.
    Wlb,
    /// Context parallelism of each document, keys and values gathered.
    Cp,
    /// The same, keys and values around a ring.
    CpRing,
    /// Attention servers, planned by DistCA's greedy planner.
    Distca,
    /// Sequence-parallel groups of several degrees.
    Flexsp,
    /// A degree for each sequence.
    Hdp,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Policy; 9] = [
        Policy::Outboard,
        Policy::OutboardFixedHomes,
        Policy::Fixed,
        Policy::Wlb,
        Policy::Cp,
        Policy::CpRing,
        Policy::Distca,
        Policy::Flexsp,
        Policy::Hdp,
    ];
    /// Their names, as they are read and printed.
    pub const NAMES: [&str; 9] =
        ["outboard", "outboard-fixed-homes", "fixed", "wlb", "cp", "cp-ring", "distca", "flexsp", "hdp"];

    /// Its name.
    pub fn name(self) -> &'static str {
        Policy::NAMES[self as usize]
    }

    /// Whether attention is computed by attention servers.
    pub fn disaggregates(self) -> bool {
        matches!(self, Policy::Outboard | Policy::OutboardFixedHomes | Policy::Distca)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Policy {
    type Err = SimulationError;

    fn from_str(name: &str) -> Result<Policy, SimulationError> {
        let named = Policy::ALL.into_iter().find(|policy| policy.name() == name);
        named.ok_or_else(|| SimulationError::unknown("policy", name, &Policy::NAMES))
    }
}

/// What a policy may choose; of several choices the one whose steps take the least time is taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Choice {
    pub(crate) layout: Layout,
    /// Steps whose documents may change places.
    pub(crate) window: usize,
    /// The part of the links' speed that plans of a pool count on.
    pub(crate) link_share: f64,
}

/// What a pool's plans may count on. A nano-batch's tasks travel one way before they are computed and their results the other
/// way after, so that each direction of a link carries for half of the time where both nano-batches are full of bytes.
const LINK_SHARES: [f64; 2] = [1.0, 0.5];

impl Choice {
    /// A layout, and all else as it is by itself.
    pub(crate) fn of(layout: Layout) -> Choice {
        Choice { layout, window: 1, link_share: 1.0 }
    }
}

/// A step by a policy.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub(crate) program: Program,
    /// Cells that each device computes, of all kv heads of a lane, over the micro-batches.
    pub(crate) cells: Vec<u64>,
    /// Largest over mean seconds of attention, of what is computed at one time, weighted by seconds.
    pub(crate) imbalance: f64,
    /// What each device holds.
    pub(crate) held: Vec<Held>,
}

/// What `policy` may choose in a scenario.
pub(crate) fn choices(setting: &Setting<'_>, policy: Policy, sequences: usize) -> Vec<Choice> {
    match policy {
        Policy::Outboard | Policy::OutboardFixedHomes => {
            LINK_SHARES.map(|link_share| Choice { link_share, ..Choice::of(setting.layout) }).into()
        }
        Policy::Distca | Policy::Flexsp | Policy::Hdp => vec![Choice::of(setting.layout)],
        Policy::Fixed | Policy::Cp | Policy::CpRing => alone::choices(setting, sequences),
        Policy::Wlb => wlb::choices(setting, sequences),
    }
}

/// Seconds that no step by a choice of `policy` can be shorter than: what the replica with most tokens computes outside of
/// attention, and what it has to gather or pass around. 0 where nothing is known.
pub(crate) fn floor(setting: &Setting<'_>, policy: Policy) -> f64 {
    let layout = setting.layout;
    let shares = matches!(policy, Policy::Fixed | Policy::Wlb | Policy::Cp | Policy::CpRing);
    let Some(context) = layout.context.filter(|_| shares) else { return 0.0 };
    let layers = f64::from(setting.closing.layers);
    // The most that a rank holds is no less than the mean.
    let tokens = setting.scenario.tokens as f64 / f64::from(layout.ranks());
    let dense = layers * setting.token_seconds() * tokens;
    if context == 1 {
        return dense;
    }
    let link = usize::from(context as usize > setting.closing.devices_per_node);
    let around = f64::from(context - 1) * tokens * setting.key_bytes() / setting.links.bytes_per_second[link];
    match policy {
        Policy::CpRing => dense.max(3.0 * layers * around),
        _ => dense + 2.0 * layers * around * setting.gather_drag(),
    }
}

/// The steps of a window by `policy`, in order.
pub(crate) fn plan(
    setting: &Setting<'_>,
    policy: Policy,
    window: &[Sequences],
) -> Result<Vec<Planned>, SimulationError> {
    let each =
        |plan: &dyn Fn(&Sequences) -> Result<Planned, SimulationError>| window.iter().map(plan).collect();
    match policy {
        Policy::Outboard | Policy::OutboardFixedHomes | Policy::Distca => {
            each(&|batch| pool::plan_step(setting, policy, batch))
        }
        Policy::Fixed | Policy::Cp | Policy::CpRing => each(&|batch| alone::plan(setting, policy, batch)),
        Policy::Wlb => Ok(wlb::plan(setting, window)),
        Policy::Flexsp => each(&|batch| flexsp::plan(setting, batch)),
        Policy::Hdp => each(&|batch| hdp::plan(setting, batch)),
    }
}

/// Layouts with every number of ranks that may share a sequence and leaves no replica without one; or the number that the
/// scenario names.
pub(crate) fn by_context(layout: Layout, sequences: usize) -> Vec<Layout> {
    let ranks = layout.ranks();
    let suits = |context: &u32| match layout.context {
        Some(asked) => asked == *context,
        None => ranks.is_multiple_of(*context) && (ranks / context) as usize <= sequences,
    };
    (1..=ranks).filter(suits).map(|context| Layout { context: Some(context), ..layout }).collect()
}
