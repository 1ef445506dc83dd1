//! Balance: who gives how much to whom.

use std::cmp::Reverse;

use crate::cost::Cost;
use crate::cut::{Cut, Edge, carve};
use crate::kin;
use crate::plan::Effort;
use crate::search::{self, Links, Rect, Terms};
use crate::sheet::{Sheet, Strip};
use crate::start::Share;

/// What one round leaves over, through rounding, the next may move.
const ROUNDS: usize = 4;
/// Slices are shaped as if keys cost so many times as much: more where only the home sees them beside who takes them,
/// less where nobody else does. The way that costs least is taken.
const SHAPES: [f64; 4] = [1.4, 1.0, 0.67, 0.4];
/// Where heads run out, keys that stay behind are worth so much more.
const SCARCITIES: [f64; 2] = [0.0, 1.0];
/// Exchanges tried for every slot.
const TRIES_AT_ONE_HEAD: usize = 30;
const TRIES_AT_MANY_HEADS: usize = 24;
/// A link that carries more than this part of the busiest one's bytes is spared.
const NEAR_BUSIEST: f64 = 0.9;
/// There, a byte on it is worth so many others besides its own.
const SCARCE: f64 = 1.0;
/// A busy slot cuts its longest strips, as many as hold this many times what it gives.
const ENOUGH: f64 = 1.3;

