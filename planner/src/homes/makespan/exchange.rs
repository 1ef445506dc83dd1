//! Exchanges: pieces that are cut, moved or swapped.

use super::{Piece, State};
use crate::search::Random;

/// The first rank is the dearest of so many, and pieces go to the cheapest of up to so many.
const DEAREST: usize = 8;
const CHEAPEST: usize = 4;
/// How often they go to a rank that has others of the document.
const NEAR: f64 = 0.33;
/// A document in so many pieces is not cut again.
const MOST: usize = 48;

/// One or two documents and their pieces after an exchange. An empty second one is none.
#[derive(Clone, Debug, Default)]
pub(super) struct Exchange {
    first: (usize, Vec<Piece>),
    second: (usize, Vec<Piece>),
}

impl Exchange {
    /// Its documents, with fresh pieces.
    pub(super) fn documents(&self) -> impl Iterator<Item = (usize, &Vec<Piece>)> {
        let all = [&self.first, &self.second].into_iter();
        all.filter(|(_, pieces)| !pieces.is_empty()).map(|(document, pieces)| (*document, pieces))
    }

    pub(super) fn documents_mut(&mut self) -> impl Iterator<Item = (usize, &mut Vec<Piece>)> {
        let all = [&mut self.first, &mut self.second].into_iter();
        all.filter(|(_, pieces)| !pieces.is_empty()).map(|(document, pieces)| (*document, pieces))
    }

    /// Draws an exchange. False when that changes nothing.
    pub(super) fn draw(&mut self, state: &State<'_>, random: &mut Random) -> bool {
        let dearer = |a: f64, b: f64| a > b;
        let from = best(state, DEAREST, dearer, random);
        let Some(document) = any_document(&state.of_rank[from], random) else { return false };
        let pieces = &state.documents[document];
        let Some(at) = any_of(pieces, from, random) else { return false };
        let mut to = best(state, 1 + random.below(CHEAPEST), |a, b| dearer(b, a), random);
        if random.unit() < NEAR {
            to = pieces[random.below(pieces.len())].rank;
        }
        for of in [&mut self.first.1, &mut self.second.1] {
            of.clear();
        }
        self.first.0 = document;
        self.first.1.extend_from_slice(pieces);
        let changed = match random.below(8) {
            0 => self.give(at, to),
            1 | 2 => self.swap(state, at, to, random),
            3..6 => self.move_border(at, state.paces.block, random),
            _ => self.cut(at, to, state.paces.block, random),
        };
        join(&mut self.first.1);
        join(&mut self.second.1);
        changed
    }

    fn give(&mut self, at: usize, to: usize) -> bool {
        std::mem::replace(&mut self.first.1[at].rank, to) != to
    }

    /// For any piece of the other rank, of the same document or another.
    fn swap(&mut self, state: &State<'_>, at: usize, to: usize, random: &mut Random) -> bool {
        let from = self.first.1[at].rank;
        let Some(other) = any_document(&state.of_rank[to], random).filter(|_| from != to) else {
            return false;
        };
        let Some(with) = any_of(&state.documents[other], to, random) else { return false };
        if other == self.first.0 {
            self.first.1[with].rank = from;
        } else {
            self.second.0 = other;
            self.second.1.extend_from_slice(&state.documents[other]);
            self.second.1[with].rank = from;
        }
        self.give(at, to)
    }

    /// The border with the piece before or after, by some rows.
    fn move_border(&mut self, at: usize, block: f64, random: &mut Random) -> bool {
        let next = at + random.below(2);
        let Some([last, next]) = next.checked_sub(1).and_then(|last| self.first.1.get_mut(last..=next))
        else {
            return false;
        };
        let reach = (next.hi - last.lo) * random.unit() * random.unit();
        let border = if random.below(2) == 0 { last.hi + reach } else { last.hi - reach };
        let border = ((border / block).round() * block).clamp(last.lo, next.hi);
        (last.hi, next.lo) = (border, border);
        true
    }

    /// Gives the first, last or some other rows of a piece away.
    fn cut(&mut self, at: usize, to: usize, block: f64, random: &mut Random) -> bool {
        let pieces = &mut self.first.1;
        let Piece { lo, hi, rank } = pieces[at];
        if pieces.len() >= MOST || rank == to {
            return false;
        }
        let mut border = || (((lo + (hi - lo) * random.unit()) / block).round() * block).clamp(lo, hi);
        let (a, b) = (border(), border());
        let (start, end) = match random.below(3) {
            0 => (lo, a),
            1 => (a, hi),
            _ => (a.min(b), a.max(b)),
        };
        let parts = [(lo, start, rank), (start, end, to), (end, hi, rank)];
        pieces.splice(at..=at, parts.map(|(lo, hi, rank)| Piece { lo, hi, rank }));
        true
    }
}

/// The best of so many ranks, by what they cost.
fn best(state: &State<'_>, of: usize, better: impl Fn(f64, f64) -> bool, random: &mut Random) -> usize {
    let mut best = random.below(state.costs.len());
    for _ in 1..of {
        let other = random.below(state.costs.len());
        if better(state.costs[other], state.costs[best]) {
            best = other;
        }
    }
    best
}

fn any_document(of: &[usize], random: &mut Random) -> Option<usize> {
    (!of.is_empty()).then(|| of[random.below(of.len())])
}

/// Any piece of a rank.
fn any_of(pieces: &[Piece], rank: usize, random: &mut Random) -> Option<usize> {
    let of_rank = || (0..pieces.len()).filter(|&n| pieces[n].rank == rank);
    let count = of_rank().count();
    of_rank().nth(random.below(count.max(1)))
}

/// Joins pieces that touch on one rank, and drops those without rows.
fn join(pieces: &mut Vec<Piece>) {
    pieces.retain(|piece| piece.lo < piece.hi);
    pieces.dedup_by(|next, last| {
        let same = last.rank == next.rank;
        if same {
            last.hi = next.hi;
        }
        same
    });
}
