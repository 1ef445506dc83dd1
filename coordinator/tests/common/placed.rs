//! What the answers of a step with placement must hold together.

use std::collections::{BTreeMap, BTreeSet};

use outboard_attention::{Document, DocumentId, PlannedTask, Span, StepPlan, TickPlan};
use outboard_proto::{AssignedTask, v1};

use super::geometry;

/// A rank's answer, read.
struct Part {
    documents: Vec<Document>,
    tasks: Vec<(u32, PlannedTask)>,
}

impl Part {
    fn read(answer: &v1::SubmitStepResponse) -> Part {
        let task = |task: &v1::PlannedTask| {
            let assigned = AssignedTask::try_from(*task).unwrap();
            (assigned.tick, assigned.task)
        };
        Part { documents: read(&answer.documents), tasks: answer.tasks.iter().map(task).collect() }
    }
}

fn read(documents: &[v1::Document]) -> Vec<Document> {
    documents.iter().map(|document| document.clone().try_into().unwrap()).collect()
}

/// Checks the answers of ranks 0, 1, ... to these documents: together they hold every token and cell once, and each has what
/// its rank is home of, no more and no less.
pub(crate) fn check(submitted: &[Vec<v1::Document>], slack: f64, answers: &[v1::SubmitStepResponse]) {
    let summary = answers[0].summary.unwrap();
    assert!(answers.iter().all(|answer| answer.summary == Some(summary)), "all ranks hear the same");
    let parts: Vec<Part> = answers.iter().map(Part::read).collect();
    let submitted: Vec<Document> = submitted.iter().flat_map(|documents| read(documents)).collect();
    let placed = check_documents(&submitted, &parts);
    check_tasks(&placed, &parts, summary.tasks);
    check_tokens(&submitted, &placed, slack, parts.len());
    assert_eq!(summary.tokens_imbalance, imbalance(&placed, parts.len()));
}

/// Every document is placed, as it was submitted otherwise, and told to the ranks that it lies on.
fn check_documents(submitted: &[Document], parts: &[Part]) -> BTreeMap<DocumentId, Document> {
    let mut placed: BTreeMap<DocumentId, Document> = BTreeMap::new();
    for document in parts.iter().flat_map(|part| &part.documents) {
        let first = placed.entry(document.id()).or_insert_with(|| document.clone());
        assert_eq!(first, document, "ranks hear the same of a document");
    }
    assert_eq!(placed.len(), submitted.len());
    for before in submitted {
        let after = &placed[&before.id()];
        match before.is_placed() {
            true => assert_eq!(after, before, "homes that were given stay"),
            false => assert_eq!(&before.clone().with_homes(after.homes().to_vec()).unwrap(), after),
        }
    }
    for (rank, part) in (0..).zip(parts) {
        let mine = placed.values().filter(|d| d.homes().iter().any(|home| home.rank == rank));
        assert!(mine.eq(&part.documents), "rank {rank}: its documents, in order of id");
    }
    placed
}

/// Every cell is computed once, by tasks that one rank has all queries of, and each rank knows of those that concern it.
fn check_tasks(placed: &BTreeMap<DocumentId, Document>, parts: &[Part], count: u64) {
    // Groups and places in them are numbered in plan order.
    let key = |&(tick, task): &(u32, PlannedTask)| (tick, task.group, task.position);
    let mut all: BTreeMap<_, (u32, PlannedTask)> = BTreeMap::new();
    for task in parts.iter().flat_map(|part| &part.tasks) {
        assert_eq!(all.entry(key(task)).or_insert(*task), task, "ranks hear the same of a task");
    }
    assert_eq!(all.len() as u64, count);
    let mut ticks: BTreeMap<u32, TickPlan> = BTreeMap::new();
    for &(tick, task) in all.values() {
        ticks.entry(tick).or_insert(TickPlan { tick, tasks: Vec::new() }).tasks.push(task);
    }
    let plan = StepPlan { ticks: ticks.into_values().collect(), slots: parts.len() as u32 };
    let documents: Vec<Document> = placed.values().cloned().collect();
    plan.check(&documents, &geometry()).unwrap();
    let ranks_of = |task: &PlannedTask, tokens: Span| -> BTreeSet<u32> {
        let homes = placed[&task.document].homes().iter();
        homes.filter(|home| !home.tokens.intersect(tokens).is_empty()).map(|home| home.rank).collect()
    };
    for (_, task) in all.values() {
        assert_eq!(ranks_of(task, task.q).len(), 1, "one rank ships {task:?}");
    }
    for (rank, part) in (0..).zip(parts) {
        let concerns = |(_, task): &&(u32, PlannedTask)| {
            ranks_of(task, task.q).contains(&rank) || ranks_of(task, task.kv).contains(&rank)
        };
        assert!(all.values().filter(concerns).eq(&part.tasks), "rank {rank}: its tasks, in plan order");
    }
}

/// Tokens of each tick and rank.
fn tokens<'a>(documents: impl IntoIterator<Item = &'a Document>, ranks: usize) -> BTreeMap<u32, Vec<usize>> {
    let mut ticks = BTreeMap::new();
    for document in documents {
        let held = ticks.entry(document.tick()).or_insert_with(|| vec![0; ranks]);
        document.homes().iter().for_each(|home| held[home.rank as usize] += home.tokens.len());
    }
    ticks
}

/// What a rank may hold of so many tokens.
pub(crate) fn most(tokens: usize, ranks: usize, slack: f64) -> usize {
    let mean = tokens as f64 / ranks as f64;
    ((1.0 + slack) * mean).max(mean.ceil()) as usize
}

/// Where homes were chosen, no rank holds more than the slack allows.
fn check_tokens(submitted: &[Document], placed: &BTreeMap<DocumentId, Document>, slack: f64, ranks: usize) {
    for (tick, held) in tokens(placed.values(), ranks) {
        let free = submitted.iter().any(|document| document.tick() == tick && !document.is_placed());
        let most = most(held.iter().sum(), ranks, slack);
        assert!(!free || held.iter().all(|&tokens| tokens <= most), "tick {tick}: {held:?}, at most {most}");
    }
}

fn imbalance(placed: &BTreeMap<DocumentId, Document>, ranks: usize) -> f64 {
    let of_tick = |held: &Vec<usize>| {
        let most = held.iter().max().copied().unwrap_or(0);
        most as f64 * ranks as f64 / held.iter().sum::<usize>() as f64
    };
    tokens(placed.values(), ranks).values().map(of_tick).fold(1.0, f64::max)
}