/// Moves slices from slots above their cap to slots below, until none is above or nothing helps.
pub(crate) fn balance(
    sheets: &[Sheet<'_>],
    cost: &Cost,
    shares: &[Share],
    held: &mut [Vec<Strip>],
    effort: Effort,
) {
    kin::relieve(sheets, cost, shares, held);
    for round in 0..ROUNDS {
        let load: Vec<u64> = held.iter().map(|strips| strips.iter().map(Strip::cells).sum()).collect();
        let surplus = |n: usize| load[n].saturating_sub(shares[n].cap);
        let mut donors: Vec<usize> =
            (0..shares.len()).filter(|&n| surplus(n) > shares[n].slack.saturating_mul(2)).collect();
        donors.sort_unstable_by_key(|&n| (Reverse(surplus(n)), n));
        let mut pool = Pool::default();
        for (n, share) in shares.iter().enumerate() {
            pool.put(n, share.cap.saturating_sub(load[n]), share);
        }
        let deal = |&slot: &usize| {
            let edges = pool.deal(surplus(slot), shares[slot].slack, shares);
            Donor {
                slot,
                surplus: surplus(slot),
                strips: longest(&mut held[slot], surplus(slot)),
                edges,
                scarce: 0.0,
            }
        };
        let mut donors: Vec<Donor> = donors.iter().map(deal).collect();
        if round == 0 && effort == Effort::Search {
            exchange(sheets, cost, shares, &load, &mut donors);
        }
        let mut moved = false;
        for donor in donors {
            let cut = relieve(sheets, cost, shares[donor.slot].rank, &donor);
            moved |= !cut.given.is_empty();
            held[donor.slot].extend(cut.kept);
            for taken in cut.given {
                held[taken.slot].push(taken.strip);
            }
        }
        if !moved {
            return;
        }
    }
}

/// A slot that gives.
pub(crate) struct Donor {
    pub(crate) slot: usize,
    /// Cells above its cap.
    pub(crate) surplus: u64,
    /// What it may cut.
    pub(crate) strips: Vec<Strip>,
    pub(crate) edges: Vec<Edge>,
    /// How many bytes in all a byte on its link is worth.
    pub(crate) scarce: f64,
}

/// Deals receivers out anew where that saves bytes.
fn exchange(sheets: &[Sheet<'_>], cost: &Cost, shares: &[Share], load: &[u64], donors: &mut [Donor]) {
    let causal = |strip: &Strip| sheets[strip.sheet].is_causal();
    let rect =
        |strip: &Strip| Rect::new(strip.kv_heads.len() as f64, strip.q.start() as f64, strip.q.end() as f64);
    let mut room: Vec<f64> =
        shares.iter().zip(load).map(|(share, load)| share.cap as f64 - *load as f64).collect();
    for edge in donors.iter().flat_map(|donor| &donor.edges) {
        room[edge.slot] -= edge.cells as f64;
    }
    let (mut which, mut searched) = (Vec::new(), Vec::new());
    for (n, donor) in donors.iter().enumerate() {
        if donor.strips.iter().all(causal) && !donor.edges.is_empty() {
            which.push(n);
            searched.push(search::Donor {
                slot: donor.slot,
                surplus: donor.surplus as f64,
                strips: donor.strips.iter().map(rect).collect(),
                edges: donor
                    .edges
                    .iter()
                    .map(|edge| search::Edge { slot: edge.slot, cells: edge.cells as f64, sent: 0.0 })
                    .collect(),
            });
        }
    }
    let grain = shares.iter().map(|share| share.slack).min().unwrap_or(0) as f64;
    let many_heads = donors.iter().flat_map(|donor| &donor.strips).any(|strip| strip.kv_heads.len() > 1);
    let tries = shares.len() * if many_heads { TRIES_AT_MANY_HEADS } else { TRIES_AT_ONE_HEAD };
    let terms = Terms { shape: cost.shape(), grain: 0.5 * grain, tries };
    let links = Links::new(shares.iter().map(|share| share.link));
    let links = search::improve(&mut searched, &mut room, links, &terms);
    for &n in &which {
        if links.out(donors[n].slot) > NEAR_BUSIEST {
            donors[n].scarce = SCARCE;
        }
    }
    for (n, found) in which.into_iter().zip(searched) {
        let edge = |edge: &search::Edge| {
            let Share { rank, slack, .. } = shares[edge.slot];
            Edge { slot: edge.slot, rank, cells: edge.cells as u64, slack, kin: Vec::new() }
        };
        donors[n].edges = found.edges.iter().map(edge).collect();
        if let Some(last) = donors[n].edges.last_mut() {
            last.slack = last.slack.min(shares[donors[n].slot].slack);
        }
    }
}

/// The longest strips of what a slot holds, as many as hold what it gives and some more. The others stay.
fn longest(held: &mut Vec<Strip>, surplus: u64) -> Vec<Strip> {
    held.sort_unstable_by_key(|strip| (Reverse(strip.cells()), strip.place()));
    let mut sum = 0.0;
    let enough = held.iter().position(|strip| {
        sum += strip.cells() as f64;
        sum > ENOUGH * surplus as f64
    });
    let rest = held.split_off(enough.map_or(held.len(), |n| n + 1));
    std::mem::replace(held, rest)
}

/// Cuts a donor's strips to serve its edges, in the best of several ways. It is on the device of `rank`.
pub(crate) fn relieve(sheets: &[Sheet<'_>], cost: &Cost, rank: Option<u32>, donor: &Donor) -> Cut {
    let Donor { strips, edges, scarce, .. } = donor;
    // What a key costs depends on who else sees it, and where heads run out, later slices pay for what the first ones
    // left.
    let many_heads = strips.iter().any(|strip| strip.kv_heads.len() > 1);
    let scarcities = if many_heads { &SCARCITIES[..] } else { &SCARCITIES[..1] };
    let spans = |strip: &Strip| sheets[strip.sheet].document.homes().len() > 1;
    let some_keys = cost.favours_some_keys() || strips.iter().any(spans);
    let ways = SHAPES.iter().flat_map(|&keys| {
        let costs = [Some(*cost), some_keys.then(|| cost.with_some_keys())];
        let costs = costs.into_iter().flatten();
        costs.flat_map(move |cost| {
            scarcities.iter().map(move |&scarcity| cost.shaped(keys).with_scarce_keys(scarcity))
        })
    });
    let cuts = ways.map(|cost| carve(sheets, &cost, rank, strips, edges));
    let grain = edges.iter().map(|edge| edge.slack).min().unwrap_or(0).saturating_mul(4).max(1);
    cuts.min_by_key(|cut| {
        (cut.missing / grain, cut.moved.bytes.saturating_add((cut.moved.sent as f64 * scarce) as u64))
    })
    .unwrap_or_default()
}

/// Slots with room, in order of room.
#[derive(Debug, Default)]
struct Pool {
    /// (room, slot), ascending.
    room: Vec<(u64, usize)>,
}

impl Pool {
    /// Adds a slot, unless its room is not worth a slice.
    fn put(&mut self, slot: usize, room: u64, share: &Share) {
        if room > share.slack.saturating_mul(2) {
            let at = self.room.partition_point(|&entry| entry < (room, slot));
            self.room.insert(at, (room, slot));
        }
    }

    /// Takes out the slots that serve a need: again and again the tightest that covers what is left, else the largest.
    /// Few slots then take large slices, which cost fewer bytes per cell.
    fn deal(&mut self, need: u64, crumb: u64, shares: &[Share]) -> Vec<Edge> {
        let mut edges = Vec::new();
        let mut left = need;
        while left > crumb && !self.room.is_empty() {
            let at = self.room.partition_point(|&(room, _)| room < left).min(self.room.len() - 1);
            let (room, slot) = self.room.remove(at);
            let (share, cells) = (&shares[slot], left.min(room));
            edges.push(Edge { slot, rank: share.rank, cells, slack: share.slack, kin: Vec::new() });
            left -= cells;
            self.put(slot, room - cells, share);
        }
        // The last edge makes up for what the others were rounded, so it must not be coarser than the donor.
        edges.sort_unstable_by_key(|edge| (Reverse(edge.cells), edge.slot));
        if let Some(last) = edges.last_mut() {
            last.slack = last.slack.min(crumb);
        }
        edges
    }
}
