//! Ranks in groups that differ from one micro-batch to the next.

use outboard_attention::Direction;
use outboard_planner::TaskShape;

use crate::SimulationError;
use crate::batch::{Arriving, Share, by_document, cells};
use crate::memory::{Held, Memory};
use crate::outcome::fits;
use crate::phase::{Attend, Exchange, Nano, Phase};
use crate::policy::Policy;
use crate::scenario::{Recompute, Sequences};
use crate::setting::Setting;

/// How the ranks of a group share documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sharing {
    /// Each has chunks of the rows; K and V go around while what has come is computed.
    Ring,
    /// Each has a part of the heads of all rows, for which Q, K, V and O change places and nothing is computed meanwhile.
    Heads,
}

/// Ranks that compute some documents together.
#[derive(Clone, Debug)]
pub(super) struct Group {
    /// In order.
    pub(super) ranks: Vec<u32>,
    pub(super) documents: Vec<usize>,
}

/// Refuses what policies of groups have no notion of.
pub(super) fn suited(setting: &Setting<'_>, policy: Policy) -> Result<(), SimulationError> {
    let layout = setting.layout;
    let what = if layout.pipeline > 1 {
        format!("a pipeline of {} stages; give it pipeline 1", layout.pipeline)
    } else if layout.dedicated > 0 {
        format!("{} dedicated attention servers, which would be idle; give it none", layout.dedicated)
    } else {
        return Ok(());
    };
    Err(SimulationError::Unsuited { policy: policy.to_string(), what })
}

/// Documents of a step, longest first.
pub(super) fn longest_first(batch: &Sequences) -> Vec<usize> {
    let mut documents: Vec<usize> = batch.iter().flatten().copied().collect();
    documents.sort_unstable_by(|a, b| b.cmp(a));
    documents
}

/// The most tokens of a micro-batch that a rank has memory for, where it holds `held(tokens)`.
pub(super) fn capacity(
    setting: &Setting<'_>,
    policy: Policy,
    held: impl Fn(f64) -> Held,
) -> Result<usize, SimulationError> {
    let total = |tokens: f64| Memory::of(setting, 0, held(tokens)).total();
    let none = total(0.0);
    let room_at = |tokens: f64| {
        let a_token = (total(tokens) - none) / tokens;
        (setting.scenario.gpu.memory_bytes - none) / a_token.max(f64::MIN_POSITIVE)
    };
    // A token may need more where there are more of them, since another part comes to need most, but never less.
    let at_most = room_at(1.0);
    let room = if at_most > 1.0 { room_at(at_most) } else { at_most };
    if room < 1.0 {
        fits(setting.scenario, policy, &[Memory::of(setting, 0, held(1.0))])?;
    }
    // A little less, for what is lost in rounding.
    Ok((room * (1.0 - 1e-9)) as usize)
}

/// Seconds of a rank for a token in all layers and the head, but for core attention, both passes.
pub(super) fn token_seconds(setting: &Setting<'_>) -> f64 {
    f64::from(setting.closing.layers) * setting.token_seconds() + setting.closing.costs.head
}

/// How often each pass of core attention is computed in a step, forward and backward.
pub(super) fn passes(setting: &Setting<'_>) -> [f64; 2] {
    let layers = f64::from(setting.closing.layers);
    if setting.scenario.recompute == Recompute::Full { [2.0 * layers, layers] } else { [layers; 2] }
}

/// What a rank needs for its part of a document whose heads `degree` ranks share, forward and backward.
pub(super) fn heads_seconds(setting: &Setting<'_>, tokens: usize, degree: usize) -> [f64; 2] {
    let (kv_heads, group) = (setting.heads.kv_heads(), setting.heads.group());
    // Where there are fewer kv heads than ranks, several have the same one, with other query heads.
    let group = if degree > kv_heads { (group * kv_heads).div_ceil(degree) } else { group };
    let shape = TaskShape {
        rows: tokens * group,
        keys: tokens,
        cells: (cells(tokens) * kv_heads as u64).div_ceil(degree as u64),
    };
    [Direction::Forward, Direction::Backward].map(|direction| setting.seconds(direction, shape))
}

