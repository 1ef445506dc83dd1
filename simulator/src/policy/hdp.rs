//! ByteScale's hybrid data parallelism (arXiv 2502.21231, sections on hybrid data parallelism and on the balance scheduler):
//! each sequence gets as many ranks as it needs, `ceil(length / capacity)`, which pass K and V around a ring of their own
//! (as in `cp-ring`); shorter ones are packed up to the capacity and need no others. Ranks run as many micro-batches as
//! they come to, and meet only at the end of the step, so what is balanced is their time over the step: longest first, each
//! onto the ranks with the least so far. They are computed in the opposite order, so that gradients are reduced while the
//! longest, which are on most ranks, go through the backward pass.
//!
//! The capacity, tokens of a rank in a micro-batch, is the operator's to set. Here it is what memory holds, or whatever less
//! makes the step shortest by prediction. Documents are the sequences, wherever the batch packed them.
//!
//! Simplified: no activations are offloaded to hosts, so a long sequence never gets by with fewer ranks; there is no pipeline
//! (its balance of stages is a second scheduler of the paper); a ring's latency counts once, not for every neighbour.

use super::groups::{
    Group, Sharing, all_heads, capacity, longest_first, passes, phase, shares, suited, token_seconds,
};
use super::{Planned, Policy};
use crate::SimulationError;
use crate::batch::Share;
use crate::engine::Program;
use crate::memory::Held;
use crate::scenario::Sequences;
use crate::setting::Setting;

/// The fewest tokens of a rank, so that every rank of a ring has rows of both halves of a document.
const LEAST: usize = 4;
/// How many times fewer tokens than an even share a capacity may come to.
const FINEST: usize = 8;

pub(super) fn plan(setting: &Setting<'_>, batch: &Sequences) -> Result<Planned, SimulationError> {
    suited(setting, Policy::Hdp)?;
    let (ranks, documents) = (setting.ranks(), longest_first(batch));
    // Chunks are cut evenly, to within a token each.
    let most = capacity(setting, Policy::Hdp, |tokens| held(tokens + 2.0, 2.0 * tokens))?;
    let longest = documents.first().copied().unwrap_or(0);
    if most < LEAST || longest.div_ceil(most) > ranks {
        return Err(SimulationError::Unsuited {
            policy: Policy::Hdp.to_string(),
            what: format!(
                "a document of {longest} tokens: memory holds {most} tokens of it on each of {ranks} ranks"
            ),
        });
    }
    let even = (documents.iter().sum::<usize>() / ranks).max(1);
    // Of the longest document on so many ranks; with all of them the capacity may still be more than short ones fill.
    let degrees =
        std::iter::successors(Some(longest.div_ceil(most)), |degree| Some(degree + degree.div_ceil(4)));
    let degrees = degrees.take_while(|degree| *degree < ranks).chain([ranks]);
    let by_degree = degrees.map(|degree| longest.div_ceil(degree).max(LEAST));
    let evenly = std::iter::successors(Some(most.min(even)), |capacity| Some(capacity / 2))
        .take_while(|capacity| *capacity >= LEAST.max(even / FINEST).max(longest.div_ceil(ranks)));
    let capacities = [most].into_iter().chain(by_degree).chain(evenly);
    let arranged = capacities.map(|capacity| Arranged::new(setting, &documents, capacity));
    let best = arranged.min_by(|a, b| a.seconds().total_cmp(&b.seconds()));
    Ok(best.unwrap_or_else(|| Arranged::new(setting, &documents, most)).planned(setting))
}

/// What a rank holds that has `tokens`, and `keys` tokens' K and V of its neighbours in one layer.
fn held(tokens: f64, keys: f64) -> Held {
    Held { tokens, at_once: tokens, in_flight: 1.0, keys, layers: 1.0, ..Held::default() }
}

/// Who computes what, in which order.
#[derive(Debug)]
struct Arranged {
    /// Groups of each micro-batch; those of a rank follow each other in this order.
    micro_batches: Vec<Vec<Group>>,
    /// Predicted seconds of each rank.
    loads: Vec<f64>,
}

