//! What the local training's times say of trainings that were not run: the same documents, shared otherwise.
//!
//! A rank's step is its attention and the rest. Attention is taken to be proportional to cells, the rest to tokens,
//! each at the rate of that step over all ranks. Waiting is no part of either: it follows.

use std::collections::BTreeMap;

use outboard_attention::{Document, DocumentId, HeadGeometry, HomeRange, Span};
use outboard_planner::{Policy, Problem, Slot, plan_by};
use serde::Serialize;

use super::super::protocol::{PlacedCells, RankStep};
use super::ratio;

/// A training as predicted, summed over steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Predicted {
    /// How attention is shared.
    pub(crate) attention: &'static str,
    /// Of the slowest rank.
    pub(crate) seconds: f64,
    pub(crate) tokens_per_second: f64,
    /// Of the slowest rank, mean over steps.
    pub(crate) step_seconds: f64,
    /// Inside core attention, mean over ranks.
    pub(crate) attention_seconds: f64,
    /// Waiting for the slowest rank, mean over ranks.
    pub(crate) wait_seconds: f64,
    /// Everything else, gradient exchange included, mean over ranks.
    pub(crate) other_seconds: f64,
}

/// What all predictions add up to, step by step.
#[derive(Clone, Debug, Default)]
pub(super) struct Predictions {
    steps: u64,
    tokens: f64,
    /// As it was.
    local: Sum,
    /// Even attention at no cost.
    ideal: Sum,
    wlb: Sum,
    wlb_most_tokens: f64,
    wlb_mean_tokens: f64,
    wlb_steps: u64,
    planned: Sum,
    planned_steps: u64,
}

/// One rank's time of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Time {
    attention: f64,
    rest: f64,
}

/// Times of steps.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    slowest: f64,
    attention: f64,
    rest: f64,
}

/// What a rank has been dealt.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Work {
    tokens: u64,
    cells: f64,
}

impl Predictions {
    /// Adds a step, as the local training measured it, and with the plan that the pooled training had for it.
    pub(super) fn add(&mut self, local: &[RankStep], pooled: Option<&[RankStep]>) {
        let times: Vec<Time> = local.iter().map(Time::measured).collect();
        let mean = times.iter().map(|time| time.attention).sum::<f64>() / times.len().max(1) as f64;
        self.steps += 1;
        self.tokens += local.iter().map(|rank| rank.tokens as f64).sum::<f64>();
        self.local.add(&times);
        self.ideal.add(&times.iter().map(|time| Time { attention: mean, ..*time }).collect::<Vec<_>>());
        if let Some(work) = packed(local) {
            self.wlb.add(&shared_by(&times, &work));
            self.wlb_most_tokens += work.iter().map(|work| work.tokens as f64).fold(0.0, f64::max);
            self.wlb_mean_tokens +=
                work.iter().map(|work| work.tokens as f64).sum::<f64>() / work.len().max(1) as f64;
            self.wlb_steps += 1;
        }
        if let Some(pooled) = pooled {
            // Of what each rank is dealt, the part of tokens that it holds; all of them where none are placed.
            let tokens = local
                .iter()
                .zip(pooled)
                .map(|(local, pooled)| ratio(pooled.tokens as f64, local.tokens as f64));
            self.planned.add(&planned(&times, pooled, tokens));
            self.planned_steps += 1;
        }
    }

    /// Sum over steps of max over ranks (rest + attention) over the sum of max over ranks (rest + mean attention).
    pub(super) fn ideal_speedup(&self) -> Option<f64> {
        self.over(&self.ideal, self.steps)
    }

    pub(super) fn wlb_speedup(&self) -> Option<f64> {
        self.over(&self.wlb, self.wlb_steps)
    }

    pub(super) fn wlb_token_imbalance(&self) -> Option<f64> {
        (self.wlb_steps > 0).then(|| ratio(self.wlb_most_tokens, self.wlb_mean_tokens))
    }

    pub(super) fn planned_step_seconds(&self) -> Option<f64> {
        self.complete(self.planned_steps).then(|| self.planned.slowest / self.steps as f64)
    }

