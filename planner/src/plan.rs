//! A step's plan, tick by tick.

use std::collections::BTreeMap;

use outboard_attention::{Document, PlannedTask, Span, StepPlan, TickPlan};

use crate::balance::balance;
use crate::cost::Cost;
use crate::sheet::Sheet;
use crate::split::split;
use crate::start::{shares, start};
use crate::{PlanError, Problem, group};

/// Decides who computes which piece of every document. See the crate's documentation for what is guaranteed.
///
/// # Errors
/// A [`PlanError`] when the problem makes no sense.
pub fn plan(problem: &Problem) -> Result<StepPlan, PlanError> {
    problem.check()?;
    let mut by_tick: BTreeMap<u32, Vec<&Document>> = BTreeMap::new();
    for document in &problem.documents {
        by_tick.entry(document.tick()).or_default().push(document);
    }
    let mut next_group = 0;
    let mut ticks = Vec::with_capacity(by_tick.len());
    for (tick, mut documents) in by_tick {
        documents.sort_unstable_by_key(|document| document.id());
        ticks.push(TickPlan { tick, tasks: plan_tick(problem, &documents, &mut next_group)? });
    }
    Ok(StepPlan { ticks, slots: problem.slots.len() as u32 })
}

fn plan_tick(
    problem: &Problem,
    documents: &[&Document],
    next_group: &mut u32,
) -> Result<Vec<PlannedTask>, PlanError> {
    let sheets = Sheet::of(documents, problem.geometry.kv_heads());
    let work =
        |sheet: &Sheet<'_>| sheet.cells(Span::to(sheet.document.tokens())) * sheet.kv_heads.len() as u64;
    let shares = shares(problem, sheets.iter().map(work).sum());
    let mut held = start(&sheets, &shares);
    balance(&sheets, &Cost::new(&problem.geometry), &shares, &mut held);
    let pieces: Vec<_> = held.iter_mut().map(|strips| split(&sheets, strips)).collect();
    group::tasks(&sheets, &pieces, next_group)
}
