//! Replicas that compute the attention of their own sequences: what trainers do without a pool.
//!
//! `fixed` is plain packing: sequences are filled in order and dealt to replicas in turn; within a replica a sequence is
//! cut in `2 c` chunks for `c` ranks, of which rank `i` has chunks `i` and `2 c - 1 - i` (Llama 3's context parallelism,
//! arXiv 2407.21783, section 3.3.2; Megatron-LM's). `cp` cuts each document so (per-document sharding of WLB-LLM, arXiv
//! 2503.17924, section on context parallelism). Both gather K and V of all ranks before attention, keep them, and reduce dK
//! and dV after the backward pass; nothing hides that. `cp-ring` passes K and V around a ring, while what has come is
//! computed (Ring Attention, arXiv 2310.01889); its tasks are those of two chunks, and smaller. All choose the number of
//! ranks that share a sequence that takes the least time, where the layout names none.

use super::{Choice, Planned, Policy, by_context};
use crate::SimulationError;
use crate::batch::{Arriving, Share, by_document, by_sequence};
use crate::engine::{Program, Replica};
use crate::memory::Held;
use crate::phase::{Attend, Exchange, Nano, Phase};
use crate::scenario::{Recompute, Sequences};
use crate::setting::Setting;

pub(super) fn choices(setting: &Setting<'_>, sequences: usize) -> Vec<Choice> {
    by_context(setting.layout, sequences).into_iter().map(Choice::of).collect()
}

/// Sequences dealt to replicas in turn.
pub(super) fn plan(
    setting: &Setting<'_>,
    policy: Policy,
    batch: &Sequences,
) -> Result<Planned, SimulationError> {
    if setting.layout.dedicated > 0 {
        return Err(SimulationError::Unsuited {
            policy: policy.to_string(),
            what: "dedicated attention servers, which would be idle".to_owned(),
        });
    }
    let ranks = setting.layout.context.unwrap_or(1) as usize;
    let replicas = setting.ranks() / ranks;
    let micro_batches = (setting.layout.micro_batches as usize).min(batch.len().div_ceil(replicas)).max(1);
    let mut dealt = vec![vec![vec![Share::default(); ranks]; micro_batches]; replicas];
    for (n, sequence) in batch.iter().enumerate() {
        let shares = match policy {
            Policy::Fixed => by_sequence(sequence, ranks, setting),
            Policy::CpRing => by_document(sequence, ranks, Arriving::ByChunk, setting),
            _ => by_document(sequence, ranks, Arriving::AtOnce, setting),
        };
        let into = &mut dealt[n % replicas][n / replicas % micro_batches];
        for (sum, share) in into.iter_mut().zip(shares) {
            sum.tokens += share.tokens;
            sum.cells += share.cells;
            sum.seconds[0] += share.seconds[0];
            sum.seconds[1] += share.seconds[1];
        }
    }
    Ok(apart(setting, &dealt, if policy == Policy::CpRing { Keys::Ring } else { Keys::Gathered }))
}

/// How ranks that share a sequence come by its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keys {
    /// They are gathered, and what a chunk sees is read where it lies.
    Gathered,
    /// They are gathered, and what each chunk sees of every document is copied into one piece.
    Copied,
    /// They come from neighbours, and go on to others.
    Ring,
}

impl Keys {
    /// Tokens of others whose K and V a rank holds in a layer that has `own` of the `together` tokens that `ranks` share,
    /// each as often as it holds them.
    fn of_others(self, own: f64, together: f64, ranks: usize) -> f64 {
        let others = together - own;
        match self {
            _ if ranks == 1 => 0.0,
            Keys::Gathered => others,
            // Chunks `i` and `2 ranks - 1 - i` of a document see `2 ranks + 1` chunks of it; own tokens have their copy anyhow.
            Keys::Copied => others + together * (1.0 + 0.5 / ranks as f64) - own,
            // Those that are computed with, and those that come next.
            Keys::Ring => 2.0 * others / ranks as f64,
        }
    }

    /// In how many layers at once.
    fn layers(self, setting: &Setting<'_>, in_flight: f64) -> f64 {
        // A layer that is computed again gathers its keys again.
        let are_kept = self != Keys::Ring && setting.scenario.recompute != Recompute::Full;
        if are_kept { f64::from(setting.closing.layers) * in_flight } else { 1.0 }
    }
}

