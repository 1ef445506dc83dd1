//! Who holds how many tokens of a step.

use std::collections::{BTreeMap, BTreeSet};

use outboard_attention::Document;
use outboard_planner::Slot;

/// Tokens of each rank: of those with a server, and of those that documents name.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Holdings {
    ticks: Vec<BTreeMap<u32, usize>>,
    /// How many documents lie on several ranks.
    pub(crate) split: usize,
}

impl Holdings {
    pub(crate) fn of(documents: &[Document], slots: &[Slot]) -> Holdings {
        let empty = || -> BTreeMap<u32, usize> {
            slots.iter().filter_map(|slot| slot.rank).map(|rank| (rank, 0)).collect()
        };
        let mut ticks: BTreeMap<u32, BTreeMap<u32, usize>> = BTreeMap::new();
        for document in documents {
            let held = ticks.entry(document.tick()).or_insert_with(empty);
            for home in document.homes() {
                *held.entry(home.rank).or_default() += home.tokens.len();
            }
        }
        let split = documents.iter().filter(|document| ranks(document).len() > 1).count();
        Holdings { ticks: ticks.into_values().collect(), split }
    }

    /// The most tokens of a rank over the mean of all, of the tick where that is most.
    pub(crate) fn max_over_mean(&self) -> f64 {
        let of_tick = |held: &BTreeMap<u32, usize>| over_mean(held.values().max().copied(), held);
        self.ticks.iter().map(of_tick).fold(1.0, f64::max)
    }

    /// Tokens of a rank over the mean, all ticks together.
    pub(crate) fn over_mean(&self, rank: u32) -> f64 {
        let mut all: BTreeMap<u32, usize> = BTreeMap::new();
        for (&rank, &tokens) in self.ticks.iter().flatten() {
            *all.entry(rank).or_default() += tokens;
        }
        over_mean(all.get(&rank).copied(), &all)
    }
}

/// The ranks that hold tokens of a document.
pub(crate) fn ranks(document: &Document) -> BTreeSet<u32> {
    document.homes().iter().map(|home| home.rank).collect()
}

fn over_mean(tokens: Option<usize>, held: &BTreeMap<u32, usize>) -> f64 {
    let all: usize = held.values().sum();
    tokens.unwrap_or(0) as f64 * held.len() as f64 / all.max(1) as f64
}

#[cfg(test)]
mod tests {
    use outboard_attention::{DocumentId, HomeRange, Span};

    use super::*;

    #[test]
    fn the_worst_tick_and_every_rank_count() {
        let document = |index: u32, homes: &[(u32, usize)]| {
            let mut at = 0;
            let home = |&(rank, tokens): &(u32, usize)| {
                at += tokens;
                HomeRange { rank, tokens: Span::at(at - tokens, tokens) }
            };
            let homes: Vec<HomeRange> = homes.iter().map(home).collect();
            Document::new(DocumentId { rank: 0, index }, at, homes).unwrap()
        };
        let documents = [
            document(0, &[(0, 20), (1, 30), (0, 10)]),
            document(1, &[(1, 30), (1, 10)]),
            document(2, &[(0, 60)]).with_tick(1),
        ];
        let slots = [Slot::in_place(0), Slot::in_place(1), Slot::dedicated()];
        let holdings = Holdings::of(&documents, &slots);
        assert_eq!(holdings.split, 1, "two ranges of one rank are no split");
        assert_eq!(holdings.max_over_mean(), 2.0, "rank 1 holds nothing in tick 1");
        assert_eq!([0, 1, 7].map(|rank| holdings.over_mean(rank)), [90.0 / 80.0, 70.0 / 80.0, 0.0]);
        assert_eq!(Holdings::of(&[], &slots).max_over_mean(), 1.0);
    }
}
