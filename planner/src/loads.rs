//! How evenly work is spread, before a plan and after.

use std::collections::BTreeMap;

use outboard_attention::{Document, DocumentId, HeadGeometry, Span, StepPlan};

/// Cells per tick and per rank (or slot), each counted once per kv head.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Loads {
    /// `ticks[n][rank]`, ticks in order of their numbers. All ticks have the same length.
    pub ticks: Vec<Vec<u64>>,
}

impl Loads {
    /// Work per rank when every rank computes the rows it is home of. `ranks` is how many ranks there are; documents of
    /// ranks beyond are left out.
    pub fn at_home(documents: &[Document], geometry: &HeadGeometry, ranks: usize) -> Loads {
        let position = |rank: u32| usize::try_from(rank).ok().filter(|rank| *rank < ranks);
        Loads::tally(documents, geometry, ranks, position)
    }

    /// The same for ranks that are not numbered from zero: load n is that of `ranks[n]`. `ranks` ascend.
    pub fn at_home_of(documents: &[Document], geometry: &HeadGeometry, ranks: &[u32]) -> Loads {
        Loads::tally(documents, geometry, ranks.len(), |rank| ranks.binary_search(&rank).ok())
    }

    fn tally(
        documents: &[Document],
        geometry: &HeadGeometry,
        ranks: usize,
        position: impl Fn(u32) -> Option<usize>,
    ) -> Loads {
        let mut ticks: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
        for document in documents {
            let loads = ticks.entry(document.tick()).or_insert_with(|| vec![0; ranks]);
            let mask = document.mask(geometry.kv_heads());
            for home in document.homes() {
                if let Some(load) = position(home.rank).and_then(|rank| loads.get_mut(rank)) {
                    let rows =
                        mask.clip(home.tokens, Span::to(document.tokens()), Span::to(geometry.kv_heads()));
                    *load = load.saturating_add(rows.cells());
                }
            }
        }
        Loads { ticks: ticks.into_values().collect() }
    }

    /// Work per slot under `plan`. Tasks of unknown documents or slots count nothing.
    pub fn planned(plan: &StepPlan, documents: &[Document], geometry: &HeadGeometry) -> Loads {
        let masks: BTreeMap<DocumentId, _> =
            documents.iter().map(|d| (d.id(), d.mask(geometry.kv_heads()))).collect();
        let tick = |tasks: &[outboard_attention::PlannedTask]| {
            let mut loads = vec![0u64; plan.slots as usize];
            for task in tasks {
                if let (Some(load), Some(mask)) =
                    (loads.get_mut(task.slot as usize), masks.get(&task.document))
                {
                    *load = load.saturating_add(mask.clip(task.q, task.kv, task.kv_heads).cells());
                }
            }
            loads
        };
        Loads { ticks: plan.ticks.iter().map(|t| tick(&t.tasks)).collect() }
    }

    /// Work per rank or slot, all ticks together.
    pub fn totals(&self) -> Vec<u64> {
        let mut totals = vec![0u64; self.ticks.first().map_or(0, Vec::len)];
        for tick in &self.ticks {
            for (total, load) in totals.iter_mut().zip(tick) {
                *total = total.saturating_add(*load);
            }
        }
        totals
    }

    /// The busiest over the mean, equal weights: 1 is perfect. With several ticks, maxima are taken per tick and summed.
    /// A step without work counts as balanced.
    pub fn max_over_mean(&self) -> f64 {
        self.max_over_mean_by(|_| 1.0)
    }

    /// The same for work over `weight(slot)`.
    pub fn max_over_mean_by(&self, weight: impl Fn(usize) -> f64) -> f64 {
        let totals = self.totals();
        let cells: f64 = totals.iter().map(|&c| c as f64).sum();
        let weights: f64 = (0..totals.len()).map(&weight).sum();
        if cells > 0.0 { self.worst_by(&weight) * weights / cells } else { 1.0 }
    }

    /// The most work over `weight(slot)` of each tick, summed.
    pub(crate) fn worst_by(&self, weight: impl Fn(usize) -> f64) -> f64 {
        let worst = |tick: &Vec<u64>| {
            tick.iter().enumerate().map(|(slot, &cells)| cells as f64 / weight(slot)).fold(0.0, f64::max)
        };
        self.ticks.iter().map(worst).sum()
    }
}
