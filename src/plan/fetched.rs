//! What servers fetch of documents: tokens that they use and their own rank does not hold.

use std::collections::BTreeMap;

use outboard_attention::{BandSlice, Document, DocumentId, MaskPart, PlannedTask, Span, StepPlan};
use outboard_planner::Problem;

/// The tasks of each document.
pub(super) type Tasks<'a> = BTreeMap<DocumentId, Vec<&'a PlannedTask>>;

/// Tokens, each once for every kv head for which it is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fetched {
    pub(super) rows: u64,
    pub(super) keys: u64,
}

/// What a part of a task uses, all of it.
#[derive(Clone, Copy, Debug)]
struct Use {
    kv_heads: Span,
    rows: Span,
    keys: Span,
}

/// The plan's tasks by document.
pub(super) fn by_document(plan: &StepPlan) -> Tasks<'_> {
    let mut tasks = Tasks::new();
    for (_, task) in plan.tasks() {
        tasks.entry(task.document).or_default().push(task);
    }
    tasks
}

/// What each slot with tasks of a document fetches of it.
pub(super) fn of_document(
    document: &Document,
    tasks: &[&PlannedTask],
    problem: &Problem,
) -> BTreeMap<u32, Fetched> {
    let mask = document.mask(problem.geometry.kv_heads());
    let mut uses: BTreeMap<u32, Vec<Use>> = BTreeMap::new();
    for task in tasks {
        let clipped = mask.clip(task.q, task.kv, task.kv_heads);
        uses.entry(task.slot).or_default().extend(clipped.parts().iter().filter_map(Use::of));
    }
    let of_slot = |(slot, uses): (u32, Vec<Use>)| {
        let rank = problem.slots.get(slot as usize).and_then(|slot| slot.rank);
        let own = document.homes().iter().filter(|home| Some(home.rank) == rank);
        (slot, fetched(&uses, &own.map(|home| home.tokens).collect::<Vec<_>>()))
    };
    uses.into_iter().map(of_slot).collect()
}

/// What each slot fetches of all documents.
pub(super) fn of_slots(problem: &Problem, plan: &StepPlan) -> Vec<Fetched> {
    let mut sums = vec![Fetched::default(); problem.slots.len()];
    let tasks = by_document(plan);
    for document in &problem.documents {
        let tasks = tasks.get(&document.id()).map_or(&[][..], Vec::as_slice);
        for (slot, fetched) in of_document(document, tasks, problem) {
            if let Some(sum) = sums.get_mut(slot as usize) {
                *sum = Fetched { rows: sum.rows + fetched.rows, keys: sum.keys + fetched.keys };
            }
        }
    }
    sums
}

impl Fetched {
    /// The mean over all kv heads, rounded.
    pub(super) fn of_a_head(self, kv_heads: usize) -> Fetched {
        let kv_heads = kv_heads.max(1) as u64;
        let mean = |tokens: u64| (tokens + kv_heads / 2) / kv_heads;
        Fetched { rows: mean(self.rows), keys: mean(self.keys) }
    }
}

impl Use {
    fn of(part: &MaskPart) -> Option<Use> {
        let (rows, keys) = used(&part.slice)?;
        Some(Use { kv_heads: part.kv_heads, rows, keys })
    }
}

/// The rows of a slice that see a key, and the keys that are seen: neither has gaps.
fn used(slice: &BandSlice) -> Option<(Span, Span)> {
    let (start, end) = (slice.kv().start() as i64, slice.kv().end() as i64);
    let first = slice.hi().map_or(i64::MIN, |hi| start.saturating_sub(hi)).max(slice.q().start() as i64);
    let after = slice.lo().map_or(i64::MAX, |lo| end.saturating_sub(lo)).min(slice.q().end() as i64);
    let rows = Span::new(usize::try_from(first).ok()?, usize::try_from(after).ok()?)?;
    let last = rows.end().checked_sub(1)?;
    Some((rows, slice.keys_of(rows.start()).hull(slice.keys_of(last))))
}

fn fetched(uses: &[Use], own: &[Span]) -> Fetched {
    let mut borders: Vec<usize> =
        uses.iter().flat_map(|one| [one.kv_heads.start(), one.kv_heads.end()]).collect();
    borders.sort_unstable();
    borders.dedup();
    let mut sum = Fetched::default();
    for pair in borders.windows(2) {
        let here = || uses.iter().filter(|one| one.kv_heads.contains(pair[0]));
        let heads = (pair[1] - pair[0]) as u64;
        sum.rows += heads * others(here().map(|one| one.rows).collect(), own);
        sum.keys += heads * others(here().map(|one| one.keys).collect(), own);
    }
    sum
}

/// How many tokens lie in any of the spans and in none of those that are `own`.
fn others(mut spans: Vec<Span>, own: &[Span]) -> u64 {
    spans.sort_unstable();
    let (mut tokens, mut until) = (0, 0);
    for span in spans {
        if let Some(new) = Span::new(span.start().max(until), span.end()) {
            let held: usize = own.iter().map(|own| own.intersect(new).len()).sum();
            tokens += (new.len() - held) as u64;
        }
        until = until.max(span.end());
    }
    tokens
}

#[cfg(test)]
mod tests {
    use outboard_planner::{Flow, Policy, plan_by};

    use super::super::examples::{in_place, mixed};
    use super::*;

    #[test]
    fn what_is_fetched_is_what_travels_forward() {
        for problem in [mixed(), in_place(3)] {
            let geometry = &problem.geometry;
            let element = geometry.dtype().bytes() as u64;
            let row = (geometry.group() * geometry.head_dim()) as u64 * element;
            let key = (geometry.head_dim() + geometry.v_head_dim()) as u64 * element;
            for policy in [Policy::Outboard, Policy::Cp, Policy::Distca { tolerance: 0.0 }, Policy::Fixed] {
                let plan = plan_by(&problem, policy).unwrap();
                let flows = Flow::of(&plan, &problem);
                for (slot, fetched) in of_slots(&problem, &plan).into_iter().enumerate() {
                    let here = flows.iter().filter(|flow| flow.slot == slot);
                    let bytes: u64 = here.map(|flow| flow.forward.there).sum();
                    assert_eq!(fetched.rows * row + fetched.keys * key, bytes, "{policy}, slot {slot}");
                }
            }
        }
    }

    #[test]
    fn tokens_used_twice_or_held_are_not_fetched_again() {
        let spans = vec![Span::at(10, 10), Span::to(15), Span::at(12, 2), Span::at(40, 5)];
        assert_eq!(others(spans, &[Span::to(5), Span::at(18, 24)]), 13 + 3);
        let of_a_head = Fetched { rows: 7, keys: 6 }.of_a_head(4);
        assert_eq!(of_a_head, Fetched { rows: 2, keys: 2 });
    }
}
