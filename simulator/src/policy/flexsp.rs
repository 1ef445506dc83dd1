//! FlexSP (arXiv 2412.01523, sections on its problem and its solver): in every micro-batch ranks form sequence-parallel groups of
//! as many ranks as suits the sequences that they get, any power of two. Within a group each rank holds a part of the
//! tokens, and an all-to-all of Q, K, V and O gives it all tokens of a part of the heads (Ulysses, arXiv 2309.14509): four
//! forward, four backward in each layer, and nothing is computed meanwhile.
//!
//! Micro-batches are as few as memory allows, or up to [`MORE`] more. Sequences are sorted and cut in micro-batches of
//! about equal tokens, so that each has sequences of similar length; of every number of micro-batches the one whose sum of
//! slowest groups is predicted to be least is taken. Documents are the sequences, wherever the batch packed them.
//!
//! Groups have at most as many ranks as a lane has query heads, and a number that divides them: tensor parallelism has used
//! up the others, as with any Ulysses. The paper runs without tensor parallelism. A document that such a group has no
//! memory for is refused; give the layout fewer lanes.
//!
//! Simplified: a local search over degrees, with sequences longest first onto the group that is then done first, instead of
//! the mixed-integer programme. Groups of a micro-batch wait for each other at its end, as the paper's objective has it
//! (ZeRO-3's collectives join all ranks); weights are held as by all policies, not sharded, and gathering them costs nothing.

use super::groups::{
    Group, Sharing, all_heads, capacity, heads_seconds, keys_to_each, longest_first, passes, phase, suited,
    token_seconds,
};
use super::{Planned, Policy};
use crate::SimulationError;
use crate::batch::Share;
use crate::engine::Program;
use crate::memory::Held;
use crate::scenario::{Recompute, Sequences};
use crate::setting::Setting;

/// How many micro-batches more than memory demands are tried.
const MORE: usize = 4;

pub(super) fn plan(setting: &Setting<'_>, batch: &Sequences) -> Result<Planned, SimulationError> {
    suited(setting, Policy::Flexsp)?;
    let documents = longest_first(batch);
    let degrees = degrees(setting)?;
    let longest = documents.first().copied().unwrap_or(0);
    let most = degrees.iter().map(|degree| degree.room).max().unwrap_or(0);
    if longest > most {
        return Err(SimulationError::Unsuited {
            policy: Policy::Flexsp.to_string(),
            what: format!(
                "a document of {longest} tokens: the {} query heads of a lane, on {} ranks, allow groups whose memory holds {most}; fewer lanes of tensor parallelism, or more ranks, allow larger ones",
                setting.heads.q_heads(),
                setting.ranks()
            ),
        });
    }
    let a_rank = degrees.iter().map(|degree| degree.room / degree.ranks).max().unwrap_or(1).max(1);
    let least = documents.iter().sum::<usize>().div_ceil(a_rank * setting.ranks()).max(1);
    let solver = Solver::new(setting, &documents, degrees);
    let mut best: Option<(f64, Vec<Vec<Group>>)> = None;
    let mut count = least;
    while count <= least + MORE || (best.is_none() && count < 2 * documents.len()) {
        if let Some((seconds, micro_batches)) = solver.solve(count)
            && best.as_ref().is_none_or(|(other, _)| seconds < *other)
        {
            best = Some((seconds, micro_batches));
        }
        count = if count < least + MORE { count + 1 } else { 2 * count };
    }
    let Some((_, micro_batches)) = best else {
        return Err(SimulationError::Unsuited {
            policy: Policy::Flexsp.to_string(),
            what: format!("{} documents, for which no groups with enough memory were found", documents.len()),
        });
    };
    Ok(planned(setting, &micro_batches))
}

/// A number of ranks that a group may have.
#[derive(Clone, Copy, Debug)]
struct Degree {
    ranks: usize,
    /// Tokens that a group has memory for.
    room: usize,
}

fn degrees(setting: &Setting<'_>) -> Result<Vec<Degree>, SimulationError> {
    let (q_heads, kv_heads) = (setting.heads.q_heads(), setting.heads.kv_heads());
    let divides = |ranks: &usize| {
        q_heads.is_multiple_of(*ranks) && (kv_heads.is_multiple_of(*ranks) || ranks.is_multiple_of(kv_heads))
    };
    let powers = std::iter::successors(Some(1), |ranks| Some(2 * ranks));
    let degree = |ranks: usize| {
        let a_rank = capacity(setting, Policy::Flexsp, |tokens| held(setting, tokens, ranks))?;
        Ok(Degree { ranks, room: a_rank * ranks })
    };
    powers.take_while(|ranks| *ranks <= setting.ranks()).filter(divides).map(degree).collect()
}

