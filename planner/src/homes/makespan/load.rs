//! What pieces of documents make ranks hold, compute and carry, and how long that takes.

use super::Piece;
use crate::homes::bin::cells;

/// How long a rank takes, forward and backward, and what it holds besides long documents.
#[derive(Clone, Copy, Debug)]
pub(in crate::homes) struct Pace {
    /// Seconds of a cell of one kv head, for all heads.
    pub(in crate::homes) cell: [f64; 2],
    /// Seconds of a key on its link, for all heads.
    pub(in crate::homes) key: [f64; 2],
    /// Cells of documents whose homes are given.
    pub(in crate::homes) cells: f64,
    /// Tokens of long documents that it may hold.
    pub(in crate::homes) space: f64,
    /// Tokens of those and of short ones that it holds in the end.
    pub(in crate::homes) wanted: f64,
}

/// All ranks.
#[derive(Clone, Debug)]
pub(in crate::homes) struct Paces {
    pub(in crate::homes) ranks: Vec<Pace>,
    /// Cells of a token of short documents.
    pub(in crate::homes) density: f64,
    /// Documents are cut at multiples of so many tokens.
    pub(in crate::homes) block: f64,
    /// Tokens of an average rank.
    pub(in crate::homes) tokens: f64,
}

/// What a rank costs that holds too many tokens, and what it would cost besides for as many too many as an average rank
/// holds.
const CROWDED: f64 = 1.0;
const CROWD: f64 = 100.0;
/// What fetching costs a rank besides, of all that it costs if it does that for as long as the slowest one takes: of equal
/// placements, the one that moves least.
const FETCHED: f64 = 0.1;

/// What a rank does for long documents, in tokens, and in cells of one kv head.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Load {
    pub(super) tokens: f64,
    cells: f64,
    /// Keys that it fetches, and sends.
    into: f64,
    out: f64,
}

impl Load {
    pub(super) fn add(&mut self, other: &Load, sign: f64) {
        self.tokens += sign * other.tokens;
        self.cells += sign * other.cells;
        self.into += sign * other.into;
        self.out += sign * other.out;
    }

    pub(super) fn times(mut self, sign: f64) -> Load {
        for part in [&mut self.tokens, &mut self.cells, &mut self.into, &mut self.out] {
            *part *= sign;
        }
        self
    }
}

impl Paces {
    /// Seconds that a rank computes, fetches and sends for in a pass. Gradients of keys go the other way.
    pub(super) fn times(&self, rank: usize, load: &Load, pass: usize) -> [f64; 3] {
        let Pace { cell, key, cells, wanted, .. } = self.ranks[rank];
        let short = self.density * (wanted - load.tokens).max(0.0);
        [(cells + short + load.cells) * cell[pass], load.into * key[pass], load.out * key[pass]]
    }

    /// What a rank costs, if the `slowest` takes so long.
    pub(super) fn cost(&self, rank: usize, load: &Load, slowest: [f64; 2]) -> f64 {
        let over = load.tokens - self.ranks[rank].space;
        let crowd = if over > 0.0 { CROWDED + CROWD * over / self.tokens } else { 0.0 };
        let pass = |pass: usize| {
            let times = self.times(rank, load, pass).map(|time| time / slowest[pass]);
            slowest[pass] * (times.into_iter().map(power).sum::<f64>() + FETCHED * times[1])
        };
        crowd + (pass(0) + pass(1)) / (slowest[0] + slowest[1])
    }

    /// Seconds of both passes if all ranks computed as long and nothing were carried.
    pub(super) fn least(&self, loads: &[Load]) -> f64 {
        let pass = |pass: usize| {
            let (mut cells, mut speed) = (0.0, 0.0);
            for (rank, load) in loads.iter().enumerate() {
                let cell = self.ranks[rank].cell[pass];
                cells += self.times(rank, load, pass)[0] / cell;
                speed += 1.0 / cell;
            }
            cells / speed
        };
        pass(0) + pass(1)
    }
}

/// To the 16th power: what is below the slowest counts little, and what is far below nothing.
fn power(part: f64) -> f64 {
    let square = |x: f64| x * x;
    square(square(square(square(part))))
}

/// What a document's pieces make of each of its ranks.
pub(super) fn loads(pieces: &[Piece]) -> impl Iterator<Item = (usize, Load)> {
    let mut loads: Vec<(usize, Load)> = Vec::with_capacity(pieces.len());
    for piece in pieces.iter().rev() {
        let at = loads.iter().position(|(rank, _)| *rank == piece.rank).unwrap_or_else(|| {
            // All keys up to its last row.
            loads.push((piece.rank, Load { into: piece.hi, ..Load::default() }));
            loads.len() - 1
        });
        let (tokens, others) = (piece.hi - piece.lo, (loads.len() - 1) as f64);
        let load = &mut loads[at].1;
        load.tokens += tokens;
        load.cells += cells(piece.lo, piece.hi);
        load.into -= tokens;
        // All others with later rows need them.
        load.out += tokens * others;
    }
    loads.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_with_later_rows_fetch_what_they_lack() {
        let piece = |lo, hi, rank| Piece { lo, hi, rank };
        let pieces = [piece(0.0, 4.0, 0), piece(4.0, 7.0, 1), piece(7.0, 9.0, 0), piece(9.0, 10.0, 2)];
        let mut all: Vec<_> = loads(&pieces).collect();
        all.sort_by_key(|(rank, _)| *rank);
        let of = |n: usize| (all[n].1.tokens, all[n].1.cells, all[n].1.into, all[n].1.out);
        assert_eq!(of(0), (6.0, 10.0 + 17.0, 3.0, 2.0 * 4.0 + 2.0));
        assert_eq!(of(1), (3.0, 18.0, 4.0, 2.0 * 3.0));
        assert_eq!(of(2), (1.0, 10.0, 9.0, 0.0));
    }
}
