//! A step's plan, tick by tick.

use std::collections::BTreeMap;

use outboard_attention::{Document, PlannedTask, Span, StepPlan, TickPlan};

use crate::balance::balance;
use crate::cost::Cost;
use crate::memory::Resort;
use crate::profile::{cells_a_second, predicted};
use crate::sheet::{Sheet, Strip};
use crate::split::split;
use crate::start::{Share, shares, start};
use crate::{PlanError, Problem, group, memory, trade};

/// Decides who computes which piece of every document. See the crate's documentation for what is guaranteed.
///
/// # Errors
/// A [`PlanError`] when the problem makes no sense.
pub fn plan(problem: &Problem) -> Result<StepPlan, PlanError> {
    let plan = by_tick(problem, |documents, next_group| Tick::new(problem, documents).plan(next_group))?;
    plan.ticks.iter().try_for_each(|tick| memory::check(problem, tick))?;
    Ok(plan)
}

/// A plan whose ticks are planned one by one, each from its documents in order of their ids. Group numbers go on from
/// tick to tick.
///
/// # Errors
/// When the problem makes no sense, or a tick's.
pub(crate) fn by_tick<'a>(
    problem: &'a Problem,
    mut tasks: impl FnMut(&[&'a Document], &mut u32) -> Result<Vec<PlannedTask>, PlanError>,
) -> Result<StepPlan, PlanError> {
    problem.check()?;
    let mut by_tick: BTreeMap<u32, Vec<&Document>> = BTreeMap::new();
    for document in &problem.documents {
        by_tick.entry(document.tick()).or_default().push(document);
    }
    let mut next_group = 0;
    let mut ticks = Vec::with_capacity(by_tick.len());
    for (tick, mut documents) in by_tick {
        documents.sort_unstable_by_key(|document| document.id());
        ticks.push(TickPlan { tick, tasks: tasks(&documents, &mut next_group)? });
    }
    Ok(StepPlan { ticks, slots: problem.slots.len() as u32 })
}

/// Work is dealt again at most so often for slots that hold too much.
const FITTINGS: usize = 12;

/// With a profile, slots are weighed anew so many times at most, by what they make of the work that they are given.
const WEIGHINGS: usize = 2;

/// How hard to look for who relieves whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effort {
    /// All work stays where it is at first.
    Nothing,
    /// Receivers are dealt once.
    Greedy,
    /// They are dealt out anew while bytes fall.
    Search,
}

/// One tick of a step: what is computed together.
pub(crate) struct Tick<'a> {
    pub(crate) problem: &'a Problem,
    pub(crate) sheets: Vec<Sheet<'a>>,
    /// Summed over kv heads.
    pub(crate) cells: u64,
    /// What each slot takes, relative to the others.
    weights: Vec<f64>,
    /// Cells of each slot that have no sheet and stay where they are.
    pub(crate) besides: Vec<u64>,
}

