//! What a run amounts to: figures of each step over all ranks, and of the whole. Pure.

use std::collections::BTreeSet;

use serde::Serialize;

use super::protocol::{Mode, RankStep};

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
    /// Most over mean attention cells of a rank (local) or before balancing (pool).
    pub(crate) imbalance_before: f64,
    /// Most over mean attention cells of a slot.
    pub(crate) imbalance_after: f64,
    pub(crate) bytes_moved: u64,
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
            documents: sum(|r| r.documents),
            dropped_bytes: first.dropped_bytes,
            imbalance_before: first.pool.as_ref().map_or(own, |p| p.imbalance_before),
            imbalance_after: first.pool.as_ref().map_or(own, |p| p.imbalance_after),
            bytes_moved: sum(|r| r.pool.as_ref().map_or(0, |p| p.bytes_moved)),
            attention_seconds: mean(|r| r.attention_seconds),
            exposed_seconds: mean(|r| r.pool.as_ref().map_or(0.0, |p| p.exposed_seconds)),
            wait_seconds: mean(|r| r.wait_seconds),
            exchange_seconds: mean(|r| r.exchange_seconds),
            communication_hidden: hidden(ranks),
            tasks: sum(|r| r.pool.as_ref().map_or(0, |p| p.tasks)),
            tasks_resent: sum(|r| r.pool.as_ref().map_or(0, |p| p.tasks_resent)),
            servers_lost: lost(ranks).len() as u64,
        })
    }
}

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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_relative_loss_difference: Option<f64>,
    /// Sum over steps of the most cells of a rank over the sum of their means.
    pub(crate) imbalance: f64,
    pub(crate) bytes_moved: u64,
    pub(crate) tasks_planned: u64,
    pub(crate) tasks_computed: u64,
    pub(crate) tasks_resent: u64,
    pub(crate) servers_lost: u64,
    pub(crate) trainings: Vec<Training>,
}

/// Times of one training, summed over steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Training {
    pub(crate) attention: Mode,
    pub(crate) seconds: f64,
    pub(crate) tokens_per_second: f64,
    pub(crate) loss_first: f64,
    pub(crate) loss_last: f64,
    /// Inside core attention, mean over ranks.
    pub(crate) attention_seconds: f64,
    /// Of that, the rank's device computed none.
    pub(crate) exposed_seconds: f64,
    /// Waiting for the slowest rank's backward pass, mean over ranks.
    pub(crate) wait_seconds: f64,
    /// In the gradient exchange but not waiting, mean over ranks.
    pub(crate) exchange_seconds: f64,
    /// The rest of the slowest rank's time: the model and the optimizer. Documents are read outside of all these.
    pub(crate) other_seconds: f64,
}

/// Everything that ranks reported, one list of ranks a step and training, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Record {
    pub(crate) steps: Vec<Vec<RankStep>>,
    pub(crate) layers: u64,
    /// Element type of Q, K, V and dO.
    pub(crate) dtype: String,
    /// Tasks that the servers' own counters say they computed.
    pub(crate) tasks_computed: u64,
    /// Whether every server of the run is still there to be asked.
    pub(crate) counters_complete: bool,
}

impl Record {
    /// Tasks whose results ranks took.
    pub(crate) fn tasks_accepted(&self) -> u64 {
        self.steps.iter().flatten().filter_map(|r| r.pool.as_ref()).map(|p| p.tasks).sum()
    }

    /// Sums up the run. `None` when no step was done.
    pub(crate) fn summary(&self) -> Option<Summary> {
        let lines: Vec<StepLine> = self.steps.iter().filter_map(|ranks| StepLine::new(ranks)).collect();
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
        let first_mode = last.attention;
        let cells = |most: bool| -> f64 {
            let of_step = |ranks: &Vec<RankStep>| {
                let cells = ranks.iter().map(|r| r.cells as f64);
                if most { cells.fold(0.0, f64::max) } else { cells.sum::<f64>() / ranks.len().max(1) as f64 }
            };
            self.of(first_mode).map(of_step).sum()
        };
        // Every rank reports the tasks of the whole plan; those of a step are computed once a layer and direction.
        let planned =
            |ranks: &Vec<RankStep>| ranks.first().and_then(|r| r.pool.as_ref()).map(|p| p.planned_tasks);
        Some(Summary {
            kind: "summary",
            dtype: self.dtype.clone(),
            steps: self.of(first_mode).count() as u64,
            loss_first: last.loss_first,
            loss_last: last.loss_last,
            speedup,
            ideal_speedup: self.ideal_speedup(),
            max_relative_loss_difference: difference.reduce(f64::max),
            imbalance: ratio(cells(true), cells(false)),
            bytes_moved: lines.iter().map(|l| l.bytes_moved).sum(),
            tasks_planned: self.steps.iter().filter_map(planned).sum::<u64>() * self.layers * 2,
            tasks_computed: self.tasks_computed,
            tasks_resent: lines.iter().map(|l| l.tasks_resent).sum(),
            servers_lost: lost(self.steps.iter().flatten()).len() as u64,
            trainings,
        })
    }

