//! What a run amounts to: figures of each step over all ranks, and of the whole. Pure.

mod predicted;
mod step;
mod training;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::protocol::{Mode, RankStep};
pub(crate) use predicted::Predicted;
use predicted::Predictions;
pub(crate) use step::StepLine;
pub(crate) use training::Training;

/// The whole run, as `{"kind": "summary"}`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Summary {
    pub(crate) kind: &'static str,
    /// Element type of Q, K, V and dO.
    pub(crate) dtype: String,
    pub(crate) steps: u64,
    pub(crate) loss_first: f64,
    pub(crate) loss_last: f64,
    /// Time of the local run over that of the pool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) speedup: Option<f64>,
    /// What balancing attention perfectly at no cost would give, from the local run's times.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ideal_speedup: Option<f64>,
    /// What packing whole documents by their attention, without a pool, would give, from the local run's times.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) wlb_speedup: Option<f64>,
    /// Sum over steps of the most tokens of a rank, packed so, over the sum of their means.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) wlb_token_imbalance: Option<f64>,
    /// The slowest rank's time of a step of the local training, waiting left out; mean over steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) local_step_seconds: Option<f64>,
    /// The same with attention where the plans put it, from the local run's times.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) predicted_step_seconds: Option<f64>,
    /// The same of the pooled training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) measured_step_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_relative_loss_difference: Option<f64>,
    /// Sum over steps of the most cells of a rank over the sum of their means: of the documents that ranks are dealt, or
    /// where only placed rows were trained, of those.
    pub(crate) imbalance: f64,
    /// Who decides which rank holds which tokens in the pooled training: fixed, or free for the planner.
    pub(crate) placement: &'static str,
    /// The same of the rows that the planner places on ranks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) placed_imbalance: Option<f64>,
    /// Most over mean tokens of a rank, of the step where that is most, where tokens are placed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tokens_imbalance: Option<f64>,
    pub(crate) bytes_moved: u64,
    /// What the plans predicted to move, in all layers and both directions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bytes_predicted: Option<u64>,
    /// What plans predict to move with documents where they are dealt to, where tokens are placed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bytes_with_fixed_homes: Option<u64>,
    pub(crate) tasks_planned: u64,
    pub(crate) tasks_computed: u64,
    pub(crate) tasks_resent: u64,
    pub(crate) servers_lost: u64,
    pub(crate) trainings: Vec<Training>,
    /// Trainings that were not run.
    pub(crate) predictions: Vec<Predicted>,
}

/// Everything that ranks reported, one list of ranks a step and training, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Record {
    pub(crate) steps: Vec<Vec<RankStep>>,
    pub(crate) layers: u64,
    /// Element type of Q, K, V and dO.
    pub(crate) dtype: String,
    /// Whether the planner places tokens.
    pub(crate) placed: bool,
    /// Where it does, bytes that fixed homes would move in each step, as far as they can be predicted.
    pub(crate) fixed_homes: BTreeMap<u64, u64>,
    /// Tasks that the servers' own counters say they computed.
    pub(crate) tasks_computed: u64,
    /// Whether every server of the run is still there to be asked.
    pub(crate) counters_complete: bool,
    /// Whether every server is known to compute as fast as a rank, so that a plan's times can be predicted.
    pub(crate) servers_like_ranks: bool,
}

impl Record {
    /// Tasks whose results ranks took.
    pub(crate) fn tasks_accepted(&self) -> u64 {
        self.steps.iter().flatten().filter_map(|r| r.pool.as_ref()).map(|p| p.tasks).sum()
    }

    /// Sums up one step of one training.
    pub(crate) fn line(&self, ranks: &[RankStep]) -> Option<StepLine> {
        let line = StepLine::new(ranks)?;
        let fixed = self.fixed_homes.get(&line.step).filter(|_| line.attention == Mode::Pool);
        Some(line.beside_fixed_homes(fixed.copied()))
    }