    /// Those that were predicted for all steps.
    pub(super) fn list(&self) -> Vec<Predicted> {
        let all = [("wlb", &self.wlb, self.wlb_steps), ("pool", &self.planned, self.planned_steps)];
        let known = all.into_iter().filter(|(_, _, steps)| self.complete(*steps));
        known.map(|(attention, sum, _)| self.predicted(attention, sum)).collect()
    }

    fn predicted(&self, attention: &'static str, sum: &Sum) -> Predicted {
        Predicted {
            attention,
            seconds: sum.slowest,
            tokens_per_second: ratio(self.tokens, sum.slowest),
            step_seconds: ratio(sum.slowest, self.steps as f64),
            attention_seconds: sum.attention,
            wait_seconds: (sum.slowest - sum.attention - sum.rest).max(0.0),
            other_seconds: sum.rest,
        }
    }

    fn complete(&self, steps: u64) -> bool {
        self.steps > 0 && steps == self.steps
    }

    fn over(&self, sum: &Sum, steps: u64) -> Option<f64> {
        (self.complete(steps) && sum.slowest > 0.0).then(|| self.local.slowest / sum.slowest)
    }
}

impl Time {
    fn measured(rank: &RankStep) -> Time {
        let attention = rank.attention_seconds;
        Time { attention, rest: rank.seconds - attention - rank.wait_seconds }
    }
}

impl Sum {
    fn add(&mut self, times: &[Time]) {
        let mean = |part: fn(&Time) -> f64| times.iter().map(part).sum::<f64>() / times.len().max(1) as f64;
        self.slowest += times.iter().map(|time| time.attention + time.rest).fold(0.0, f64::max);
        self.attention += mean(|time| time.attention);
        self.rest += mean(|time| time.rest);
    }
}

/// All of a step's attention and rest, shared by work.
fn shared_by(times: &[Time], work: &[Work]) -> Vec<Time> {
    let attention = times.iter().map(|time| time.attention).sum::<f64>();
    let rest = times.iter().map(|time| time.rest).sum::<f64>();
    let cells = work.iter().map(|work| work.cells).sum::<f64>();
    let tokens = work.iter().map(|work| work.tokens as f64).sum::<f64>();
    let share = |work: &Work| Time {
        attention: attention * ratio(work.cells, cells),
        rest: rest * ratio(work.tokens as f64, tokens),
    };
    work.iter().map(share).collect()
}

/// Every rank's own rest, by the tokens that it holds, and attention where the plan puts it: on the rank's own cores what
/// its server has. A rank has no result before the busiest dedicated server is done either.
fn planned(times: &[Time], pooled: &[RankStep], tokens: impl Iterator<Item = f64>) -> Vec<Time> {
    let attention = times.iter().map(|time| time.attention).sum::<f64>();
    let mut servers: BTreeMap<u64, (Option<u32>, u64)> = BTreeMap::new();
    for placed in pooled.iter().filter_map(|rank| rank.pool.as_ref()).flat_map(|pool| &pool.placed) {
        let PlacedCells { server, rank, cells } = *placed;
        servers.entry(server).or_insert((rank, 0)).1 += cells;
    }
    let all: u64 = servers.values().map(|(_, cells)| cells).sum();
    let most = |of: Option<u32>| {
        let theirs = servers.values().filter(|(rank, _)| *rank == of).map(|(_, cells)| *cells);
        theirs.max().unwrap_or(0)
    };
    let dedicated = most(None);
    let share = |(rank, (time, tokens)): (u32, (&Time, f64))| Time {
        attention: attention * ratio(most(Some(rank)).max(dedicated) as f64, all as f64),
        rest: time.rest * tokens,
    };
    (0..).zip(times.iter().zip(tokens)).map(share).collect()
}

