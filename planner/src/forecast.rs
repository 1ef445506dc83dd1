//! Whether attention is worth taking out of the model, before a job runs: what a plan is predicted to make of a step.
//!
//! Without a pool a step takes as long as its slowest rank: its own attention, and the rest of the model over its
//! tokens. With one, attention takes what [`judge()`] says of the plan (in every pass of every layer the longer of
//! computing and carrying, of the slot and the link with most), and the ranks' rest is done besides.

use std::collections::BTreeMap;
use std::fmt;

use outboard_attention::StepPlan;

use crate::{Fault, Loads, PlanError, Problem, Rates, judge};

/// What a job's steps cost, other than by their documents.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepCosts {
    /// Layers of the model, all of one geometry.
    pub layers: u32,
    /// How fast slots, and ranks by themselves, compute attention, and how fast links carry.
    pub rates: Rates,
    /// What a rank takes for one of its tokens outside of core attention, forward and backward.
    pub rest_seconds_per_token: f64,
}

/// What one or more steps are predicted to take, one after another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Forecast {
    /// Ranks of the steps.
    pub ranks: usize,
    /// Sum of the slots' weights: how many ranks' worth of attention they compute at once.
    pub weight: f64,
    /// Every rank computes its own attention: the time of the slowest rank.
    pub local_seconds: f64,
    /// Of that, in attention.
    pub local_attention_seconds: f64,
    /// Attention as planned.
    pub planned_seconds: f64,
    /// The same over links that take no time.
    pub unlinked_seconds: f64,
    /// Attention spread over the slots by their weights, at no cost.
    pub ideal_seconds: f64,
    /// Cells of the rank with most.
    pub most_cells: f64,
    /// Cells of a rank on average.
    pub mean_cells: f64,
    /// Whether the plan was told how fast links are, so that it may leave work at home.
    pub told: bool,
}

/// Why attention is not worth disaggregating.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// There is nobody to share with.
    OneRank,
    /// The slots compute less than the ranks by themselves would.
    TooFewSlots,
    /// Plans would gain enough if links took no time, or were they not made for slow ones.
    SlowLinks,
    /// The ranks' documents have about equal attention as they are.
    Balanced,
    /// Most of a step is not attention.
    LittleAttention,
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Doubt::OneRank => "one rank has nobody to share its attention with",
            Doubt::TooFewSlots => "the servers compute less than the ranks by themselves would",
            Doubt::SlowLinks => "links are too slow to share attention evenly",
            Doubt::Balanced => "the ranks have about equal attention as they are",
            Doubt::LittleAttention => "attention is too small a part of a step",
        })
    }
}

impl Forecast {
    /// A gain below this is not worth a pool: it is within what one step differs from the next by.
    pub const LEAST_GAIN: f64 = 0.02;

    /// What `plan` is predicted to make of the step that `problem` describes. The rates are those of `costs`, whatever
    /// the plan was made for; those of slots are times their weight, and a rank without a slot has weight 1.
    ///
    /// # Errors
    /// A [`Fault`] as [`judge()`], and for costs that make no sense or give a time beyond all numbers.
    pub fn of_step(problem: &Problem, plan: &StepPlan, costs: &StepCosts) -> Result<Forecast, Fault> {
        let &StepCosts { layers, rates, rest_seconds_per_token: rest } = costs;
        if !(rest.is_finite() && rest >= 0.0) {
            return Err(PlanError::BadRest { seconds: rest }.into());
        }
        // All times are by these rates, which the judge checks, whatever profile the problem was planned with.
        let verdict = judge(plan, &Problem { rates: Some(rates), profile: None, ..problem.clone() })?;
        let passes = [verdict.forward, verdict.backward];
        let planned: f64 = passes.iter().map(|pass| pass.seconds(rates)).sum();
        let unlinked: f64 = passes.iter().map(|pass| pass.compute_seconds(rates)).sum();

        let shares = shares(problem);
        let most = |value: &dyn Fn(&Share) -> f64| shares.values().map(value).fold(0.0, f64::max);
        let rest_of = |share: &Share| rest * share.tokens as f64;
        let attention_of =
            |share: &Share| costs.attention_seconds(problem, share.cells as f64 / share.weight);
        let local = |share: &Share| rest_of(share) + attention_of(share);
        let slowest = shares.values().max_by(|a, b| local(a).total_cmp(&local(b)));
        let weight: f64 = problem.slots.iter().map(|slot| slot.weight).sum();
        let cells: f64 = shares.values().map(|share| share.cells as f64).sum();
        let most_rest = most(&rest_of);
        let forecast = Forecast {
            ranks: shares.len(),
            weight,
            local_seconds: slowest.map_or(0.0, local),
            local_attention_seconds: slowest.map_or(0.0, attention_of),
            planned_seconds: most_rest + f64::from(layers) * planned,
            unlinked_seconds: most_rest + f64::from(layers) * unlinked,
            ideal_seconds: most_rest + costs.attention_seconds(problem, cells / weight),
            most_cells: most(&|share| share.cells as f64),
            mean_cells: cells / shares.len().max(1) as f64,
            told: problem.rates.is_some(),
        };
        let longest = forecast.planned_seconds.max(forecast.local_seconds);
        if longest.is_finite() { Ok(forecast) } else { Err(PlanError::Endless { seconds: longest }.into()) }
    }

