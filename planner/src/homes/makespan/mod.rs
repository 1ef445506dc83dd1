//! Makespan: where links are slow, long documents are cut and placed so that the slowest rank ends soonest, computing or
//! carrying.
//!
//! A rank that sends keys is as busy as one that fetches them. So it matters not only how many keys move: one that holds
//! the first and the last rows of a document, around those of another, fetches and sends about half as many as it would
//! send with the first half alone. An [`exchange`] cuts, moves or swaps pieces of one or two documents; it is kept
//! when the powers of what ranks take, of the slowest one's time, add up to less.

mod exchange;
mod load;

use crate::search::Random;

use exchange::Exchange;
use load::{Load, loads};
pub(super) use load::{Pace, Paces};

/// Rows `[lo, hi)` of a document, on the `rank`-th rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Piece {
    pub(super) lo: f64,
    pub(super) hi: f64,
    pub(super) rank: usize,
}

/// Pieces of each document, in order of rows.
pub(super) type Pieces = Vec<Vec<Piece>>;

/// The times of the slowest rank are taken anew after so many exchanges.
const PERIOD: usize = 512;
/// What an exchange may cost more at first, of what a rank costs that is as slow as the slowest.
const WARMTH: f64 = 0.03;
/// When ranks take no longer than this many times what all do on average, nothing ends sooner.
const EVEN: f64 = 1.002;

/// Improves the pieces of documents by so many exchanges, or until all ranks take about as long.
pub(super) fn improve(paces: &Paces, documents: &mut Pieces, exchanges: usize, random: &mut Random) {
    let mut state = State::new(paces, documents);
    let mut exchange = Exchange::default();
    for n in 0..exchanges {
        if n % PERIOD == 0 && state.survey() <= EVEN {
            return;
        }
        let left = 1.0 - n as f64 / exchanges as f64;
        if exchange.draw(&state, random)
            && state.costs_at_most(&exchange, WARMTH * left * left * random.exponential())
        {
            state.keep(&mut exchange);
        }
    }
}

struct State<'a> {
    paces: &'a Paces,
    documents: &'a mut Pieces,
    loads: Vec<Load>,
    costs: Vec<f64>,
    /// Seconds of the slowest rank, forward and backward.
    slowest: [f64; 2],
    /// Documents of each rank.
    of_rank: Vec<Vec<usize>>,
    /// What the exchange at hand changes.
    changes: Vec<(usize, Load)>,
}

