//! What a draft of homes is worth, which only a plan tells: a greedy one of each, and a full one of the best.

use outboard_attention::Document;

use super::field::{Draft, Field};
use super::with_homes;
use crate::plan::{Effort, Tick};
use crate::{PlanError, Problem, Rates, memory, trade};

/// Tolerances at which a layer may take least time.
const TOLERANCES: [f64; 3] = [0.05, 0.2, 0.8];

/// A tick that is to be settled.
pub(super) struct Pricing<'a> {
    pub(super) problem: &'a Problem,
    pub(super) field: &'a Field<'a>,
    pub(super) documents: &'a [&'a Document],
}

/// A draft by its greedy plan.
#[derive(Clone, Debug)]
pub(super) struct Priced {
    pub(super) draft: Draft,
    /// Bytes of both passes when it is balanced, and a busy link and lasting imbalance besides. Where rates are given, layer
    /// time counts more. Infinite where it does not fit the slots' memory.
    pub(super) price: f64,
    /// Layer time, where rates are given.
    pub(super) seconds: f64,
}

impl Pricing<'_> {
    pub(super) fn price(&self, draft: Draft) -> Result<Priced, PlanError> {
        let Pricing { problem, field, documents } = *self;
        let (homes, besides) = field.what_may_move(&draft, problem.profile.is_some());
        let mut some = documents.to_vec();
        some.retain(|document| document.is_placed() || homes.contains_key(&document.id()));
        let some: Vec<Document> = with_homes(some.into_iter(), homes)?;
        let some: Vec<&Document> = some.iter().collect();
        let tick = Tick::new(problem, &some).with_work_besides(&besides);
        let held = tick.hold(problem.tolerance, f64::INFINITY, Effort::Greedy);
        if memory::excess(&tick, &held).is_some() {
            return Ok(Priced { draft, price: f64::INFINITY, seconds: f64::INFINITY });
        }
        let (ports, traffic) = trade::traffic(&tick, &held);
        let bytes = traffic.forward.total as f64 + traffic.backward.total as f64;
        let longest = traffic.forward.longest_of(&ports) + traffic.backward.longest_of(&ports);
        // What memory keeps from moving stays where it is too much.
        let lasting = (tick.busiest_over_mean(&held) / (1.0 + 2.0 * problem.tolerance)).max(1.0);
        let price = (1.0 + bytes) * (1.0 + longest).sqrt().sqrt() * lasting * lasting * lasting * lasting;
        let Some(rates) = problem.rates else { return Ok(Priced { draft, price, seconds: 0.0 }) };
        let still = tick.hold(problem.tolerance, f64::INFINITY, Effort::Nothing);
        let others = TOLERANCES.iter().map(|&tolerance| tick.hold(tolerance, f64::INFINITY, Effort::Greedy));
        let all = others.chain([held, still]).map(|held| trade::seconds(&tick, rates, &held));
        let seconds = all.fold(f64::INFINITY, f64::min);
        // Of plans that take about as long, the one that moves less.
        Ok(Priced { draft, price: seconds * price.sqrt().sqrt().sqrt().sqrt().sqrt(), seconds })
    }

    /// Layer time of the tick's full plan.
    pub(super) fn seconds(&self, draft: &Draft, rates: Rates) -> Result<f64, PlanError> {
        let placed = with_homes(self.documents.iter().copied(), self.field.homes(draft))?;
        let placed: Vec<&Document> = placed.iter().collect();
        let mut tick = Tick::new(self.problem, &placed);
        let held = tick.best_weighed();
        Ok(trade::seconds(&tick, rates, &held))
    }
}
