//! One step of one training over all ranks.

use serde::Serialize;

use super::super::protocol::{Mode, PlacedCells, RankStep};
use super::{lost, ratio};

/// One step of one training over all ranks, as `{"kind": "step"}`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct StepLine {
    pub(crate) kind: &'static str,
    pub(crate) step: u64,
    pub(crate) attention: Mode,
    pub(crate) loss: f64,
    /// Of the slowest rank.
    pub(crate) seconds: f64,
    pub(crate) tokens_per_second: f64,
    pub(crate) tokens: u64,
    pub(crate) documents: u64,
    pub(crate) dropped_bytes: u64,
    /// Most over mean attention cells of a rank (local), or before balancing with each rank's rows as it holds them
    /// (pool).
    pub(crate) imbalance_before: f64,
    /// Most over mean attention cells of a slot.
    pub(crate) imbalance_after: f64,
    pub(crate) bytes_moved: u64,
    /// What the plan predicted to move.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bytes_predicted: Option<u64>,
    /// What a plan predicts to move with documents where they are dealt to, where tokens are placed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bytes_with_fixed_homes: Option<u64>,
    /// Most over mean tokens of a rank, where tokens are placed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tokens_imbalance: Option<f64>,
    /// Inside core attention, mean over ranks.
    pub(crate) attention_seconds: f64,
    /// Of that, the rank's device computed none, mean over ranks.
    pub(crate) exposed_seconds: f64,
    /// Waiting for the slowest rank's backward pass, mean over ranks.
    pub(crate) wait_seconds: f64,
    /// In the gradient exchange but not waiting, mean over ranks.
    pub(crate) exchange_seconds: f64,
    /// 1 - exposed / communication time, both summed over ranks; 1 when nothing moved.
    pub(crate) communication_hidden: f64,
    pub(crate) tasks: u64,
    pub(crate) tasks_resent: u64,
    pub(crate) servers_lost: u64,
    /// What each rank had and took, by rank.
    pub(crate) ranks: Vec<RankLine>,
}

/// One rank's part of a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct RankLine {
    pub(crate) seconds: f64,
    pub(crate) attention_seconds: f64,
    pub(crate) wait_seconds: f64,
    /// Tokens of each document, or of each range of one that the rank holds.
    pub(crate) documents: Vec<usize>,
    /// Attention cells of its documents, or of its rows of them.
    pub(crate) cells: u64,
    /// Where the plan puts them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) placed: Option<Vec<PlacedCells>>,
}

impl StepLine {
    /// Sums up one step of one training. `None` when there is no rank.
    pub(crate) fn new(ranks: &[RankStep]) -> Option<StepLine> {
        let first = ranks.first()?;
        let most = |value: fn(&RankStep) -> f64| ranks.iter().map(value).fold(0.0, f64::max);
        let mean = |value: fn(&RankStep) -> f64| ranks.iter().map(value).sum::<f64>() / ranks.len() as f64;
        let sum = |value: fn(&RankStep) -> u64| ranks.iter().map(value).sum::<u64>();
        let own = ratio(most(|r| r.cells as f64), mean(|r| r.cells as f64));
        let seconds = most(|r| r.seconds);
        let tokens = sum(|r| r.tokens);
        Some(StepLine {
            kind: "step",
            step: first.step,
            attention: first.mode,
            loss: first.loss,
            seconds,
            tokens_per_second: ratio(tokens as f64, seconds),
            tokens,
            documents: sum(|r| r.documents_begun),
            dropped_bytes: first.dropped_bytes,
            imbalance_before: first.pool.as_ref().map_or(own, |p| p.imbalance_before),
            imbalance_after: first.pool.as_ref().map_or(own, |p| p.imbalance_after),
            bytes_moved: sum(|r| r.pool.as_ref().map_or(0, |p| p.bytes_moved)),
            bytes_predicted: first.pool.as_ref().map(|p| p.bytes_predicted),
            bytes_with_fixed_homes: None,
            tokens_imbalance: first.pool.as_ref().map(|p| p.tokens_imbalance).filter(|most| *most > 0.0),
            attention_seconds: mean(|r| r.attention_seconds),
            exposed_seconds: mean(|r| r.pool.as_ref().map_or(0.0, |p| p.exposed_seconds)),
            wait_seconds: mean(|r| r.wait_seconds),
            exchange_seconds: mean(|r| r.exchange_seconds),
            communication_hidden: hidden(ranks),
            tasks: sum(|r| r.pool.as_ref().map_or(0, |p| p.tasks)),
            tasks_resent: sum(|r| r.pool.as_ref().map_or(0, |p| p.tasks_resent)),
            servers_lost: lost(ranks).len() as u64,
            ranks: ranks.iter().map(RankLine::new).collect(),
        })
    }
}

impl StepLine {
    /// With what fixed homes would move, where that is known.
    pub(super) fn beside_fixed_homes(self, bytes: Option<u64>) -> StepLine {
        StepLine { bytes_with_fixed_homes: bytes, ..self }
    }
}

impl RankLine {
    fn new(rank: &RankStep) -> RankLine {
        RankLine {
            seconds: rank.seconds,
            attention_seconds: rank.attention_seconds,
            wait_seconds: rank.wait_seconds,
            documents: rank.documents.clone(),
            cells: rank.cells,
            placed: rank.pool.as_ref().map(|pool| pool.placed.clone()),
        }
    }
}

/// The share of communication time that ranks did not wait for.
fn hidden(ranks: &[RankStep]) -> f64 {
    let pools = || ranks.iter().filter_map(|r| r.pool.as_ref());
    let communication: f64 = pools().map(|p| p.communication_seconds).sum();
    let exposed: f64 = pools().map(|p| p.exposed_seconds).sum();
    if communication > 0.0 { 1.0 - (exposed / communication).min(1.0) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::super::tests::step;
    use super::*;

    #[test]
    fn dropped_bytes_are_those_of_all_ranks_already() {
        let rank = RankStep { dropped_bytes: 100, ..step(Mode::Local, 1.0, 0.5, 0.0) };
        assert_eq!(StepLine::new(&[rank.clone(), rank]).unwrap().dropped_bytes, 100);
    }
}