    /// Sums up the run. `None` when no step was done.
    pub(crate) fn summary(&self) -> Option<Summary> {
        let lines: Vec<StepLine> = self.steps.iter().filter_map(|ranks| self.line(ranks)).collect();
        let of = |mode| lines.iter().filter(move |line| line.attention == mode);
        let trainings: Vec<_> =
            [Mode::Local, Mode::Pool].into_iter().filter_map(|mode| Training::new(mode, of(mode))).collect();
        let last = trainings.last()?;
        let seconds = |mode| trainings.iter().find(|t| t.attention == mode).map(|t| t.seconds);
        let speedup = seconds(Mode::Local).zip(seconds(Mode::Pool)).map(|(local, pool)| ratio(local, pool));
        let difference = of(Mode::Local).zip(of(Mode::Pool)).map(|(local, pool)| {
            let difference = (local.loss - pool.loss).abs() / local.loss.abs().max(f64::MIN_POSITIVE);
            if difference.is_nan() { f64::INFINITY } else { difference }
        });
        let step_seconds = |mode| trainings.iter().find(|t| t.attention == mode).map(|t| t.step_seconds);
        let predictions = self.predictions();
        let pooled = of(Mode::Pool).next().is_some();
        // Every rank reports the tasks of the whole plan; those of a step are computed once a layer and direction.
        let planned =
            |ranks: &Vec<RankStep>| ranks.first().and_then(|r| r.pool.as_ref()).map(|p| p.planned_tasks);
        Some(Summary {
            kind: "summary",
            dtype: self.dtype.clone(),
            steps: self.of(last.attention).count() as u64,
            loss_first: last.loss_first,
            loss_last: last.loss_last,
            speedup,
            ideal_speedup: predictions.ideal_speedup(),
            wlb_speedup: predictions.wlb_speedup(),
            wlb_token_imbalance: predictions.wlb_token_imbalance(),
            local_step_seconds: step_seconds(Mode::Local),
            predicted_step_seconds: predictions.planned_step_seconds(),
            measured_step_seconds: step_seconds(Mode::Pool),
            max_relative_loss_difference: difference.reduce(f64::max),
            imbalance: self.imbalance(trainings.first().map_or(last.attention, |first| first.attention)),
            placement: if self.placed { "free" } else { "fixed" },
            placed_imbalance: self.placed.then(|| self.imbalance(Mode::Pool)),
            tokens_imbalance: of(Mode::Pool).filter_map(|line| line.tokens_imbalance).reduce(f64::max),
            bytes_moved: lines.iter().map(|l| l.bytes_moved).sum(),
            bytes_predicted: of(Mode::Pool)
                .map(|line| line.bytes_predicted)
                .sum::<Option<u64>>()
                .filter(|_| pooled),
            bytes_with_fixed_homes: of(Mode::Pool)
                .map(|line| line.bytes_with_fixed_homes)
                .sum::<Option<u64>>()
                .filter(|_| pooled),
            tasks_planned: self.steps.iter().filter_map(planned).sum::<u64>() * self.layers * 2,
            tasks_computed: self.tasks_computed,
            tasks_resent: lines.iter().map(|l| l.tasks_resent).sum(),
            servers_lost: lost(self.steps.iter().flatten()).len() as u64,
            predictions: predictions.list(),
            trainings,
        })
    }

    /// Sum over a training's steps of the most cells of a rank over the sum of their means.
    fn imbalance(&self, mode: Mode) -> f64 {
        let cells = |ranks: &Vec<RankStep>| ranks.iter().map(|rank| rank.cells as f64).collect::<Vec<_>>();
        let most = self.of(mode).map(|ranks| cells(ranks).into_iter().fold(0.0, f64::max));
        let mean = self.of(mode).map(|ranks| cells(ranks).iter().sum::<f64>() / ranks.len().max(1) as f64);
        ratio(most.sum(), mean.sum())
    }

