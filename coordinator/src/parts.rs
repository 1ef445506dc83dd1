//! Each rank's part of a step's plan, by the tokens that it is home of.

use std::collections::BTreeMap;

use outboard_attention::{Document, DocumentId, HomeRange, PlannedTask, Span, StepPlan};

/// Which tasks and documents concern which rank.
#[derive(Clone, Debug, Default)]
pub(crate) struct Parts(BTreeMap<u32, Part>);

/// Indices, ascending, each once.
#[derive(Clone, Debug, Default)]
struct Part {
    tasks: Vec<usize>,
    documents: Vec<usize>,
}

impl Parts {
    /// Of documents with homes, and all their tasks.
    pub(crate) fn new<'a>(documents: &[Document], tasks: impl Iterator<Item = &'a PlannedTask>) -> Parts {
        let homes = homes_by_id(documents);
        let mut parts: BTreeMap<u32, Part> = BTreeMap::new();
        for (n, task) in tasks.enumerate() {
            let homes = homes.get(&task.document).copied().unwrap_or_default();
            for rank in ranks_of(homes, task.q).chain(ranks_of(homes, task.kv)) {
                push_once(&mut parts.entry(rank).or_default().tasks, n);
            }
        }
        for (n, document) in documents.iter().enumerate() {
            for home in document.homes() {
                push_once(&mut parts.entry(home.rank).or_default().documents, n);
            }
        }
        Parts(parts)
    }

    /// The tasks with queries or keys of a rank.
    pub(crate) fn tasks_of(&self, rank: u32) -> impl Iterator<Item = usize> {
        self.0.get(&rank).into_iter().flat_map(|part| part.tasks.iter().copied())
    }

    /// The documents with tokens of a rank.
    pub(crate) fn documents_of(&self, rank: u32) -> impl Iterator<Item = usize> {
        self.0.get(&rank).into_iter().flat_map(|part| part.documents.iter().copied())
    }
}

/// Adds the index that is being dealt with, which is the last one or not there.
fn push_once(indices: &mut Vec<usize>, index: usize) {
    if indices.last() != Some(&index) {
        indices.push(index);
    }
}

fn homes_by_id(documents: &[Document]) -> BTreeMap<DocumentId, &[HomeRange]> {
    documents.iter().map(|document| (document.id(), document.homes())).collect()
}

/// The homes of a range of tokens, in token order. A rank comes once for each of its ranges.
fn ranks_of(homes: &[HomeRange], tokens: Span) -> impl Iterator<Item = u32> {
    let first = homes.partition_point(|home| home.tokens.end() <= tokens.start());
    let here = homes.iter().skip(first).take_while(move |home| home.tokens.start() < tokens.end());
    here.map(|home| home.rank)
}

/// Checks that one rank is home of all queries of each task: it ships the task and gets its result. Says which task has
/// several.
pub(crate) fn check_rows(documents: &[Document], step: &StepPlan) -> Result<(), String> {
    let homes = homes_by_id(documents);
    for (_, task) in step.tasks() {
        let mut ranks = ranks_of(homes.get(&task.document).copied().unwrap_or_default(), task.q);
        let Some(first) = ranks.next() else { continue };
        if let Some(other) = ranks.find(|rank| *rank != first) {
            return Err(format!(
                "document {}: queries {} of one task lie on ranks {first} and {other}",
                task.document, task.q
            ));
        }
    }
    Ok(())
}

/// Most over mean tokens of a rank, in the tick where that is most; 1 for a step without tokens.
pub(crate) fn tokens_imbalance(documents: &[Document], ranks: u32) -> f64 {
    let mut ticks: BTreeMap<u32, BTreeMap<u32, u64>> = BTreeMap::new();
    for document in documents {
        let held = ticks.entry(document.tick()).or_default();
        for home in document.homes() {
            *held.entry(home.rank).or_default() += home.tokens.len() as u64;
        }
    }
    let of_tick = |held: &BTreeMap<u32, u64>| {
        let (most, all) = (held.values().max().copied().unwrap_or(0), held.values().sum::<u64>());
        most as f64 * f64::from(ranks) / all.max(1) as f64
    };
    ticks.values().map(of_tick).fold(1.0, f64::max)
}

#[cfg(test)]
mod tests {
    use outboard_attention::TickPlan;

    use super::*;

    /// A document of 100 tokens: 40 of rank 0, 40 of rank 2, 20 of rank 0.
    fn shared() -> Document {
        let home = |rank, start, len| HomeRange { rank, tokens: Span::at(start, len) };
        let homes = vec![home(0, 0, 40), home(2, 40, 40), home(0, 80, 20)];
        Document::new(DocumentId { rank: 1, index: 7 }, 100, homes).unwrap()
    }

    fn task(q: Span, kv: Span) -> PlannedTask {
        let document = shared().id();
        PlannedTask { document, q, kv, kv_heads: Span::to(1), slot: 0, group: 0, position: 0 }
    }

    #[test]
    fn a_rank_gets_what_it_has_queries_or_keys_of_once() {
        let tasks = [
            task(Span::at(0, 40), Span::to(40)),
            task(Span::at(40, 40), Span::at(40, 40)),
            task(Span::at(80, 20), Span::to(100)),
            task(Span::at(39, 1), Span::at(39, 2)),
        ];
        let parts = Parts::new(&[shared()], tasks.iter());
        let of = |rank| parts.tasks_of(rank).collect::<Vec<_>>();
        assert_eq!([of(0), of(1), of(2)], [vec![0, 2, 3], vec![], vec![1, 2, 3]]);
        let documents = [0, 1, 2].map(|rank| parts.documents_of(rank).count());
        assert_eq!(documents, [1, 0, 1]);
    }

    #[test]
    fn tasks_whose_queries_lie_on_two_ranks_are_found() {
        let check = |q| {
            let tick = TickPlan { tick: 0, tasks: vec![task(q, Span::to(100))] };
            check_rows(&[shared()], &StepPlan { ticks: vec![tick], slots: 1 })
        };
        for q in [Span::to(40), Span::at(40, 40), Span::at(85, 3)] {
            assert_eq!(check(q), Ok(()));
        }
        let error = check(Span::at(30, 11)).unwrap_err();
        assert_eq!(error, "document 1.7: queries [30, 41) of one task lie on ranks 0 and 2");
        assert!(check(Span::to(100)).is_err());
    }

    #[test]
    fn the_worst_tick_counts() {
        assert_eq!(tokens_imbalance(&[shared()], 3), 60.0 * 3.0 / 100.0);
        assert_eq!(tokens_imbalance(&[shared().with_tick(1), shared()], 2), 1.2);
        assert_eq!(tokens_imbalance(&[], 2), 1.0);
    }
}
