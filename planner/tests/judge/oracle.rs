//! What a plan is worth, by counting every cell and every token.

use std::collections::{BTreeMap, BTreeSet};

use outboard_attention::{Document, DocumentId, HeadShape, PlannedTask, StepPlan};
use outboard_planner::{Fault, PassVerdict, Problem, TILE, Verdict};

/// Query, key, kv head.
pub type Cell = (usize, usize, usize);

pub fn cells_of(document: &Document, kv_heads: usize) -> BTreeSet<Cell> {
    let mut cells = BTreeSet::new();
    for part in document.mask(kv_heads).parts() {
        let slice = part.slice;
        for (i, j) in slice.q().iter().flat_map(|i| slice.kv().iter().map(move |j| (i, j))) {
            let offset = j as i64 - i as i64;
            if slice.lo().is_none_or(|lo| lo <= offset) && slice.hi().is_none_or(|hi| offset <= hi) {
                cells.extend(part.kv_heads.iter().map(|h| (i, j, h)));
            }
        }
    }
    cells
}

pub fn inside(task: &PlannedTask, &(i, j, h): &Cell) -> bool {
    task.q.contains(i) && task.kv.contains(j) && task.kv_heads.contains(h)
}

/// The cells of each task, unless the plan is broken.
pub fn by_counting(problem: &Problem, plan: &StepPlan) -> Option<Vec<BTreeSet<Cell>>> {
    let kv_heads = problem.geometry.kv_heads();
    let mut left: BTreeMap<(u32, DocumentId), BTreeSet<Cell>> =
        problem.documents.iter().map(|d| ((d.tick(), d.id()), cells_of(d, kv_heads))).collect();
    let mut work = Vec::new();
    for (tick, task) in plan.tasks() {
        let left = left.get_mut(&(tick, task.document))?;
        let document = problem.documents.iter().find(|d| d.id() == task.document)?;
        let cells: BTreeSet<Cell> =
            cells_of(document, kv_heads).into_iter().filter(|cell| inside(task, cell)).collect();
        let within = task.q.end().max(task.kv.end()) <= document.tokens() && task.kv_heads.end() <= kv_heads;
        let known = (task.slot as usize) < problem.slots.len();
        if !within || !known || cells.is_empty() || !cells.iter().all(|cell| left.remove(cell)) {
            return None;
        }
        work.push(cells);
    }
    left.values().all(BTreeSet::is_empty).then_some(work)
}

pub fn is_true(fault: &Fault, problem: &Problem, plan: &StepPlan) -> bool {
    let kv_heads = problem.geometry.kv_heads();
    let task = |n: usize| *plan.tasks().nth(n).expect("a task of that number").1;
    let document = |id| problem.documents.iter().find(|d| d.id() == id).expect("a document of that name");
    let cells = |n: usize| {
        let task = task(n);
        cells_of(document(task.document), kv_heads).into_iter().filter(move |cell| inside(&task, cell))
    };
    match *fault {
        Fault::UnknownDocument { task: n, document, tick } => {
            task(n).document == document
                && !problem.documents.iter().any(|d| (d.tick(), d.id()) == (tick, document))
        }
        Fault::UnknownSlot { task: n, slot, slots, .. } => task(n).slot == slot && slot as usize >= slots,
        Fault::OutOfRange { task: n, document: id, span, bound, .. } => {
            let task = task(n);
            task.document == id && [task.q, task.kv, task.kv_heads].contains(&span) && !bound.covers(span)
        }
        Fault::Empty { task: n, document, .. } => task(n).document == document && cells(n).next().is_none(),
        Fault::Overlap { document, first, second } => {
            let others: BTreeSet<Cell> = cells(second).collect();
            first < second
                && task(first).document == document
                && cells(first).any(|cell| others.contains(&cell))
        }
        Fault::Missing { document: id, planned, needed } => {
            let tasks = plan.tasks().enumerate().filter(|(_, (_, task))| task.document == id);
            planned < needed
                && needed == cells_of(document(id), kv_heads).len() as u64
                && planned == tasks.map(|(n, _)| cells(n).count() as u64).sum::<u64>()
        }
        _ => false,
    }
}