/// What a rank holds that has `tokens` in a group of `degree`.
fn held(setting: &Setting<'_>, tokens: f64, degree: usize) -> Held {
    // Where several ranks have the same kv head, each holds its K and V of all tokens.
    let keys = (degree as f64 / setting.heads.kv_heads() as f64 - 1.0).max(0.0) * tokens;
    let all = setting.scenario.recompute != Recompute::Full;
    let layers = if all { f64::from(setting.closing.layers) } else { 1.0 };
    Held { tokens, at_once: tokens, in_flight: 1.0, keys, layers, ..Held::default() }
}

/// Finds groups for the documents of a step.
#[derive(Debug)]
struct Solver<'a> {
    documents: &'a [usize],
    ranks: usize,
    degrees: Vec<Degree>,
    /// Predicted seconds of a group of each degree for each document.
    seconds: Vec<Vec<f64>>,
}

/// A group that is being filled.
#[derive(Clone, Debug)]
struct Filled {
    degree: usize,
    seconds: f64,
    tokens: usize,
    documents: Vec<usize>,
}

impl<'a> Solver<'a> {
    fn new(setting: &Setting<'_>, documents: &'a [usize], degrees: Vec<Degree>) -> Solver<'a> {
        let token = token_seconds(setting);
        let passes = passes(setting);
        let of = |degree: &Degree| {
            let carried = exchange_seconds(setting, degree.ranks);
            let each = |&tokens: &usize| {
                let [forward, backward] = heads_seconds(setting, tokens, degree.ranks);
                let a_rank = tokens as f64 / degree.ranks as f64;
                a_rank * (token + carried * (passes[0] + passes[1]))
                    + passes[0] * forward
                    + passes[1] * backward
            };
            documents.iter().map(each).collect()
        };
        let seconds = degrees.iter().map(of).collect();
        Solver { documents, ranks: setting.ranks(), degrees, seconds }
    }

    /// Groups of each of `count` micro-batches and the predicted seconds, if memory allows.
    fn solve(&self, count: usize) -> Option<(f64, Vec<Vec<Group>>)> {
        let total: usize = self.documents.iter().sum();
        let (mut micro_batches, mut seconds) = (Vec::with_capacity(count), 0.0);
        let (mut first, mut tokens) = (0, 0);
        for n in 0..count {
            // A document goes where its middle falls.
            let until = (total as u128 * (n as u128 + 1) / count as u128) as usize;
            let mut end = first;
            while end < self.documents.len() && (n + 1 == count || tokens + self.documents[end] / 2 < until) {
                tokens += self.documents[end];
                end += 1;
            }
            if end > first {
                let (slowest, groups) = self.micro_batch(first..end)?;
                seconds += slowest;
                micro_batches.push(self.placed(groups));
            }
            first = end;
        }
        Some((seconds, micro_batches))
    }

    /// Degrees by local search: the best of equal ones, then one group cut in two, or two made one, while that helps.
    fn micro_batch(&self, documents: std::ops::Range<usize>) -> Option<(f64, Vec<Filled>)> {
        let mut best: Option<(f64, Vec<Filled>)> = None;
        let mut counts = Vec::new();
        for at in 0..self.degrees.len() {
            let equal = self.equal(at);
            if self.better(&mut best, &equal, documents.clone()) {
                counts = equal;
            }
        }
        loop {
            let mut next = None;
            for large in 1..self.degrees.len() {
                let parts = self.degrees[large].ranks / self.degrees[large - 1].ranks;
                let mut split = counts.clone();
                if split.get(large).is_some_and(|count| *count > 0) {
                    split[large] -= 1;
                    split[large - 1] += parts;
                    if self.better(&mut best, &split, documents.clone()) {
                        next = Some(split);
                    }
                }
                let mut merged = counts.clone();
                if merged.get(large - 1).is_some_and(|count| *count >= parts) {
                    merged[large - 1] -= parts;
                    merged[large] += 1;
                    if self.better(&mut best, &merged, documents.clone()) {
                        next = Some(merged);
                    }
                }
            }
            match next {
                Some(next) => counts = next,
                None => return best,
            }
        }
    }

    /// As many groups of a degree as there are ranks for, the rest smaller ones.
    fn equal(&self, at: usize) -> Vec<usize> {
        let mut counts = vec![0; self.degrees.len()];
        let mut left = self.ranks;
        for at in (0..=at).rev() {
            counts[at] = left / self.degrees[at].ranks;
            left %= self.degrees[at].ranks;
        }
        counts
    }

    /// Puts documents in `counts` groups of each degree, and keeps that if it is the best so far.
    fn better(
        &self,
        best: &mut Option<(f64, Vec<Filled>)>,
        counts: &[usize],
        documents: std::ops::Range<usize>,
    ) -> bool {
        let Some(groups) = self.filled(counts, documents) else { return false };
        let slowest = groups.iter().map(|group| group.seconds).fold(0.0, f64::max);
        let is_better = best.as_ref().is_none_or(|(seconds, _)| slowest < *seconds);
        if is_better {
            *best = Some((slowest, groups));
        }
        is_better
    }

    /// Longest first, each where it is done first.
    fn filled(&self, counts: &[usize], documents: std::ops::Range<usize>) -> Option<Vec<Filled>> {
        let empty = |degree| Filled { degree, seconds: 0.0, tokens: 0, documents: Vec::new() };
        let mut groups: Vec<Filled> =
            (0..counts.len()).rev().flat_map(|at| std::iter::repeat_n(empty(at), counts[at])).collect();
        for at in documents {
            let tokens = self.documents[at];
            let done = |group: &Filled| group.seconds + self.seconds[group.degree][at];
            let fits = |group: &&mut Filled| group.tokens + tokens <= self.degrees[group.degree].room;
            let group = groups.iter_mut().filter(fits).min_by(|a, b| done(a).total_cmp(&done(b)))?;
            group.seconds = done(group);
            group.tokens += tokens;
            group.documents.push(tokens);
        }
        Some(groups)
    }

    /// Gives groups ranks that follow each other, the largest first.
    fn placed(&self, groups: Vec<Filled>) -> Vec<Group> {
        let mut first = 0;
        let placed = groups.into_iter().map(|group| {
            let end = first + self.degrees[group.degree].ranks as u32;
            let ranks = (first..end).collect();
            first = end;
            Group { ranks, documents: group.documents }
        });
        placed.filter(|group| !group.documents.is_empty()).collect()
    }
}