impl<'a> State<'a> {
    fn new(paces: &'a Paces, documents: &'a mut Pieces) -> State<'a> {
        let ranks = paces.ranks.len();
        let (mut all, mut of_rank) = (vec![Load::default(); ranks], vec![Vec::new(); ranks]);
        for (n, pieces) in documents.iter().enumerate() {
            for (rank, load) in loads(pieces) {
                all[rank].add(&load, 1.0);
                of_rank[rank].push(n);
            }
        }
        let (costs, changes) = (vec![0.0; ranks], Vec::new());
        State { paces, documents, loads: all, costs, slowest: [1.0; 2], of_rank, changes }
    }

    /// Takes the times of the slowest rank, and what every rank costs by these. Returns the times over the least possible.
    fn survey(&mut self) -> f64 {
        let all = || self.loads.iter().enumerate();
        self.slowest = [0, 1].map(|pass| {
            let longest = |(rank, load)| self.paces.times(rank, load, pass).into_iter().fold(0.0, f64::max);
            all().map(longest).fold(f64::MIN_POSITIVE, f64::max)
        });
        self.costs = all().map(|(rank, load)| self.paces.cost(rank, load, self.slowest)).collect();
        let fits = all().all(|(rank, load)| load.tokens <= self.paces.ranks[rank].space);
        let least = self.paces.least(&self.loads);
        if fits { (self.slowest[0] + self.slowest[1]) / least } else { f64::INFINITY }
    }

    /// Whether ranks together cost at most so much more after an exchange.
    fn costs_at_most(&mut self, exchange: &Exchange, more: f64) -> bool {
        self.changes.clear();
        for (document, fresh) in exchange.documents() {
            for (sign, pieces) in [(-1.0, &self.documents[document]), (1.0, fresh)] {
                for (rank, load) in loads(pieces) {
                    match self.changes.iter_mut().find(|change| change.0 == rank) {
                        Some(change) => change.1.add(&load, sign),
                        None => self.changes.push((rank, load.times(sign))),
                    }
                }
            }
        }
        let cost = |(rank, change): &(usize, Load)| {
            let mut load = self.loads[*rank];
            load.add(change, 1.0);
            self.paces.cost(*rank, &load, self.slowest) - self.costs[*rank]
        };
        self.changes.iter().map(cost).sum::<f64>() <= more
    }

    fn keep(&mut self, exchange: &mut Exchange) {
        for (rank, change) in &self.changes {
            self.loads[*rank].add(change, 1.0);
            self.costs[*rank] = self.paces.cost(*rank, &self.loads[*rank], self.slowest);
        }
        for (document, fresh) in exchange.documents_mut() {
            let pieces = &mut self.documents[document];
            for piece in pieces.iter() {
                self.of_rank[piece.rank].retain(|other| *other != document);
            }
            std::mem::swap(pieces, fresh);
            for piece in pieces.iter() {
                let of = &mut self.of_rank[piece.rank];
                if !of.contains(&document) {
                    of.push(document);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Equal ranks with space for so many tokens. A cell takes a second; so does a key on `slow` of 1.
    fn paces(ranks: usize, space: f64, slow: f64) -> Paces {
        let pace = Pace { cell: [1.0; 2], key: [slow; 2], cells: 0.0, space, wanted: 0.0 };
        Paces { ranks: vec![pace; ranks], density: 0.0, block: 1.0, tokens: space }
    }

    fn whole(tokens: &[u32]) -> Pieces {
        tokens.iter().map(|&tokens| vec![Piece { lo: 0.0, hi: f64::from(tokens), rank: 0 }]).collect()
    }

    fn slowest(paces: &Paces, documents: &mut Pieces) -> f64 {
        let mut state = State::new(paces, documents);
        state.survey();
        state.slowest[0]
    }

    #[test]
    fn documents_stay_whole_where_links_are_slow() {
        let mut documents = whole(&[1000, 900, 800, 700]);
        let paces = paces(4, 2000.0, 1e6);
        improve(&paces, &mut documents, 10_000, &mut Random::new(1));
        assert!(documents.iter().all(|pieces| pieces.len() == 1), "{documents:?}");
        assert_eq!(slowest(&paces, &mut documents), 1000.0 * 1001.0 / 2.0);
    }

    /// Half of the work for 0.41 of the keys; one that held the first half of the work would send 0.71 of them.
    #[test]
    fn two_ranks_share_a_document_around_each_other() {
        let mut documents = whole(&[1000]);
        let paces = paces(2, 1000.0, 500_500.0 / 2.0 / 400.0);
        improve(&paces, &mut documents, 10_000, &mut Random::new(1));
        let ranks: Vec<usize> = documents[0].iter().map(|piece| piece.rank).collect();
        assert!(ranks == [0, 1, 0] || ranks == [1, 0, 1], "{documents:?}");
        assert!(slowest(&paces, &mut documents) < 0.53 * 500_500.0, "{documents:?}");
    }

    proptest! {
        #[test]
        fn rows_stay_and_fit(
            tokens in prop::collection::vec(1u32..3000, 1..12), ranks in 1usize..9, slow in 0.0f64..1e4,
        ) {
            let mut documents = whole(&tokens);
            let longest = f64::from(tokens.iter().copied().max().unwrap_or(0));
            let space = longest.max(1.5 * f64::from(tokens.iter().sum::<u32>()) / ranks as f64);
            let paces = paces(ranks, space, slow);
            let before = slowest(&paces, &mut documents);
            let mut again = documents.clone();
            improve(&paces, &mut documents, 4000, &mut Random::new(1));
            for (pieces, &tokens) in documents.iter().zip(&tokens) {
                prop_assert_eq!((pieces[0].lo, pieces[pieces.len() - 1].hi), (0.0, f64::from(tokens)));
                prop_assert!(pieces.iter().all(|piece| piece.lo < piece.hi && piece.rank < ranks));
                prop_assert!(pieces.windows(2).all(|pair| pair[0].hi == pair[1].lo));
            }
            prop_assert!(slowest(&paces, &mut documents) <= 1.01 * before);
            let state = State::new(&paces, &mut documents);
            prop_assert!(state.loads.iter().all(|load| load.tokens <= space + 0.5));
            improve(&paces, &mut again, 4000, &mut Random::new(1));
            prop_assert_eq!(documents, again, "the same again");
        }
    }
}
