//! Filling: short documents go where work is still wanted, and make every rank's tokens up.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// A document that is short, or of a mask that is not causal, or what long ones have left: tokens `[from, to)`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Short {
    pub(super) document: usize,
    pub(super) from: usize,
    pub(super) to: usize,
    /// Cells of its rows, for one kv head on average.
    pub(super) cells: f64,
}

/// What a rank has been given so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    /// Tokens that still fit.
    pub(super) space: usize,
    /// Tokens that it would have if all ranks had equally many, less those it has.
    pub(super) wanted: f64,
    /// Cells of one kv head.
    pub(super) cells: f64,
    /// What it computes, relative to the others.
    pub(super) weight: f64,
}

/// Of its space a rank is taken to want this much at least, or the last of its documents would decide too much.
const LEAST_WANTED: f64 = 0.25;
/// Halvings that find the level.
const HALVINGS: usize = 60;

/// Cells over weight that all ranks can be filled up to.
fn level(loads: &[Load], cells: f64) -> f64 {
    let weight: f64 = loads.iter().map(|load| load.weight).sum();
    let highest = loads.iter().map(|load| load.cells / load.weight).fold(0.0, f64::max);
    let (mut low, mut high) = (0.0, highest + cells / weight);
    for _ in 0..HALVINGS {
        let middle = (low + high) / 2.0;
        let missing = |load: &Load| (middle * load.weight - load.cells).max(0.0);
        if loads.iter().map(missing).sum::<f64>() < cells { low = middle } else { high = middle }
    }
    high
}

/// A rank by how much work it wants for a token. The one that wants most comes last, of equals the first rank.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Want {
    cells: f64,
    rank: usize,
}

impl Eq for Want {}

impl Ord for Want {
    fn cmp(&self, other: &Want) -> Ordering {
        self.cells.total_cmp(&other.cells).then(other.rank.cmp(&self.rank))
    }
}

impl PartialOrd for Want {
    fn partial_cmp(&self, other: &Want) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Load {
    fn want(&self, level: f64, rank: usize) -> Want {
        let tokens = self.wanted.max(LEAST_WANTED * self.space as f64).max(1.0);
        Want { cells: (level * self.weight - self.cells) / tokens, rank }
    }

    fn give(&mut self, part: &Short) {
        self.space -= part.to - part.from;
        self.wanted -= (part.to - part.from) as f64;
        self.cells += part.cells;
    }
}

/// Calls `put(rank, part)` for every short document: whole where it fits, the longest first, each where the most work is wanted
/// for each token that is; in parts where it fits nowhere. There must be space for all.
pub(super) fn fill(
    mut short: Vec<Short>,
    loads: &mut [Load],
    block: usize,
    mut put: impl FnMut(usize, Short),
) {
    let level = level(loads, short.iter().map(|short| short.cells).sum());
    short.sort_unstable_by_key(|short| (Reverse(short.to - short.from), short.document, short.from));
    let all = |loads: &[Load]| loads.iter().enumerate().map(|(n, load)| load.want(level, n)).collect();
    let mut wants: BinaryHeap<Want> = all(loads);
    // Those without space for the documents at hand: these become shorter.
    let mut crowded: BinaryHeap<(usize, usize)> = BinaryHeap::new();
    for short in short {
        let tokens = short.to - short.from;
        while let Some(&(_, rank)) = crowded.peek().filter(|(space, _)| *space >= tokens) {
            crowded.pop();
            wants.push(loads[rank].want(level, rank));
        }
        let mut taker = None;
        while let Some(Want { rank, .. }) = wants.pop() {
            let space = loads[rank].space;
            if space >= tokens {
                taker = Some(rank);
                break;
            }
            crowded.push((space, rank));
        }
        match taker {
            Some(rank) => {
                loads[rank].give(&short);
                put(rank, short);
                wants.push(loads[rank].want(level, rank));
            }
            None => {
                part(short, loads, block, &mut put);
                crowded.clear();
                wants = all(loads);
            }
        }
    }
}

/// Parts a document among the ranks with the most space, its last rows first.
fn part(short: Short, loads: &mut [Load], block: usize, put: &mut impl FnMut(usize, Short)) {
    let mut left = short.to;
    let mut most: BinaryHeap<(usize, Reverse<usize>)> =
        loads.iter().enumerate().map(|(rank, load)| (load.space, Reverse(rank))).collect();
    while left > short.from {
        // Each takes all that it has space for, but for what a block leaves over.
        let Some((space, Reverse(rank))) = most.pop() else { return };
        let first = left.saturating_sub(space).max(short.from);
        // On a block border, unless less than a block fits.
        let from = first.div_ceil(block) * block;
        let from = if from < left { from } else { first };
        if from == left {
            return;
        }
        let cells = short.cells * (left - from) as f64 / (short.to - short.from) as f64;
        let part = Short { from, to: left, cells, ..short };
        loads[rank].give(&part);
        put(rank, part);
        most.push((loads[rank].space, Reverse(rank)));
        left = from;
    }
}