/// Seconds that Q, K, V and O of a token of each rank travel in one direction of a layer.
fn exchange_seconds(setting: &Setting<'_>, degree: usize) -> f64 {
    if degree == 1 {
        return 0.0;
    }
    let to_each = 2.0 * setting.query_bytes() / degree as f64 + keys_to_each(setting, degree);
    let near = degree.min(setting.closing.devices_per_node) as f64;
    let [within, between] = setting.links.bytes_per_second;
    ((near - 1.0) * to_each / within).max((degree as f64 - near) * to_each / between)
}

fn planned(setting: &Setting<'_>, micro_batches: &[Vec<Group>]) -> Planned {
    let ranks = setting.ranks();
    let mut totals = vec![Share::default(); ranks];
    let mut most = vec![held(setting, 0.0, 1); ranks];
    let (mut slowest, mut mean) = (0.0, 0.0);
    let mut phases = Vec::with_capacity(micro_batches.len());
    for groups in micro_batches {
        let phase = phase(setting, Sharing::Heads, groups, &mut totals);
        for group in groups {
            for &rank in &group.ranks {
                let held = held(setting, phase.tokens_of(rank as usize), group.ranks.len());
                let most = &mut most[rank as usize];
                most.tokens = most.tokens.max(held.tokens);
                most.at_once = most.tokens;
                most.keys = most.keys.max(held.keys);
            }
        }
        for nano in &phase.nanos {
            let seconds = nano.forward.seconds.iter().zip(&nano.backward.seconds).map(|(a, b)| a + b);
            slowest += seconds.clone().fold(0.0, f64::max);
            mean += seconds.sum::<f64>() / ranks as f64;
        }
        phases.push(phase);
    }
    Planned {
        program: Program::Rounds(phases),
        cells: all_heads(setting, &totals),
        imbalance: if mean > 0.0 { slowest / mean } else { 1.0 },
        held: most,
    }
}