    /// This and then `next`.
    #[must_use]
    pub fn then(self, next: Forecast) -> Forecast {
        Forecast {
            ranks: self.ranks.max(next.ranks),
            weight: self.weight.min(next.weight),
            local_seconds: self.local_seconds + next.local_seconds,
            local_attention_seconds: self.local_attention_seconds + next.local_attention_seconds,
            planned_seconds: self.planned_seconds + next.planned_seconds,
            unlinked_seconds: self.unlinked_seconds + next.unlinked_seconds,
            ideal_seconds: self.ideal_seconds + next.ideal_seconds,
            most_cells: self.most_cells + next.most_cells,
            mean_cells: self.mean_cells + next.mean_cells,
            told: self.told || next.told,
        }
    }

    /// How much shorter the plan makes a step, as a fraction of what it takes without a pool. Below zero where the
    /// plan makes it longer.
    pub fn gain(&self) -> f64 {
        self.gain_by(self.planned_seconds)
    }

    /// The most that any plan could gain on these slots.
    pub fn ideal_gain(&self) -> f64 {
        self.gain_by(self.ideal_seconds)
    }

    /// The most over the mean cells of a rank: 1 is perfect balance.
    pub fn imbalance(&self) -> f64 {
        if self.mean_cells > 0.0 { self.most_cells / self.mean_cells } else { 1.0 }
    }

    /// The part of the slowest rank's time that is attention, without a pool: 0 to 1.
    pub fn attention_share(&self) -> f64 {
        if self.local_seconds > 0.0 { self.local_attention_seconds / self.local_seconds } else { 0.0 }
    }

    /// Why attention is not worth disaggregating, or `None` where the gain reaches [`Self::LEAST_GAIN`].
    pub fn doubt(&self) -> Option<Doubt> {
        if self.gain() >= Forecast::LEAST_GAIN {
            return None;
        }
        // The part of its attention that balance takes off the slowest rank. With the share it makes the gain, so the
        // smaller of both is to blame.
        let excess = 1.0 - 1.0 / self.imbalance();
        // Plans for slow links leave work at home, and then no link is seen to be slow.
        let (unlinked, ideal) = (self.gain_by(self.unlinked_seconds), self.ideal_gain());
        let given_up = self.told && ideal >= Forecast::LEAST_GAIN && unlinked < ideal / 2.0;
        Some(if unlinked >= Forecast::LEAST_GAIN || given_up {
            Doubt::SlowLinks
        } else if self.ranks <= 1 {
            Doubt::OneRank
        } else if self.weight < self.ranks as f64 {
            Doubt::TooFewSlots
        } else if excess <= self.attention_share() {
            Doubt::Balanced
        } else {
            Doubt::LittleAttention
        })
    }

    fn gain_by(&self, seconds: f64) -> f64 {
        let gain = 1.0 - seconds / self.local_seconds;
        // Nothing to compute, so nothing to gain.
        if gain.is_nan() || self.local_seconds <= 0.0 { 0.0 } else { gain }
    }
}

impl StepCosts {
    /// Both passes of all layers over `cells` cells, on a slot of weight 1.
    fn attention_seconds(&self, problem: &Problem, cells: f64) -> f64 {
        let flops = problem.geometry.forward_flops(1) + problem.geometry.backward_flops(1);
        f64::from(self.layers) * cells * flops / self.rates.flops_per_second
    }
}

/// What a rank has of a step.
#[derive(Clone, Copy, Debug)]
struct Share {
    tokens: u64,
    cells: u64,
    /// Of its device.
    weight: f64,
}

/// What every rank has that is home to a token or shares its device with a slot.
fn shares(problem: &Problem) -> BTreeMap<u32, Share> {
    let mut shares: BTreeMap<u32, Share> = BTreeMap::new();
    for slot in &problem.slots {
        if let Some(rank) = slot.rank {
            shares.insert(rank, Share { tokens: 0, cells: 0, weight: slot.weight });
        }
    }
    for home in problem.documents.iter().flat_map(|document| document.homes()) {
        let share = shares.entry(home.rank).or_insert(Share { tokens: 0, cells: 0, weight: 1.0 });
        share.tokens += home.tokens.len() as u64;
    }
    let ranks: Vec<u32> = shares.keys().copied().collect();
    let cells = Loads::at_home_of(&problem.documents, &problem.geometry, &ranks).totals();
    for (share, cells) in shares.values_mut().zip(cells) {
        share.cells = cells;
    }
    shares
}