    /// Sum over steps of max over ranks (rest + attention) over the sum of max over ranks (rest + mean attention), from
    /// the local training's times. A rank's rest leaves out what it waited for slower ranks.
    fn ideal_speedup(&self) -> Option<f64> {
        let (mut unbalanced, mut balanced) = (0.0, 0.0);
        for ranks in self.of(Mode::Local) {
            let rest = |r: &RankStep| r.seconds - r.attention_seconds - r.wait_seconds;
            let mean = ranks.iter().map(|r| r.attention_seconds).sum::<f64>() / ranks.len() as f64;
            unbalanced += ranks.iter().map(|r| rest(r) + r.attention_seconds).fold(0.0, f64::max);
            balanced += ranks.iter().map(|r| rest(r) + mean).fold(0.0, f64::max);
        }
        (balanced > 0.0).then(|| unbalanced / balanced)
    }

    fn of(&self, mode: Mode) -> impl Iterator<Item = &Vec<RankStep>> {
        self.steps.iter().filter(move |ranks| ranks.first().is_some_and(|r| r.mode == mode))
    }
}

impl Training {
    fn new<'a>(mode: Mode, lines: impl Iterator<Item = &'a StepLine>) -> Option<Training> {
        let lines: Vec<_> = lines.collect();
        let (first, last) = (lines.first()?, lines.last()?);
        let sum = |value: fn(&StepLine) -> f64| lines.iter().map(|line| value(line)).sum::<f64>();
        let (seconds, attention) = (sum(|l| l.seconds), sum(|l| l.attention_seconds));
        let (wait, exchange) = (sum(|l| l.wait_seconds), sum(|l| l.exchange_seconds));
        Some(Training {
            attention: mode,
            seconds,
            tokens_per_second: ratio(sum(|l| l.tokens as f64), seconds),
            loss_first: first.loss,
            loss_last: last.loss,
            attention_seconds: attention,
            exposed_seconds: sum(|l| l.exposed_seconds),
            wait_seconds: wait,
            exchange_seconds: exchange,
            other_seconds: (seconds - attention - wait - exchange).max(0.0),
        })
    }
}

/// The share of communication time that ranks did not wait for.
fn hidden(ranks: &[RankStep]) -> f64 {
    let pools = || ranks.iter().filter_map(|r| r.pool.as_ref());
    let communication: f64 = pools().map(|p| p.communication_seconds).sum();
    let exposed: f64 = pools().map(|p| p.exposed_seconds).sum();
    if communication > 0.0 { 1.0 - (exposed / communication).min(1.0) } else { 1.0 }
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
    use super::super::protocol::PoolStep;
    use super::*;

    fn step(mode: Mode, seconds: f64, attention: f64, wait: f64) -> RankStep {
        RankStep {
            step: 0,
            mode,
            loss: 2.0,
            seconds,
            attention_seconds: attention,
            exchange_seconds: 0.0,
            wait_seconds: wait,
            tokens: 100,
            documents: 1,
            dropped_bytes: 0,
            cells: (attention * 10.0) as u64,
            pool: None,
        }
    }

    #[test]
    fn ideal_speedup_leaves_out_waiting_for_the_slowest() {
        // Rest is 1 s on both; attention 3 s and 1 s; the second waits 2 s for the first.
        let local = vec![step(Mode::Local, 4.0, 3.0, 0.0), step(Mode::Local, 4.0, 1.0, 2.0)];
        let record = Record { steps: vec![local], layers: 1, ..Record::default() };
        assert_eq!(record.ideal_speedup(), Some(4.0 / 3.0));
    }

    #[test]
    fn summary_compares_the_trainings_step_by_step() {
        let local = vec![step(Mode::Local, 4.0, 3.0, 0.0), step(Mode::Local, 4.0, 1.0, 2.0)];
        let mut pool = vec![step(Mode::Pool, 3.2, 2.1, 0.1), step(Mode::Pool, 3.2, 2.1, 0.1)];
        pool[0].loss = 2.0002;
        let record = Record { steps: vec![local, pool], layers: 1, ..Record::default() };
        let summary = record.summary().expect("steps were done");
        assert_eq!(summary.steps, 1);
        assert_eq!(summary.speedup, Some(4.0 / 3.2));
        assert!((summary.max_relative_loss_difference.unwrap() - 1e-4).abs() < 1e-9);
        assert_eq!(summary.trainings.len(), 2);
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
        let pool = |lost: &[u64]| PoolStep {
            imbalance_before: 1.5,
            imbalance_after: 1.0,
            planned_tasks: 10,
            tasks: 10,
            tasks_resent: 1,
            servers_lost: lost.to_vec(),
            bytes_moved: 7,
            exposed_seconds: 0.0,
            communication_seconds: 0.0,
            plan_seconds: 0.0,
        };
        let rank = |lost: &[u64]| RankStep { pool: Some(pool(lost)), ..step(Mode::Pool, 1.0, 0.5, 0.0) };
        let steps =
            vec![vec![rank(&[4]), rank(&[])], vec![rank(&[]), rank(&[4])], vec![rank(&[9]), rank(&[9])]];
        let record = Record { steps, layers: 1, ..Record::default() };
        let summary = record.summary().unwrap();
        assert_eq!((summary.servers_lost, summary.tasks_planned), (2, 60));
        assert_eq!(record.tasks_accepted(), 60);
    }

    #[test]
    fn dropped_bytes_are_those_of_all_ranks_already() {
        let rank = RankStep { dropped_bytes: 100, ..step(Mode::Local, 1.0, 0.5, 0.0) };
        assert_eq!(StepLine::new(&[rank.clone(), rank]).unwrap().dropped_bytes, 100);
    }
}