    /// What the local training's times say of other ways to share its attention.
    fn predictions(&self) -> Predictions {
        let number = |ranks: &[RankStep]| ranks.first().map(|rank| rank.step);
        let mut pooled: BTreeMap<_, &[RankStep]> = BTreeMap::new();
        if self.servers_like_ranks {
            pooled.extend(self.of(Mode::Pool).map(|ranks| (number(ranks), ranks.as_slice())));
        }
        let mut predictions = Predictions::default();
        for local in self.of(Mode::Local) {
            predictions.add(local, pooled.get(&number(local)).copied());
        }
        predictions
    }

    fn of(&self, mode: Mode) -> impl Iterator<Item = &Vec<RankStep>> {
        self.steps.iter().filter(move |ranks| ranks.first().is_some_and(|r| r.mode == mode))
    }
}

/// Servers that some rank found lost. Ranks may find the same one lost in different steps.
fn lost<'a>(ranks: impl IntoIterator<Item = &'a RankStep>) -> BTreeSet<u64> {
    ranks.into_iter().filter_map(|r| r.pool.as_ref()).flat_map(|p| p.servers_lost.iter().copied()).collect()
}

fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::super::protocol::{PlacedCells, PoolStep};
    use super::*;

    pub(super) fn step(mode: Mode, seconds: f64, attention: f64, wait: f64) -> RankStep {
        RankStep {
            step: 0,
            mode,
            loss: 2.0,
            seconds,
            attention_seconds: attention,
            exchange_seconds: 0.0,
            wait_seconds: wait,
            tokens: 100,
            documents: vec![100],
            documents_begun: 1,
            dropped_bytes: 0,
            cells: (attention * 10.0) as u64,
            pool: None,
        }
    }

    pub(super) fn pool_step() -> PoolStep {
        PoolStep {
            imbalance_before: 1.5,
            imbalance_after: 1.0,
            planned_tasks: 10,
            placed: Vec::new(),
            tasks: 10,
            tasks_resent: 1,
            servers_lost: Vec::new(),
            bytes_moved: 7,
            bytes_predicted: 6,
            tokens_imbalance: 0.0,
            exposed_seconds: 0.0,
            communication_seconds: 0.0,
            plan_seconds: 0.0,
        }
    }

    #[test]
    fn summary_compares_the_trainings_step_by_step() {
        let local = vec![step(Mode::Local, 4.0, 3.0, 0.0), step(Mode::Local, 4.0, 1.0, 2.0)];
        let mut pool = vec![step(Mode::Pool, 3.2, 2.1, 0.1), step(Mode::Pool, 3.25, 2.1, 0.2)];
        pool[0].loss = 2.0002;
        for (rank, cells) in [(0, 450), (1, 550)] {
            let placed = vec![PlacedCells { server: 5 + u64::from(rank), rank: Some(rank), cells }];
            pool[rank as usize].pool = Some(PoolStep { placed, ..pool_step() });
        }
        let steps = vec![pool, local];
        let record = Record { steps, layers: 1, servers_like_ranks: true, ..Record::default() };
        let summary = record.summary().expect("steps were done");
        assert_eq!(summary.steps, 1);
        assert_eq!(summary.speedup, Some(4.0 / 3.25));
        assert_eq!(summary.local_step_seconds, Some(4.0));
        // A rest of 1 s, and 55% of 4 s of attention.
        assert!((summary.predicted_step_seconds.unwrap() - 3.2).abs() < 1e-12);
        assert_eq!(summary.measured_step_seconds, Some(3.2 - 0.1));
        let named: Vec<_> = summary.predictions.iter().map(|p| p.attention).collect();
        assert_eq!(named, ["wlb", "pool"]);
        assert!((summary.max_relative_loss_difference.unwrap() - 1e-4).abs() < 1e-9);
        assert_eq!(summary.trainings.len(), 2);

        let unknown = Record { servers_like_ranks: false, ..record }.summary().unwrap();
        assert_eq!(unknown.predicted_step_seconds, None, "servers of unknown speed");
        assert_eq!(unknown.predictions.len(), 1);
    }

    #[test]
    fn placed_tokens_have_figures_beside_those_of_fixed_homes() {
        let local = |cells| RankStep { cells, documents_begun: 1, ..step(Mode::Local, 1.0, 0.5, 0.0) };
        let placed = |cells, documents_begun, tokens_imbalance| RankStep {
            pool: Some(PoolStep { bytes_predicted: 20, tokens_imbalance, ..pool_step() }),
            cells,
            documents: vec![60, 40],
            documents_begun,
            ..step(Mode::Pool, 1.0, 0.5, 0.0)
        };
        let next = |ranks: Vec<RankStep>| -> Vec<RankStep> {
            ranks.into_iter().map(|rank| RankStep { step: 1, ..rank }).collect()
        };
        let steps = vec![
            vec![local(30), local(10)],
            vec![placed(22, 2, 1.0), placed(18, 0, 1.0)],
            next(vec![placed(20, 1, 1.5), placed(20, 1, 1.5)]),
            next(vec![local(20), local(20)]),
        ];
        let fixed_homes = BTreeMap::from([(0, 100), (1, 50)]);
        let record = Record { steps, layers: 1, placed: true, fixed_homes, ..Record::default() };
        let summary = record.summary().unwrap();
        assert_eq!((summary.imbalance, summary.placed_imbalance), (50.0 / 40.0, Some(42.0 / 40.0)));
        assert_eq!((summary.placement, summary.tokens_imbalance), ("free", Some(1.5)));
        assert_eq!((summary.bytes_predicted, summary.bytes_with_fixed_homes), (Some(40), Some(150)));
        let lines: Vec<_> = record.steps.iter().map(|ranks| record.line(ranks).unwrap()).collect();
        assert!(lines.iter().all(|line| line.documents == 2), "a shared document counts once");
        let fixed: Vec<_> = lines.iter().map(|line| line.bytes_with_fixed_homes).collect();
        assert_eq!(fixed, [None, Some(100), Some(50), None]);

        let unknown = Record { fixed_homes: BTreeMap::from([(0, 100)]), ..record.clone() };
        assert_eq!(unknown.summary().unwrap().bytes_with_fixed_homes, None, "not of every step");
        let local_only = Record { steps: vec![record.steps[0].clone()], layers: 1, ..Record::default() };
        let summary = local_only.summary().unwrap();
        assert_eq!(
            (summary.placement, summary.bytes_predicted, summary.placed_imbalance),
            ("fixed", None, None)
        );
    }

    #[test]
    fn a_nan_loss_is_no_agreement() {
        let mut pool = step(Mode::Pool, 1.0, 0.5, 0.0);
        pool.loss = f64::NAN;
        let record = Record {
            steps: vec![vec![step(Mode::Local, 1.0, 0.5, 0.0)], vec![pool]],
            layers: 1,
            ..Record::default()
        };
        assert_eq!(record.summary().unwrap().max_relative_loss_difference, Some(f64::INFINITY));
    }

    #[test]
    fn no_step_no_summary() {
        assert!(Record::default().summary().is_none());
    }

    #[test]
    fn a_server_that_two_ranks_lose_in_different_steps_counts_once() {
        let pool = |lost: &[u64]| PoolStep { servers_lost: lost.to_vec(), ..pool_step() };
        let rank = |lost: &[u64]| RankStep { pool: Some(pool(lost)), ..step(Mode::Pool, 1.0, 0.5, 0.0) };
        let steps =
            vec![vec![rank(&[4]), rank(&[])], vec![rank(&[]), rank(&[4])], vec![rank(&[9]), rank(&[9])]];
        let record = Record { steps, layers: 1, ..Record::default() };
        let summary = record.summary().unwrap();
        assert_eq!((summary.servers_lost, summary.tasks_planned), (2, 60));
        assert_eq!(record.tasks_accepted(), 60);
    }
}
