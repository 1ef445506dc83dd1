//! Slow servers give tasks to others, over gRPC: cuts and slots stay, whoever computes them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{Coordinator, cuts, in_place, patient, server, servers};
use outboard_proto::v1;

const LENGTHS: [&[usize]; 2] = [&[4000, 100, 33], &[700, 1]];

struct Run {
    coordinator: Coordinator,
    job: u64,
    /// The next step.
    step: u64,
}

impl Run {
    /// The ranks of two with an in-place server each, or as many dedicated servers as asked for.
    async fn start(dedicated: u32) -> (Run, Vec<u64>) {
        let coordinator = Coordinator::start(patient()).await;
        let mut ids = Vec::new();
        for n in 0..dedicated.max(2) {
            let info = if dedicated == 0 { in_place(n + 1, "job", n) } else { server(n + 1) };
            ids.push(coordinator.register(info).await.unwrap());
        }
        let job = coordinator.join_all("job", 2).await;
        (Run { coordinator, job, step: 0 }, ids)
    }

    /// Plans a step and reports that servers took as long for each of its cells as `pace` says of them.
    async fn step(&mut self, pace: &BTreeMap<u64, f64>) -> Vec<v1::SubmitStepResponse> {
        let answers = self.coordinator.step(self.job, self.step, &LENGTHS).await;
        for (rank, answer) in (0..).zip(&answers) {
            let mut reports: BTreeMap<u64, v1::ServerReport> = BTreeMap::new();
            for task in &answer.tasks {
                let id = task.server_id;
                let report =
                    reports.entry(id).or_insert(v1::ServerReport { server_id: id, ..Default::default() });
                report.tasks += 2;
                report.compute_seconds += cells(task) * 1e-7 * pace.get(&id).copied().unwrap_or(1.0);
            }
            let reports = reports.into_values().collect();
            self.coordinator.report(self.job, rank, self.step, reports).await.unwrap();
        }
        self.step += 1;
        answers
    }

    async fn steps(&mut self, count: u32, pace: &BTreeMap<u64, f64>) -> Vec<v1::SubmitStepResponse> {
        let mut last = Vec::new();
        for _ in 0..count {
            last = self.step(pace).await;
        }
        last
    }
}

/// Cells of a causal task.
fn cells(task: &v1::PlannedTask) -> f64 {
    let heads = task.kv_heads.unwrap();
    let (rows, keys) = (task.q.unwrap(), task.kv.unwrap());
    let of_row = |row: u64| keys.end.min(row + 1).saturating_sub(keys.start);
    ((rows.start..rows.end).map(of_row).sum::<u64>() * (heads.end - heads.start)) as f64
}

/// Cells of each server.
fn work(answers: &[v1::SubmitStepResponse]) -> BTreeMap<u64, f64> {
    let mut work = BTreeMap::new();
    for task in answers.iter().flat_map(|answer| &answer.tasks) {
        *work.entry(task.server_id).or_default() += cells(task);
    }
    work
}

/// The server of each task.
fn place(answers: &[v1::SubmitStepResponse]) -> Vec<u64> {
    answers.iter().flat_map(|answer| answer.tasks.iter().map(|task| task.server_id)).collect()
}

#[tokio::test]
async fn a_slow_server_in_place_gives_tasks_to_the_other_rank_and_gets_them_back() {
    let (mut run, ids) = Run::start(0).await;
    let first = run.step(&BTreeMap::new()).await;
    let slow = run.steps(40, &BTreeMap::from([(ids[0], 2.0)])).await;
    assert_eq!(cuts(&first), cuts(&slow), "cuts and slots stay");
    let (before, after) = (work(&first), work(&slow));
    assert!((before[&ids[0]] / before[&ids[1]] - 1.0).abs() < 0.05, "{before:?}");
    // Half as fast, so half as much as the other, within a task.
    assert!((0.35..0.65).contains(&(after[&ids[0]] / after[&ids[1]])), "{after:?}");
    let again = run.steps(40, &BTreeMap::new()).await;
    assert_eq!(place(&again), place(&first));
}

#[tokio::test]
async fn noise_and_one_absurd_report_move_nothing() {
    let (mut run, ids) = Run::start(4).await;
    let first = run.step(&BTreeMap::new()).await;
    for n in 0..30usize {
        let mut pace: BTreeMap<u64, f64> = ids
            .iter()
            .enumerate()
            .map(|(m, &id)| (id, 0.95 + 0.01 * ((n * 7 + m * 5) % 11) as f64))
            .collect();
        if n == 20 {
            pace.insert(ids[2], 1e6);
        }
        assert_eq!(place(&run.step(&pace).await), place(&first), "step {n}");
    }
}

#[tokio::test]
async fn a_server_that_dies_is_spread_as_before_while_another_is_slow() {
    let (mut run, ids) = Run::start(4).await;
    let before = run.steps(30, &BTreeMap::from([(ids[0], 3.0)])).await;
    assert!(work(&before)[&ids[0]] < 0.6 * work(&before)[&ids[1]]);
    let lost = v1::ServerReport { server_id: ids[3], tasks: 0, compute_seconds: 0.0, lost: true };
    run.coordinator.report(run.job, 0, run.step - 1, vec![lost]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(10)).await;
    let after = run.step(&BTreeMap::new()).await;
    assert_eq!(cuts(&before), cuts(&after));
    assert_eq!(servers(&after), ids[..3]);
    let work = work(&after);
    let most = work.values().copied().fold(0.0, f64::max);
    assert!(work[&ids[0]] < 0.6 * most, "{work:?}");
    assert!((work[&ids[1]] / work[&ids[2]] - 1.0).abs() < 0.3, "{work:?}");
}