impl<'a> Tick<'a> {
    pub(crate) fn new(problem: &'a Problem, documents: &[&'a Document]) -> Tick<'a> {
        let sheets = Sheet::of(documents, problem.geometry.kv_heads());
        let work =
            |sheet: &Sheet<'_>| sheet.cells(Span::to(sheet.document.tokens())) * sheet.kv_heads.len() as u64;
        let cells = sheets.iter().map(work).sum();
        let weights = problem.slots.iter().map(|slot| slot.weight).collect();
        Tick { problem, sheets, cells, weights, besides: vec![0; problem.slots.len()] }
    }

    /// The same with so many cells more on the slots of ranks, which are left alone.
    pub(crate) fn with_work_besides(mut self, besides: &BTreeMap<u32, u64>) -> Tick<'a> {
        for (cells, slot) in self.besides.iter_mut().zip(&self.problem.slots) {
            *cells = slot.rank.and_then(|rank| besides.get(&rank)).copied().unwrap_or(0);
        }
        self.cells += self.besides.iter().sum::<u64>();
        self
    }

    /// The most work over weight of a slot that holds these strips, over the mean.
    pub(crate) fn busiest_over_mean(&self, held: &[Vec<Strip>]) -> f64 {
        let slots = held.iter().zip(&self.besides).zip(&self.problem.slots);
        let work = slots.map(|((strips, besides), slot)| {
            (strips.iter().map(Strip::cells).sum::<u64>() + besides) as f64 / slot.weight
        });
        let weights: f64 = self.problem.slots.iter().map(|slot| slot.weight).sum();
        work.fold(0.0, f64::max) * weights / (self.cells as f64).max(1.0)
    }

    /// What slots hold when none may have more than `1 + tolerance` times its share, and the link of each is to carry no more
    /// than its part of `reach`: cells of a link of 1. Slots that would hold more than their memory are given less.
    pub(crate) fn hold(&self, tolerance: f64, reach: f64, effort: Effort) -> Vec<Vec<Strip>> {
        let mut shares = shares(&self.problem.slots, &self.weights, tolerance, self.cells);
        for (share, besides) in shares.iter_mut().zip(&self.besides) {
            share.cap = share.cap.saturating_sub(*besides);
        }
        let mut held = self.hold_within(shares.clone(), reach, effort);
        let less = std::iter::repeat_n(Resort::Less, FITTINGS);
        let mut excess = memory::excess(self, &held);
        for resort in less.chain([Resort::Nothing, Resort::Nothing, Resort::Nobody]) {
            let Some(bytes) = &excess else { break };
            // Where a milder resort lowers no cap, a harder one may.
            if memory::lower(self, &mut shares, &held, bytes, resort) {
                held = self.hold_within(shares.clone(), reach, effort);
                excess = memory::excess(self, &held);
            }
        }
        held
    }

    fn hold_within(&self, mut shares: Vec<Share>, reach: f64, effort: Effort) -> Vec<Vec<Strip>> {
        let mut held = start(&self.sheets, &shares);
        if reach.is_finite() {
            for (share, strips) in shares.iter_mut().zip(&held) {
                let (home, carried) =
                    (strips.iter().map(Strip::cells).sum::<u64>(), (reach * share.link) as u64);
                share.cap = share.cap.min(home.saturating_add(carried)).max(home.saturating_sub(carried));
            }
        }
        if effort != Effort::Nothing {
            balance(&self.sheets, &Cost::new(&self.problem.geometry), &shares, &mut held, effort);
        }
        held
    }

    /// What slots hold in the best plan for the tick's weights.
    fn best(&self) -> Vec<Vec<Strip>> {
        match self.problem.rates {
            Some(rates) => trade::hold(self, rates),
            None => self.hold(self.problem.tolerance, f64::INFINITY, Effort::Search),
        }
    }

    /// The same, with slots weighed by what a profile makes of it.
    pub(crate) fn best_weighed(&mut self) -> Vec<Vec<Strip>> {
        let mut held = self.best();
        if let Some(profile) = &self.problem.profile {
            let seconds = |tick: &Tick<'_>, held: &[Vec<Strip>]| match tick.problem.rates {
                Some(rates) => trade::seconds(tick, rates, held),
                None if memory::excess(tick, held).is_some() => f64::INFINITY,
                None => predicted(tick, profile, held).iter().sum(),
            };
            for _ in 0..WEIGHINGS {
                // Work of shapes that are computed slowly counts more: slots are given cells by what they make of them.
                let Some(weights) = cells_a_second(self, profile, &held) else { break };
                self.weights = weights;
                let other = self.best();
                if seconds(self, &other) >= seconds(self, &held) {
                    break;
                }
                held = other;
            }
        }
        held
    }

    fn plan(&mut self, next_group: &mut u32) -> Result<Vec<PlannedTask>, PlanError> {
        let mut held = self.best_weighed();
        let pieces: Vec<_> = held.iter_mut().map(|strips| split(&self.sheets, strips)).collect();
        group::tasks(&self.sheets, &pieces, next_group)
    }
}
