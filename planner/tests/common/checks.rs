//! What the tasks of every plan must hold, whoever made it.

use std::collections::{BTreeMap, BTreeSet};

use outboard_attention::{Document, DocumentId, Mask, MaskPart, PlannedTask, Span, StepPlan};
use outboard_planner::Problem;

/// Every cell exactly once, by tasks that reach no further than their cells, in sound groups.
pub fn check_tasks(problem: &Problem, plan: &StepPlan) {
    let Problem { geometry, documents, slots, .. } = problem;
    plan.check(documents, geometry).expect("every cell exactly once");
    assert_eq!(plan.slots as usize, slots.len());

    let by_id: BTreeMap<DocumentId, &Document> = documents.iter().map(|d| (d.id(), d)).collect();
    for (_, task) in plan.tasks() {
        let mask = by_id[&task.document].mask(geometry.kv_heads()).clip(task.q, task.kv, task.kv_heads);
        let sees = |row: usize| mask.cells_of_row(row) > 0;
        assert!(sees(task.q.start()) && sees(task.q.end() - 1), "idle rows at an end of {task:?}");
        assert_eq!(task.kv, keys(&mask), "{task:?}");
    }
    check_groups(plan, &by_id);
}

/// The rows of each task have one home rank, which sends them and gets their outputs.
pub fn check_rows(problem: &Problem, plan: &StepPlan) {
    for (_, task) in plan.tasks() {
        let document = problem.documents.iter().find(|d| d.id() == task.document).expect("a known document");
        let homes = document.homes().iter().filter(|h| !h.tokens.intersect(task.q).is_empty());
        let ranks: BTreeSet<u32> = homes.map(|h| h.rank).collect();
        assert_eq!(ranks.len(), 1, "rows of several ranks in one task: {task:?}");
    }
}

/// From the first to the last key that any row sees.
fn keys(mask: &Mask) -> Span {
    let row = |p: &MaskPart, i: usize| Some(p.slice.keys_of(i)).filter(|keys| !keys.is_empty());
    let all = mask.parts().iter().flat_map(|p| p.slice.q().iter().filter_map(move |i| row(p, i)));
    all.reduce(Span::hull).expect("no empty task")
}

/// A group is the tasks of one document, kv-head range, slot and home, numbered in plan order; kv-head ranges of one document
/// on one slot are equal or disjoint.
fn check_groups(plan: &StepPlan, by_id: &BTreeMap<DocumentId, &Document>) {
    let mut members: BTreeMap<u32, Vec<&PlannedTask>> = BTreeMap::new();
    let mut heads: BTreeMap<(DocumentId, u32), BTreeSet<Span>> = BTreeMap::new();
    let mut last = 0;
    for (_, task) in plan.tasks() {
        let group = members.entry(task.group).or_default();
        assert_eq!(task.position as usize, group.len(), "positions in plan order");
        group.push(task);
        assert!(task.group >= last, "groups in plan order");
        last = task.group;
        heads.entry((task.document, task.slot)).or_default().insert(task.kv_heads);
    }
    let home = |t: &PlannedTask| {
        let homes = by_id[&t.document].homes();
        homes.iter().find(|home| home.tokens.contains(t.q.start())).map(|home| home.rank)
    };
    let key = |t: &PlannedTask| (t.document, t.kv_heads, t.slot, home(t));
    let keys: BTreeSet<_> = members.values().map(|tasks| key(tasks[0])).collect();
    assert_eq!(keys.len(), members.len(), "one group a document, range, slot and home");
    assert!(members.values().all(|tasks| tasks.iter().all(|t| key(t) == key(tasks[0]))));
    for ranges in heads.values() {
        let ranges: Vec<&Span> = ranges.iter().collect();
        assert!(ranges.windows(2).all(|pair| !pair[0].meets(*pair[1])), "{ranges:?}");
    }
}