/// The program of replicas whose ranks compute `dealt[replica][micro-batch][rank]`.
pub(super) fn apart(setting: &Setting<'_>, dealt: &[Vec<Vec<Share>>], keys: Keys) -> Planned {
    let ranks = dealt.first().and_then(|replica| replica.first()).map_or(1, Vec::len);
    let mut replicas = Vec::with_capacity(dealt.len());
    let mut cells = vec![0u64; setting.devices()];
    let mut held = vec![Held::default(); setting.devices()];
    let (mut most, mut mean) = (0.0, 0.0);
    for (n, micro_batches) in dealt.iter().enumerate() {
        let first = n * ranks;
        let phases = micro_batches.iter().map(|shares| phase(setting, first, shares, keys)).collect();
        replicas.push(Replica { first, micro_batches: phases });
        for shares in micro_batches {
            let together: f64 = shares.iter().map(|share| share.tokens as f64).sum();
            for (rank, share) in shares.iter().enumerate() {
                let own = share.tokens as f64;
                for stage in 0..setting.closing.stages {
                    let device = stage * setting.ranks() + first + rank;
                    cells[device] += share.cells * setting.heads.kv_heads() as u64;
                    let held = &mut held[device];
                    held.tokens = held.tokens.max(own);
                    held.at_once = held.tokens;
                    held.in_flight = (setting.closing.stages - stage).min(micro_batches.len()) as f64;
                    held.keys = held.keys.max(keys.of_others(own, together, ranks));
                    held.layers = keys.layers(setting, held.in_flight);
                }
            }
        }
    }
    let micro_batches = dealt.iter().map(Vec::len).max().unwrap_or(0);
    for at in 0..micro_batches {
        let at_once = dealt.iter().filter_map(|replica| replica.get(at)).flatten();
        let seconds: Vec<f64> = at_once.map(|share| share.seconds[0] + share.seconds[1]).collect();
        most += seconds.iter().copied().fold(0.0, f64::max);
        mean += seconds.iter().sum::<f64>() / (dealt.len() * ranks) as f64;
    }
    let imbalance = if mean > 0.0 { most / mean } else { 1.0 };
    Planned { program: Program::Apart(replicas), cells, imbalance, held }
}

fn phase(setting: &Setting<'_>, first: usize, shares: &[Share], keys: Keys) -> Phase {
    let ranks = shares.len();
    let seconds = |direction: usize| shares.iter().map(|share| share.seconds[direction]).collect::<Vec<_>>();
    let (mut forward, mut backward) = (Attend::local(seconds(0)), Attend::local(seconds(1)));
    if ranks > 1 {
        let bytes = |device: u32| shares[device as usize].tokens as f64 * setting.key_bytes();
        let near = |a: u32, b: u32| setting.closing.near(first as u32 + a, first as u32 + b);
        let group = vec![(0..ranks as u32).collect::<Vec<_>>()];
        let gather = Exchange::gather(ranks, group, bytes, near);
        match keys {
            Keys::Gathered | Keys::Copied => {
                let gather = gather.dragged(setting.gather_drag());
                forward.there = gather.clone();
                backward.back = gather;
            }
            Keys::Ring => {
                let last = vec![1.0 / ranks as f64; ranks];
                backward.there = gather.clone().and(&gather);
                forward.there = gather;
                (forward.waits, backward.waits) = (last.clone(), last);
            }
        }
    }
    let tokens = shares.iter().map(|share| share.tokens as f64).collect();
    Phase { nanos: vec![Nano { tokens, forward, backward }] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_held_as_often_as_policies_copy_them() {
        for ranks in [1usize, 2, 3, 8] {
            let (own, together) = (1000.0, 1000.0 * ranks as f64);
            let held = |keys: Keys| keys.of_others(own, together, ranks);
            assert_eq!(held(Keys::Gathered), together - own);
            for rank in 0..ranks {
                // What chunks of a document see, of which own keys are counted with the rank's own tokens.
                let seen = |chunk: usize| together * (chunk + 1) as f64 / (2 * ranks) as f64;
                let copies = seen(rank) + seen(2 * ranks - 1 - rank) - own;
                let expected = if ranks == 1 { 0.0 } else { together - own + copies };
                assert!((held(Keys::Copied) - expected).abs() < 1e-9, "{ranks} ranks");
            }
            assert_eq!(held(Keys::Ring), 2.0 * (together - own) / ranks as f64);
        }
    }
}