/// What each rank has when the step's documents are packed whole, those with the most attention first, each to the
/// rank with the least: what trainers do without a pool. Ranks then hold unequal numbers of tokens.
fn packed(ranks: &[RankStep]) -> Option<Vec<Work>> {
    // One head: documents and ranks compare the same with any number.
    let geometry = HeadGeometry::standard(1, 1, 1).ok()?;
    let documents = (0..).zip(ranks).flat_map(|(rank, step)| {
        (0..).zip(&step.documents).map(move |(index, &tokens)| {
            let home = HomeRange { rank, tokens: Span::to(tokens) };
            Document::new(DocumentId { rank, index }, tokens, vec![home])
        })
    });
    let documents = documents.collect::<Result<Vec<_>, _>>().ok()?;
    let slots = (0..ranks.len() as u32).map(Slot::in_place).collect();
    let plan = plan_by(&Problem::new(geometry, documents, slots), Policy::Wlb).ok()?;
    let mut work = vec![Work::default(); ranks.len()];
    for (_, task) in plan.tasks() {
        let tokens = task.q.len() as u64;
        if let Some(work) = work.get_mut(task.slot as usize) {
            work.tokens += tokens;
            // A task is a whole document.
            work.cells += tokens as f64 * (tokens + 1) as f64 / 2.0;
        }
    }
    Some(work)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::super::protocol::{Mode, PoolStep};
    use super::super::tests::{pool_step, step};
    use super::*;

    fn predictions(steps: &[(Vec<RankStep>, Option<Vec<RankStep>>)]) -> Predictions {
        let mut predictions = Predictions::default();
        for (local, pooled) in steps {
            predictions.add(local, pooled.as_deref());
        }
        predictions
    }

    fn rank(rest: f64, documents: &[usize]) -> RankStep {
        let cells: u64 = documents.iter().map(|&n| (n * (n + 1) / 2) as u64).sum();
        // One second for 1000 cells.
        let attention = cells as f64 / 1000.0;
        RankStep {
            documents: documents.to_vec(),
            tokens: documents.iter().sum::<usize>() as u64,
            cells,
            ..step(Mode::Local, rest + attention, attention, 0.0)
        }
    }

    fn pooled(placed: &[(u64, Option<u32>, u64)]) -> RankStep {
        let placed = placed.iter().map(|&(server, rank, cells)| PlacedCells { server, rank, cells });
        let pool = PoolStep { placed: placed.collect(), ..pool_step() };
        RankStep { pool: Some(pool), ..step(Mode::Pool, 1.0, 0.5, 0.0) }
    }

    #[test]
    fn ideal_speedup_leaves_out_waiting_for_the_slowest() {
        // Rest is 1 s on both; attention 3 s and 1 s; the second waits 2 s for the first.
        let local = vec![step(Mode::Local, 4.0, 3.0, 0.0), step(Mode::Local, 4.0, 1.0, 2.0)];
        assert_eq!(predictions(&[(local, None)]).ideal_speedup(), Some(4.0 / 3.0));
    }

    #[test]
    fn whole_documents_go_to_the_rank_with_the_least_attention() {
        // 5050, 1275 and 1275 cells: the long one alone, the two others together, though these were dealt otherwise.
        let local = vec![rank(1.0, &[100, 50]), rank(1.0, &[50, 50, 50])];
        let predictions = predictions(&[(local, None)]);
        let (long, short) = (5.050, 1.275);
        let before = 1.0 + long + short;
        // All four short documents are 5.1 s and 200 of 300 tokens.
        let after = 2.0 * 200.0 / 300.0 + 4.0 * short;
        assert!((predictions.wlb_speedup().unwrap() - before / after).abs() < 1e-12);
        assert!((predictions.wlb_token_imbalance().unwrap() - 200.0 / 150.0).abs() < 1e-12);
        let listed = predictions.list();
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0].attention, "wlb");
        let parts = listed[0].attention_seconds + listed[0].wait_seconds + listed[0].other_seconds;
        assert!((parts - listed[0].seconds).abs() < 1e-12, "{listed:?}");
    }

    #[test]
    fn a_planned_step_is_the_rest_and_what_the_rank_s_own_server_has() {
        let local = vec![rank(1.0, &[100]), rank(2.0, &[50, 50])];
        let attention = 5.050 + 2.0 * 1.275;
        let placed = vec![pooled(&[(7, Some(0), 3000), (9, Some(1), 2050)]), pooled(&[(9, Some(1), 2550)])];
        let planned = predictions(&[(local, Some(placed))]).planned_step_seconds().unwrap();
        assert!((planned - (2.0 + attention * 4600.0 / 7600.0)).abs() < 1e-12, "{planned}");
    }

    #[test]
    fn the_rest_of_a_step_goes_with_the_tokens_that_are_placed() {
        let local = vec![rank(1.0, &[100]), rank(2.0, &[100])];
        let placed = vec![
            RankStep { tokens: 50, ..pooled(&[(7, Some(0), 5050)]) },
            RankStep { tokens: 150, ..pooled(&[(9, Some(1), 5050)]) },
        ];
        let planned = predictions(&[(local, Some(placed))]).planned_step_seconds().unwrap();
        assert!((planned - (2.0 * 1.5 + 5.050)).abs() < 1e-12, "{planned}");
    }

    #[test]
    fn every_rank_waits_for_the_busiest_dedicated_server() {
        let local = vec![rank(1.0, &[100]), rank(2.0, &[100])];
        let placed = vec![pooled(&[(7, None, 1000), (8, None, 4050)]), pooled(&[(7, None, 5050)])];
        let planned = predictions(&[(local, Some(placed))]).planned_step_seconds().unwrap();
        assert!((planned - (2.0 + 10.1 * 6050.0 / 10100.0)).abs() < 1e-12, "{planned}");
    }

    #[test]
    fn a_plan_that_is_not_known_for_every_step_is_not_predicted() {
        let local = || vec![rank(1.0, &[10])];
        let placed = vec![pooled(&[(1, Some(0), 55)])];
        let predictions = predictions(&[(local(), Some(placed)), (local(), None)]);
        assert_eq!(predictions.planned_step_seconds(), None);
        assert_eq!(predictions.list().len(), 1);
        assert_eq!(Predictions::default().wlb_speedup(), None);
    }

    proptest! {
        #[test]
        fn predictions_are_within_what_sharing_can_do(
            ranks in prop::collection::vec((0.1f64..5.0, prop::collection::vec(1usize..3000, 1..6)), 1..5),
        ) {
            let local: Vec<_> = ranks.iter().map(|(rest, documents)| rank(*rest, documents)).collect();
            let at_home: Vec<_> = (0..).zip(&local).map(|(n, r)| RankStep { tokens: r.tokens, ..pooled(&[(u64::from(n), Some(n), r.cells)]) }).collect();
            let predictions = predictions(&[(local, Some(at_home))]);
            let ideal = predictions.ideal_speedup().unwrap();
            // Even attention can cost time where the rank with the least of it has the most of everything else, but no
            // more than its rest lies above the mean.
            let rest = ranks.iter().map(|(rest, _)| *rest);
            let spread = rest.clone().fold(0.0, f64::max) - rest.sum::<f64>() / ranks.len() as f64;
            let (before, after) = (predictions.local.slowest, predictions.ideal.slowest);
            prop_assert!(after <= (before + spread) * (1.0 + 1e-9));
            let attention: f64 = ranks.iter().flat_map(|(_, documents)| documents).map(|&n| (n * (n + 1) / 2) as f64 / 1000.0).sum();
            let most_rest = ranks.iter().map(|(rest, _)| *rest).fold(0.0, f64::max);
            let even = most_rest + attention / ranks.len() as f64;
            prop_assert!((ideal * even / before - 1.0).abs() < 1e-9);
            // A plan that moves nothing changes nothing.
            let planned = predictions.planned_step_seconds().unwrap();
            prop_assert!((planned / predictions.local.slowest - 1.0).abs() < 1e-9);
            // However documents are packed, no rank takes less than the mean, or more than everything.
            let wlb = predictions.wlb.slowest;
            let mean = predictions.wlb.attention + predictions.wlb.rest;
            prop_assert!(wlb >= mean * (1.0 - 1e-9) && wlb <= mean * ranks.len() as f64 * (1.0 + 1e-9));
            // Whatever is packed, the sums stay.
            prop_assert!((predictions.wlb.attention / predictions.local.attention - 1.0).abs() < 1e-9);
            prop_assert!((predictions.wlb.rest / predictions.local.rest - 1.0).abs() < 1e-9);
            prop_assert!(predictions.wlb_token_imbalance().unwrap() >= 1.0);
        }
    }
}