impl Arranged {
    fn new(setting: &Setting<'_>, documents: &[usize], capacity: usize) -> Arranged {
        let ranks = setting.ranks();
        let mut arranged = Arranged { micro_batches: Vec::new(), loads: vec![0.0; ranks] };
        let mut next = vec![0; ranks];
        let mut packs: Vec<Vec<(usize, Vec<usize>)>> = vec![Vec::new(); ranks];
        for &tokens in documents {
            if tokens > capacity {
                let group =
                    Group { ranks: arranged.least(tokens.div_ceil(capacity)), documents: vec![tokens] };
                let members = group.ranks.iter().map(|&rank| rank as usize);
                let start = members.clone().map(|rank| arranged.loads[rank]).fold(0.0, f64::max);
                let end = start + seconds(setting, &group);
                let at = members.clone().map(|rank| next[rank]).max().unwrap_or(0);
                for rank in members {
                    (arranged.loads[rank], next[rank]) = (end, at + 1);
                }
                arranged.add(at, group);
                continue;
            }
            let least = arranged.least(1);
            let rank = least.first().map_or(0, |&rank| rank as usize);
            arranged.loads[rank] += seconds(setting, &Group { ranks: least, documents: vec![tokens] });
            match packs[rank].iter_mut().find(|(sum, _)| sum + tokens <= capacity) {
                Some((sum, pack)) => {
                    *sum += tokens;
                    pack.push(tokens);
                }
                None => packs[rank].push((tokens, vec![tokens])),
            }
        }
        for (rank, packs) in packs.into_iter().enumerate() {
            for (n, (_, documents)) in packs.into_iter().enumerate() {
                arranged.add(next[rank] + n, Group { ranks: vec![rank as u32], documents });
            }
        }
        arranged
    }

    /// The ranks with the least to do so far, in order.
    fn least(&self, count: usize) -> Vec<u32> {
        let by_load =
            |a: &u32, b: &u32| self.loads[*a as usize].total_cmp(&self.loads[*b as usize]).then(a.cmp(b));
        let all = 0..self.loads.len() as u32;
        if count == 1 {
            return all.min_by(by_load).into_iter().collect();
        }
        let mut ranks: Vec<u32> = all.collect();
        ranks.sort_unstable_by(by_load);
        ranks.truncate(count);
        ranks.sort_unstable();
        ranks
    }

    fn add(&mut self, at: usize, group: Group) {
        if self.micro_batches.len() <= at {
            self.micro_batches.resize_with(at + 1, Vec::new);
        }
        self.micro_batches[at].push(group);
    }

    fn seconds(&self) -> f64 {
        self.loads.iter().copied().fold(0.0, f64::max)
    }

    fn planned(&self, setting: &Setting<'_>) -> Planned {
        let mut totals = vec![Share::default(); setting.ranks()];
        let mut most = vec![held(0.0, 0.0); setting.ranks()];
        let mut forward = Vec::with_capacity(self.micro_batches.len());
        for groups in self.micro_batches.iter().rev() {
            let phase = phase(setting, Sharing::Ring, groups, &mut totals);
            for group in groups {
                let together: usize = group.documents.iter().sum();
                for &rank in &group.ranks {
                    let (held, tokens) = (&mut most[rank as usize], phase.tokens_of(rank as usize));
                    held.tokens = held.tokens.max(tokens);
                    held.at_once = held.tokens;
                    // Two neighbours' K and V: what is computed with, and what comes next.
                    let keys = 2.0 * (together as f64 - tokens) / group.ranks.len() as f64;
                    held.keys = held.keys.max(keys);
                }
            }
            forward.push(phase);
        }
        let seconds: Vec<f64> = totals.iter().map(|share| share.seconds[0] + share.seconds[1]).collect();
        let mean = seconds.iter().sum::<f64>() / seconds.len() as f64;
        let imbalance = if mean > 0.0 { seconds.iter().copied().fold(0.0, f64::max) / mean } else { 1.0 };
        Planned {
            program: Program::Together { backward: forward.clone(), forward },
            cells: all_heads(setting, &totals),
            imbalance,
            held: most,
        }
    }
}

/// Predicted seconds of a group for its documents, in a step.
fn seconds(setting: &Setting<'_>, group: &Group) -> f64 {
    let shares = shares(setting, Sharing::Ring, group);
    let degree = group.ranks.len();
    let together: u64 = shares.iter().map(|share| share.tokens).sum();
    let near = setting.near();
    let neighbours = |n: usize| near(group.ranks[n], group.ranks[(n + 1) % degree]);
    let link = usize::from(!(0..degree).all(neighbours));
    let token = token_seconds(setting);
    let of = |share: &Share| {
        let bytes = (together - share.tokens) as f64 * setting.key_bytes();
        let around = bytes / setting.links.bytes_per_second[link];
        let attention = (0..2).map(|direction| {
            let (computed, carried) = (share.seconds[direction], around * (direction + 1) as f64);
            passes(setting)[direction] * computed.max(carried + computed / degree as f64)
        });
        let attention: f64 = if degree > 1 { attention.sum() } else { attention_alone(setting, share) };
        token * share.tokens as f64 + attention
    };
    shares.iter().map(of).fold(0.0, f64::max)
}

fn attention_alone(setting: &Setting<'_>, share: &Share) -> f64 {
    let passes = passes(setting);
    passes[0] * share.seconds[0] + passes[1] * share.seconds[1]
}
