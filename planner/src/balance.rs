//! Balance: who gives how much to whom.

use std::cmp::Reverse;

use crate::cost::Cost;
use crate::cut::{Cut, Edge, carve};
use crate::sheet::{Sheet, Strip};
use crate::start::Share;

/// What one round leaves over, through rounding, the next may move.
const ROUNDS: usize = 4;
/// A busy slot cuts its longest strips, as many as hold this many times what it gives.
const ENOUGH: f64 = 1.3;

/// Moves slices from slots above their cap to slots below, until none is above or nothing helps.
pub(crate) fn balance(sheets: &[Sheet<'_>], cost: &Cost, shares: &[Share], held: &mut [Vec<Strip>]) {
    for _ in 0..ROUNDS {
        let load: Vec<u64> = held.iter().map(|strips| strips.iter().map(Strip::cells).sum()).collect();
        let surplus = |n: usize| load[n].saturating_sub(shares[n].cap);
        let mut donors: Vec<usize> =
            (0..shares.len()).filter(|&n| surplus(n) > shares[n].slack.saturating_mul(2)).collect();
        donors.sort_unstable_by_key(|&n| (Reverse(surplus(n)), n));
        let mut pool = Pool::default();
        for (n, share) in shares.iter().enumerate() {
            pool.put(n, share.cap.saturating_sub(load[n]), share);
        }
        let mut moved = false;
        for donor in donors {
            let edges = pool.deal(surplus(donor), shares[donor].slack, shares);
            let cut = relieve(sheets, cost, &mut held[donor], surplus(donor), &edges);
            for edge in &edges {
                let got =
                    cut.given.iter().filter(|(slot, _)| *slot == edge.slot).map(|(_, s)| s.cells()).sum();
                let room = pool.taken(edge.slot).saturating_sub(got);
                pool.put(edge.slot, room, &shares[edge.slot]);
            }
            moved |= !cut.given.is_empty();
            for (slot, strip) in cut.given {
                held[slot].push(strip);
            }
        }
        if !moved {
            return;
        }
    }
}

/// Cuts what a slot holds to serve its edges; `held` becomes what it keeps.
fn relieve(sheets: &[Sheet<'_>], cost: &Cost, held: &mut Vec<Strip>, surplus: u64, edges: &[Edge]) -> Cut {
    held.sort_unstable_by_key(|strip| (Reverse(strip.cells()), strip.place()));
    let mut sum = 0.0;
    let enough = held.iter().position(|strip| {
        sum += strip.cells() as f64;
        sum > ENOUGH * surplus as f64
    });
    let rest = held.split_off(enough.map_or(held.len(), |n| n + 1));
    let many_heads = held.iter().any(|strip| strip.kv_heads.len() > 1);
    let mut cut = carve(sheets, cost, held, edges, 0.0);
    if many_heads {
        // Where heads run out, later slices pay for what the first ones left.
        let other = carve(sheets, cost, held, edges, 1.0);
        if (other.missing, other.bytes) < (cut.missing, cut.bytes) {
            cut = other;
        }
    }
    *held = rest;
    held.append(&mut cut.kept);
    cut
}

/// Slots with room, in order of room.
#[derive(Debug, Default)]
struct Pool {
    /// (room, slot), ascending.
    room: Vec<(u64, usize)>,
    /// Slots dealt to the current donor, with the room they had.
    out: Vec<(u64, usize)>,
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
        self.out.clear();
        while left > crumb && !self.room.is_empty() {
            let at = self.room.partition_point(|&(room, _)| room < left).min(self.room.len() - 1);
            let (room, slot) = self.room.remove(at);
            let (share, cells) = (&shares[slot], left.min(room));
            edges.push(Edge { slot, rank: share.rank, cells, slack: share.slack });
            left -= cells;
            self.out.push((room, slot));
        }
        // The last edge makes up for what the others were rounded, so it must not be coarser than the donor.
        edges.sort_unstable_by_key(|edge| (Reverse(edge.cells), edge.slot));
        if let Some(last) = edges.last_mut() {
            last.slack = last.slack.min(crumb);
        }
        edges
    }

    /// The room a dealt slot had.
    fn taken(&self, slot: usize) -> u64 {
        self.out.iter().find(|(_, s)| *s == slot).map_or(0, |&(room, _)| room)
    }
}
