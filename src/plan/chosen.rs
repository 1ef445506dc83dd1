//! What was chosen where documents came without homes.

use outboard_attention::StepPlan;
use outboard_planner::Problem;

use super::fetched::{Fetched, of_slots};
use crate::holdings::Holdings;
use crate::page::numbers::{count, things};

/// The homes of a step, for whom some were chosen.
#[derive(Clone, Debug)]
pub(super) struct Chosen {
    /// How far a rank might lie above the mean number of tokens.
    slack: f64,
    /// How many documents came without homes, and how many there are.
    free: usize,
    documents: usize,
    pub(super) holdings: Holdings,
    /// What each slot fetches.
    pub(super) fetched: Vec<Fetched>,
}

impl Chosen {
    /// Of a step of whose documents `free` came without homes.
    pub(super) fn of(problem: &Problem, plan: &StepPlan, slack: f64, free: usize) -> Chosen {
        Chosen {
            slack,
            free,
            documents: problem.documents.len(),
            holdings: Holdings::of(&problem.documents, &problem.slots),
            fetched: of_slots(problem, plan),
        }
    }

    /// All of it in a line.
    pub(super) fn words(&self) -> String {
        format!(
            "{} had their homes chosen, with a token slack of {}: tokens max / mean {:.4}, {} of {} split over ranks",
            things(self.free, "document"),
            self.slack,
            self.holdings.max_over_mean(),
            count(self.holdings.split),
            things(self.documents, "document"),
        )
    }
}
