//! A step's plan, tick by tick.

use std::collections::{BTreeMap, BTreeSet};

use outboard_attention::{PlannedTask, Span, StepPlan, TickPlan};

use crate::{PlanError, Problem};

/// Decides who computes which piece of every document.
///
/// # Errors
/// A [`PlanError`] when the problem makes no sense.
pub fn plan(problem: &Problem) -> Result<StepPlan, PlanError> {
    problem.check()?;
    let kv_heads = problem.geometry.kv_heads();
    let slot_of: BTreeMap<u32, u32> =
        problem.slots.iter().zip(0..).filter_map(|(slot, n)| Some((slot.rank?, n))).collect();
    let mut documents: Vec<_> = problem.documents.iter().collect();
    documents.sort_unstable_by_key(|d| d.id());
    let ticks: BTreeSet<u32> = documents.iter().map(|d| d.tick()).collect();
    let mut group = 0;
    let mut plans = Vec::new();
    for tick in ticks {
        let mut tasks = Vec::new();
        for (n, document) in documents.iter().filter(|d| d.tick() == tick).enumerate() {
            let mask = document.mask(kv_heads);
            for home in document.homes() {
                let rows = mask.clip(home.tokens, Span::to(document.tokens()), Span::to(kv_heads));
                if rows.parts().is_empty() {
                    continue;
                }
                let slot = slot_of.get(&home.rank).copied().unwrap_or((n % problem.slots.len()) as u32);
                let (q, kv) = (home.tokens, Span::to(document.tokens()));
                tasks.push(PlannedTask {
                    document: document.id(),
                    q,
                    kv,
                    kv_heads: Span::to(kv_heads),
                    slot,
                    group,
                    position: 0,
                });
                group += 1;
            }
        }
        plans.push(TickPlan { tick, tasks });
    }
    Ok(StepPlan { ticks: plans, slots: problem.slots.len() as u32 })
}
