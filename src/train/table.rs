//! The table at the end of a run, and the lines under it.

use comfy_table::{Table, presets};
use indicatif::HumanBytes;

use super::protocol::Mode;
use super::report::{Predicted, Summary, Training};
use crate::device::Device;

const COLUMNS: [&str; 10] = [
    "training",
    "loss, first to last",
    "tokens/s",
    "seconds",
    "slowest rank, s/step",
    "core attention",
    "idle",
    "waiting",
    "gradients",
    "model",
];

/// A row a training: those that were run, and what the local one's times say of others.
pub(super) fn table(summary: &Summary) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(COLUMNS);
    let of = |mode| summary.trainings.iter().filter(move |t| t.attention == mode).map(measured);
    let predictions = summary.predictions.iter().map(predicted);
    for row in of(Mode::Local).chain(predictions).chain(of(Mode::Pool)) {
        table.add_row(row);
    }
    table
}

fn measured(training: &Training) -> Vec<String> {
    let idle = match training.attention {
        Mode::Local => "-".to_owned(),
        Mode::Pool => format!("{:.1}", training.exposed_seconds),
    };
    vec![
        training.attention.name().to_owned(),
        format!("{:.4} to {:.4}", training.loss_first, training.loss_last),
        format!("{:.0}", training.tokens_per_second),
        format!("{:.1}", training.seconds),
        format!("{:.2}", training.step_seconds),
        format!("{:.1}", training.attention_seconds),
        idle,
        format!("{:.1}", training.wait_seconds),
        format!("{:.1}", training.exchange_seconds),
        format!("{:.1}", training.other_seconds),
    ]
}

fn predicted(training: &Predicted) -> Vec<String> {
    let none = || "-".to_owned();
    vec![
        format!("{} (predicted)", training.attention),
        none(),
        format!("{:.0}", training.tokens_per_second),
        format!("{:.1}", training.seconds),
        format!("{:.2}", training.step_seconds),
        format!("{:.1}", training.attention_seconds),
        none(),
        format!("{:.1}", training.wait_seconds),
        none(),
        format!("{:.1}", training.other_seconds),
    ]
}

/// The lines under it.
pub(super) fn words(summary: &Summary, cores_shared: bool, device: Device) -> Vec<String> {
    let of = |mode| summary.trainings.iter().filter(move |t| t.attention == mode);
    let mut lines = vec![format!("Q, K, V and dO of core attention in {}", summary.dtype)];
    if let Some((speedup, ideal)) = summary.speedup.zip(summary.ideal_speedup) {
        let share = if ideal > 1.0 { 100.0 * (speedup - 1.0) / (ideal - 1.0) } else { 0.0 };
        lines.push(match cores_shared {
            _ if device != Device::Cpu => {
                format!("speedup {speedup:.3} by {device} over attention on the ranks' cores")
            }
            false => format!("speedup {speedup:.3}, ideal {ideal:.3}: {share:.0}% of what balance can give"),
            true => "no speedup is claimed: ranks and servers share cores".to_owned(),
        });
    }
    if let Some((speedup, tokens)) = summary.wlb_speedup.zip(summary.wlb_token_imbalance)
        && !cores_shared
    {
        lines.push(format!(
            "whole documents packed by their attention (wlb), without a pool: predicted speedup {speedup:.3}, \
             with {tokens:.2} times the mean tokens on the fullest rank"
        ));
    }
    let steps = (summary.local_step_seconds, summary.predicted_step_seconds, summary.measured_step_seconds);
    if let (Some(local), Some(predicted), Some(measured)) = steps {
        lines.push(format!(
            "step of the slowest rank: {local:.2} s with local attention, {predicted:.2} s as the plans predict, \
             {measured:.2} s measured with the pool"
        ));
    }
    if let Some(difference) = summary.max_relative_loss_difference {
        lines.push(format!("largest relative difference of loss {difference:.1e}"));
    }
    // Where only placed rows were trained, nobody computed the documents that ranks are dealt.
    if summary.placed_imbalance.is_none() || of(Mode::Local).next().is_some() {
        lines.push(format!(
            "imbalance of the documents {:.3} (most over mean cells of a rank)",
            summary.imbalance
        ));
    }
    if let Some((cells, tokens)) = summary.placed_imbalance.zip(summary.tokens_imbalance) {
        lines.push(format!(
            "tokens placed by the planner: imbalance of their rows {cells:.3}, at most {tokens:.3} times the mean tokens \
             on a rank"
        ));
    }
    if summary.tasks_planned > 0 {
        lines.push(format!(
            "tasks: {} planned, {} computed by the servers' own counters, {} resent, {} servers lost; {} moved",
            summary.tasks_planned,
            summary.tasks_computed,
            summary.tasks_resent,
            summary.servers_lost,
            HumanBytes(summary.bytes_moved)
        ));
    }
    lines.extend(bytes(summary));
    lines
}

/// What moved in a step, beside what plans predict.
fn bytes(summary: &Summary) -> Option<String> {
    let a_step = |bytes: u64| HumanBytes(bytes / summary.steps.max(1));
    let (moved, predicted) = (a_step(summary.bytes_moved), a_step(summary.bytes_predicted?));
    let fixed = summary.bytes_with_fixed_homes.map(|bytes| format!(", {} with fixed homes", a_step(bytes)));
    let fixed = fixed.unwrap_or_default();
    Some(format!("bytes of a step: {moved} moved; the plans predict {predicted}{fixed}"))
}