/// Bytes of K and V that a rank sends to each other one for each of its tokens, where `degree` ranks share heads.
pub(super) fn keys_to_each(setting: &Setting<'_>, degree: usize) -> f64 {
    setting.key_bytes() / degree.min(setting.heads.kv_heads()) as f64
}

/// What each rank of a group computes.
pub(super) fn shares(setting: &Setting<'_>, sharing: Sharing, group: &Group) -> Vec<Share> {
    let degree = group.ranks.len();
    if sharing == Sharing::Ring || degree == 1 {
        return by_document(&group.documents, degree, Arriving::ByChunk, setting);
    }
    let tokens: u64 = group.documents.iter().map(|&tokens| tokens as u64).sum();
    let cells: u64 = group.documents.iter().map(|&tokens| cells(tokens)).sum();
    let mut seconds = [0.0; 2];
    for &tokens in &group.documents {
        let [forward, backward] = heads_seconds(setting, tokens, degree);
        seconds[0] += forward;
        seconds[1] += backward;
    }
    let part = |of: u64, n: usize| {
        let border = |n: usize| (u128::from(of) * n as u128 / degree as u128) as u64;
        border(n + 1) - border(n)
    };
    // Cells of a part of the heads count as that part of the cells.
    (0..degree).map(|n| Share { tokens: part(tokens, n), cells: part(cells, n), seconds }).collect()
}

/// Cells that each rank computes, of all kv heads of a lane.
pub(super) fn all_heads(setting: &Setting<'_>, totals: &[Share]) -> Vec<u64> {
    totals.iter().map(|share| share.cells * setting.heads.kv_heads() as u64).collect()
}

/// A micro-batch of all ranks, each in one group or in none, which has nothing to do. Adds what each rank computes to
/// `totals`.
pub(super) fn phase(
    setting: &Setting<'_>,
    sharing: Sharing,
    groups: &[Group],
    totals: &mut [Share],
) -> Phase {
    let ranks = setting.ranks();
    let mut of_rank = vec![Share::default(); ranks];
    let mut waits = vec![1.0; ranks];
    for group in groups {
        for (&rank, share) in group.ranks.iter().zip(shares(setting, sharing, group)) {
            let total = &mut totals[rank as usize];
            total.tokens += share.tokens;
            total.cells += share.cells;
            total.seconds[0] += share.seconds[0];
            total.seconds[1] += share.seconds[1];
            of_rank[rank as usize] = share;
            if sharing == Sharing::Ring {
                waits[rank as usize] = 1.0 / group.ranks.len() as f64;
            }
        }
    }
    let seconds = |direction: usize| of_rank.iter().map(|share| share.seconds[direction]).collect();
    let (mut forward, mut backward) = (Attend::local(seconds(0)), Attend::local(seconds(1)));
    let shared: Vec<Vec<u32>> =
        groups.iter().filter(|group| group.ranks.len() > 1).map(|group| group.ranks.clone()).collect();
    let tokens = |rank: u32| of_rank[rank as usize].tokens as f64;
    if !shared.is_empty() {
        match sharing {
            Sharing::Ring => {
                let around = |times: f64| {
                    let bytes = |rank: u32| tokens(rank) * setting.key_bytes() * times;
                    Exchange::gather(ranks, shared.clone(), bytes, setting.near())
                };
                // Backward K and V go around once more, and their gradients.
                (forward.there, backward.there) = (around(1.0), around(2.0));
                forward.waits.clone_from(&waits);
                backward.waits = waits;
            }
            Sharing::Heads => {
                let queries = |rank: u32, degree: usize| tokens(rank) * setting.query_bytes() / degree as f64;
                let all = |rank: u32, degree: usize| {
                    queries(rank, degree) + tokens(rank) * keys_to_each(setting, degree)
                };
                let exchange = |bytes: &dyn Fn(u32, usize) -> f64| {
                    Exchange::all_to_all(ranks, shared.clone(), bytes, setting.near())
                };
                // Q, K and V there and O back; dO there, and dQ, dK and dV back.
                (forward.there, forward.back) = (exchange(&all), exchange(&queries));
                (backward.there, backward.back) = (exchange(&queries), exchange(&all));
            }
        }
    }
    Phase { nanos: vec![Nano { tokens: (0..ranks as u32).map(tokens).collect(), forward, backward }] }
}