/// What a plan is worth, cell by cell and token by token.
pub fn figures(problem: &Problem, plan: &StepPlan, work: &[BTreeSet<Cell>]) -> Verdict {
    let Problem { geometry, documents, slots, .. } = problem;
    let ticks: BTreeSet<u32> = documents.iter().map(Document::tick).collect();
    let weights: f64 = slots.iter().map(|slot| slot.weight).sum();
    let tasks: Vec<(u32, &PlannedTask)> = plan.tasks().collect();
    let busiest = |tick: Option<u32>, amount: &dyn Fn(usize) -> u64| {
        let of = |slot: usize| {
            let mine = (0..tasks.len()).filter(|&n| tasks[n].1.slot as usize == slot);
            mine.filter(|&n| tick.is_none_or(|tick| tasks[n].0 == tick)).map(amount).sum::<u64>()
        };
        (0..slots.len()).map(|slot| of(slot) as f64 / slots[slot].weight).fold(0.0, f64::max)
    };
    let cells = |n: usize| work[n].len() as u64;
    let tiles = |n: usize| tiles_of(&work[n]);
    let whole = |tick: u32| (0..tasks.len()).filter(|&n| tasks[n].0 == tick).map(cells).sum::<u64>() as f64;
    let total: f64 = ticks.iter().map(|&tick| whole(tick)).sum();
    let worst = |amount: &dyn Fn(usize) -> u64| ticks.iter().map(|&t| busiest(Some(t), amount)).sum::<f64>();
    let uncut: u64 = documents.iter().map(|d| tiles_of(&cells_of(d, geometry.kv_heads()))).sum();
    let ratio = |value: f64, of: f64| if of > 0.0 { value * weights / of } else { 1.0 };
    let largest = (0..slots.len()).map(|slot| {
        let mine: Vec<u64> =
            (0..tasks.len()).filter(|&n| tasks[n].1.slot as usize == slot).map(cells).collect();
        mine.iter().copied().max().unwrap_or(0) as f64 / mine.iter().sum::<u64>().max(1) as f64
    });
    let [forward, backward] = [false, true].map(|backward| {
        let ports = ticks.iter().map(|&tick| bytes(problem, plan, work, tick, backward));
        let (mut all, mut most, mut longest) = (0, 0, 0.0);
        for (total, ports) in ports {
            all += total;
            let over_link =
                ports.iter().zip(slots).map(|(port, slot)| port[0].max(port[1]) as f64 / slot.link);
            longest += over_link.fold(0.0, f64::max);
            most += ports.iter().flat_map(|port| &port[..2]).max().unwrap_or(&0);
        }
        let per_cell = if backward { geometry.backward_flops(1) } else { geometry.forward_flops(1) };
        PassVerdict { bytes: all, busiest: most, longest, flops: worst(&cells) * per_cell, predicted: None }
    });
    let memory = ticks.iter().flat_map(|&tick| {
        let (_, ports) = bytes(problem, plan, work, tick, false);
        let parts = ports.into_iter().zip(slots);
        parts
            .map(|(port, slot)| slot.memory.map_or(0.0, |memory| port[2] as f64 / memory as f64))
            .collect::<Vec<_>>()
    });
    Verdict {
        memory: memory.fold(0.0, f64::max),
        max_over_mean: ratio(worst(&cells), total),
        worst_tick: ticks
            .iter()
            .map(|&t| ratio(busiest(Some(t), &cells), whole(t)))
            .reduce(f64::max)
            .unwrap_or(1.0),
        tiles_over_ideal: ratio(worst(&tiles), uncut as f64),
        largest_piece: largest.fold(0.0, f64::max),
        forward,
        backward,
        tasks: tasks.len(),
        documents: documents.len(),
        slots: slots.len(),
    }
}

fn tiles_of(cells: &BTreeSet<Cell>) -> u64 {
    let heads: BTreeSet<usize> = cells.iter().map(|cell| cell.2).collect();
    let of_head = |head: usize| {
        let here = || cells.iter().filter(move |cell| cell.2 == head);
        let row = here().map(|cell| cell.0).min().unwrap_or(0);
        let key = here().map(|cell| cell.1).min().unwrap_or(0);
        here().map(|&(i, j, _)| ((i - row) / TILE, (j - key) / TILE)).collect::<BTreeSet<_>>().len() as u64
    };
    heads.into_iter().map(of_head).sum()
}

/// Bytes of a tick in one pass: all of them, and in and out of every slot, and those of its own tasks.
fn bytes(
    problem: &Problem,
    plan: &StepPlan,
    work: &[BTreeSet<Cell>],
    tick: u32,
    backward: bool,
) -> (u64, Vec<[u64; 3]>) {
    let HeadShape { head_dim, v_head_dim, dtype, .. } = problem.geometry.shape();
    let (group, d, dv) = (problem.geometry.group() as u64, head_dim as u64, v_head_dim as u64);
    let element = dtype.bytes() as u64;
    // Which slots need a row (or key) of a head of a document.
    let mut users: BTreeMap<(DocumentId, usize, bool, usize), BTreeSet<usize>> = BTreeMap::new();
    for ((of, task), cells) in plan.tasks().zip(work) {
        for &(i, j, h) in cells.iter().filter(|_| of == tick) {
            users.entry((task.document, h, false, i)).or_default().insert(task.slot as usize);
            users.entry((task.document, h, true, j)).or_default().insert(task.slot as usize);
        }
    }
    let (mut total, mut ports) = (0, vec![[0; 3]; problem.slots.len()]);
    for ((id, _, is_key, token), slots) in users {
        let document = problem.documents.iter().find(|d| d.id() == id).expect("checked");
        let home =
            document.homes().iter().find(|h| h.tokens.contains(token)).expect("homes hold all tokens").rank;
        let result = if slots.len() > 1 { 4 } else { element };
        let (there, back) = match (backward, is_key) {
            (false, false) => (group * d * element, group * (dv * result + 4)),
            (false, true) => ((d + dv) * element, 0),
            (true, false) => (group * (dv * element + 8), group * d * result),
            (true, true) => (0, (d + dv) * result),
        };
        for slot in slots.into_iter().filter(|&slot| problem.slots[slot].rank != Some(home)) {
            total += there + back;
            ports[slot][0] += there;
            ports[slot][1] += back;
            ports[slot][2] += there + back;
            if let Some(home) = problem.slots.iter().position(|slot| slot.rank == Some(home)) {
                ports[home][1] += there;
                ports[home][0] += back;
            }
        }
    }
    (total, ports)
}
