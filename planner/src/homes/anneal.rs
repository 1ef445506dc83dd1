//! Annealing: a few bins are emptied and packed anew, again and again, ever less willing to pay more.

use super::bin::{Bin, Room, Segment, Terms, join};
use super::pack::{Whim, pack};
use crate::search::Random;

/// Bins of one exchange, at most one more than this.
const BINS: usize = 6;
/// How often the first bin is the dearest of a few, not just any.
const DEAREST: f64 = 0.7;
/// How many of them.
const COMPARED: usize = 5;
/// How often another bin shares a document with one that was chosen before.
const NEAR: f64 = 0.5;
/// What an exchange may cost more at first, in keys, as a part of the tokens of a bin.
const WARMTH: f64 = 0.03;
/// The best outcome is looked for in this last part of the exchanges.
const LATE: f64 = 0.1;
/// A bin that costs less is not worth an exchange.
const LEAST: f64 = 1.0;

const NOISES: [f64; 4] = [0.0, 0.1, 0.4, 1.5];
const LOOSE: [f64; 3] = [0.0, 0.05, 0.2];
const ANYWHERE: [f64; 2] = [0.0, 0.3];
const WHOLE: [f64; 5] = [0.0, 0.0, 0.1, 0.5, 1.0];

/// What all bins cost, in keys of all heads.
pub(super) fn cost(bins: &[Bin]) -> f64 {
    bins.iter().map(|bin| bin.cost).sum()
}

/// Improves settled bins by so many exchanges. `empty` is the room of each bin that holds nothing.
pub(super) fn anneal(
    terms: &Terms,
    bins: &mut Vec<Bin>,
    empty: &[Room],
    exchanges: usize,
    random: &mut Random,
) {
    if cost(bins) < LEAST {
        return;
    }
    let documents = bins.iter().flat_map(|bin| &bin.segments).map(|segment| segment.document + 1).max();
    let mut bins_of: Vec<Vec<usize>> = vec![Vec::new(); documents.unwrap_or(0)];
    for (n, bin) in bins.iter().enumerate() {
        for segment in &bin.segments {
            bins_of[segment.document].push(n);
        }
    }
    let (mut some, mut free, mut queue) = (Vec::new(), Vec::new(), Vec::new());
    let mut fresh: Vec<Bin> = Vec::new();
    let mut now = cost(bins);
    let mut best: Option<(f64, Vec<Bin>)> = None;
    for exchange in 0..exchanges {
        let left = 1.0 - exchange as f64 / exchanges as f64;
        choose(bins, &bins_of, &mut some, random);
        let before: f64 = some.iter().map(|&n: &usize| bins[n].cost).sum();
        if before < LEAST {
            continue;
        }
        let limit = before + WARMTH * terms.tokens * left * left * random.exponential();
        free.clear();
        free.extend(some.iter().flat_map(|&n| bins[n].segments.iter().copied()));
        join(&mut free);
        fresh.truncate(some.len());
        fresh.resize(some.len(), Bin::new(Room { excess: 0.0, tokens: 0.0 }));
        for (bin, &n) in fresh.iter_mut().zip(&some) {
            bin.segments.clear();
            bin.room = empty[n];
        }
        let whim = Whim {
            noise: NOISES[random.below(NOISES.len())],
            loose: LOOSE[random.below(LOOSE.len())],
            anywhere: ANYWHERE[random.below(ANYWHERE.len())],
            whole: WHOLE[random.below(WHOLE.len())],
        };
        pack(terms, &mut fresh, &mut free, &mut queue, whim, random);
        let mut after = 0.0;
        for bin in &mut fresh {
            bin.settle(terms);
            after += bin.cost;
            if after > limit {
                break;
            }
        }
        if after > limit {
            continue;
        }
        exchange_bins(bins, &mut bins_of, &mut fresh, &some);
        now += after - before;
        let late = left < LATE;
        if late && best.as_ref().is_none_or(|(least, _)| now < least - LEAST) {
            best = Some((now, bins.clone()));
        }
    }
    if let Some((least, found)) = best
        && least < now
    {
        *bins = found;
    }
}

fn choose(bins: &[Bin], bins_of: &[Vec<usize>], some: &mut Vec<usize>, random: &mut Random) {
    let mut first = random.below(bins.len());
    if random.unit() < DEAREST {
        for _ in 1..COMPARED {
            let other = random.below(bins.len());
            if bins[other].cost > bins[first].cost {
                first = other;
            }
        }
    }
    some.clear();
    some.push(first);
    for _ in 0..1 + random.below(BINS) {
        let segments: &[Segment] = &bins[some[random.below(some.len())]].segments;
        let other = if random.unit() < NEAR && !segments.is_empty() {
            let near = &bins_of[segments[random.below(segments.len())].document];
            near[random.below(near.len())]
        } else {
            random.below(bins.len())
        };
        if !some.contains(&other) {
            some.push(other);
        }
    }
}

fn exchange_bins(bins: &mut [Bin], bins_of: &mut [Vec<usize>], fresh: &mut [Bin], some: &[usize]) {
    for &n in some {
        for segment in &bins[n].segments {
            let of = &mut bins_of[segment.document];
            if let Some(at) = of.iter().position(|&other| other == n) {
                of.swap_remove(at);
            }
        }
    }
    for (bin, &n) in fresh.iter_mut().zip(some) {
        std::mem::swap(&mut bins[n], bin);
        for segment in &bins[n].segments {
            bins_of[segment.document].push(n);
        }
    }
}
