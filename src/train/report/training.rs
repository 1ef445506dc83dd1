//! Times of a training that was run.

use serde::Serialize;

use super::super::protocol::Mode;
use super::ratio;
use super::step::{RankLine, StepLine};

/// Times of one training, summed over steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Training {
    pub(crate) attention: Mode,
    pub(crate) seconds: f64,
    pub(crate) tokens_per_second: f64,
    pub(crate) loss_first: f64,
    pub(crate) loss_last: f64,
    /// Mean over steps of the slowest rank's time, waiting left out.
    pub(crate) step_seconds: f64,
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

impl Training {
    pub(super) fn new<'a>(mode: Mode, lines: impl Iterator<Item = &'a StepLine>) -> Option<Training> {
        let lines: Vec<_> = lines.collect();
        let (first, last) = (lines.first()?, lines.last()?);
        let sum = |value: fn(&StepLine) -> f64| lines.iter().map(|line| value(line)).sum::<f64>();
        let (seconds, attention) = (sum(|l| l.seconds), sum(|l| l.attention_seconds));
        let slowest = lines.iter().map(|line| slowest(&line.ranks)).sum::<f64>();
        let (wait, exchange) = (sum(|l| l.wait_seconds), sum(|l| l.exchange_seconds));
        Some(Training {
            attention: mode,
            seconds,
            tokens_per_second: ratio(sum(|l| l.tokens as f64), seconds),
            loss_first: first.loss,
            loss_last: last.loss,
            step_seconds: ratio(slowest, lines.len() as f64),
            attention_seconds: attention,
            exposed_seconds: sum(|l| l.exposed_seconds),
            wait_seconds: wait,
            exchange_seconds: exchange,
            other_seconds: (seconds - attention - wait - exchange).max(0.0),
        })
    }
}

/// The longest that a rank of a step was at work, which is what the others waited for.
fn slowest(ranks: &[RankLine]) -> f64 {
    ranks.iter().map(|rank| rank.seconds - rank.wait_seconds).fold(0.0, f64::max)
}
