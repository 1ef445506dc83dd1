//! Rival policies: other ways to decide who computes what. They are here to be measured against, by the same judges.
//!
//! All of them share the planner's sheets, order of tasks and reduction groups, so every plan computes each cell
//! exactly once, is a function of the problem alone, and does not depend on the order of documents. None of them
//! promises balance or a number of pieces a slot.

use std::fmt;
use std::str::FromStr;

use outboard_attention::StepPlan;

use crate::plan::by_tick;
use crate::sheet::{Sheet, Strip};
use crate::{PlanError, Problem, group, plan};

mod context_parallel;
pub(crate) mod distca;
mod fixed;
mod packing;
mod wlb;

/// The tolerance of [`Policy::Distca`] when none is named: the default of DistCA's own planner.
pub const DISTCA_TOLERANCE: f64 = 0.1;

/// A way to plan a step. The crate's documentation has a table of what each is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Policy {
    /// [`plan()`], to the problem's tolerance.
    #[default]
    Outboard,
    /// No balancing: the slot of a row's home rank computes it. The rows that a document has on ranks without a slot
    /// go together to the slot with the least work over weight, those with the most work first.
    Fixed,
    /// Whole documents, the one with the most work first (of causal documents: the longest), each to the slot with the
    /// least work over weight so far; of equals to one that is home to some of it. WLB-LLM's variable-length packing
    /// without its limit on tokens and without putting documents off to later steps.
    Wlb,
    /// Every document in `2 N` chunks of equal rows for `N` slots, of which slot `i` computes chunks `i` and
    /// `2 N - 1 - i`, whatever the slots' weights. Documents of fewer than `2 N` rows go whole to the slot with the
    /// least work over weight.
    Cp,
    /// Slots with more than their share give to slots with less, in the order of what these lack; each takes the
    /// fewest bytes per FLOP first. A document is cut by rows, off the inner edges of a head and a tail.
    Distca {
        /// A slot that lacks no more than this fraction of its share gets no more: 0 to 1. Nothing bounds how far a
        /// slot may lie above its share.
        tolerance: f64,
    },
}

/// A name that no policy has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no policy is called `{name}`; there are {}", Policy::NAMES.join(", "))]
pub struct UnknownPolicy {
    /// What was given.
    pub name: String,
}

impl Policy {
    /// The names of all policies, as they are read and printed.
    pub const NAMES: [&str; 5] = ["outboard", "fixed", "wlb", "cp", "distca"];

    fn name(&self) -> &'static str {
        match self {
            Policy::Outboard => "outboard",
            Policy::Fixed => "fixed",
            Policy::Wlb => "wlb",
            Policy::Cp => "cp",
            Policy::Distca { .. } => "distca",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Reads a name; `distca` comes with [`DISTCA_TOLERANCE`].
impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Policy, UnknownPolicy> {
        match name {
            "outboard" => Ok(Policy::Outboard),
            "fixed" => Ok(Policy::Fixed),
            "wlb" => Ok(Policy::Wlb),
            "cp" => Ok(Policy::Cp),
            "distca" => Ok(Policy::Distca { tolerance: DISTCA_TOLERANCE }),
            _ => Err(UnknownPolicy { name: name.to_owned() }),
        }
    }
}

/// Plans the problem by the given policy. [`Policy::Outboard`] is [`plan()`].
///
/// Time grows with tasks times slots, for [`Policy::Distca`] with moves times documents.
///
/// # Errors
/// A [`PlanError`] when the problem, or the tolerance of [`Policy::Distca`], makes no sense.
pub fn plan_by(problem: &Problem, policy: Policy) -> Result<StepPlan, PlanError> {
    let slots = problem.slots.as_slice();
    match policy {
        Policy::Outboard => plan(problem),
        Policy::Fixed => plan_ticks(problem, |sheets| fixed::place(sheets, slots)),
        Policy::Wlb => plan_ticks(problem, |sheets| wlb::place(sheets, slots)),
        Policy::Cp => plan_ticks(problem, |sheets| context_parallel::place(sheets, slots)),
        Policy::Distca { tolerance } if !(0.0..=1.0).contains(&tolerance) => {
            Err(PlanError::BadTolerance { tolerance })
        }
        Policy::Distca { tolerance } => {
            let place = |sheets: &[Sheet<'_>]| {
                distca::place(sheets, slots, &problem.geometry, tolerance, u64::MAX).unwrap_or_default()
            };
            plan_ticks(problem, place)
        }
    }
}

/// Plans each tick by itself: `place` says which strips each slot computes.
fn plan_ticks(
    problem: &Problem,
    place: impl Fn(&[Sheet<'_>]) -> Vec<Vec<Strip>>,
) -> Result<StepPlan, PlanError> {
    by_tick(problem, |documents, next_group| {
        let sheets = Sheet::of(documents, problem.geometry.kv_heads());
        group::tasks(&sheets, &place(&sheets), next_group)
    })
}
