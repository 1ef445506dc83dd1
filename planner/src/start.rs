//! Where work lies before anything moves.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use outboard_attention::Span;

use crate::Slot;
use crate::sheet::{Sheet, Strip};

/// A slot's part of a tick's work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Share {
    /// The rank whose tokens it has.
    pub(crate) rank: Option<u32>,
    /// The most cells it should be given.
    pub(crate) cap: u64,
    /// Cells that may be misplaced.
    pub(crate) slack: u64,
    /// How much its link carries, relative to the others.
    pub(crate) link: f64,
    /// It takes nothing of ranks without a slot, unless all are closed.
    pub(crate) closed: bool,
}

/// Of the tolerance, this much is planned for; the rest absorbs rounding.
const USED_TOLERANCE: f64 = 0.86;
/// Of the tolerance, this much may be lost in rounding at one slot.
const SLACK: f64 = 0.07;
/// The least of a slot's share that is worth moving, whatever the tolerance.
const LEAST_SLACK: f64 = 1e-4;
/// Documents below this part of a mean share are spread by their tokens rather than their work.
const SMALL: f64 = 0.02;

/// Every slot's share of `cells` cells, by its part of the `weights`.
pub(crate) fn shares(slots: &[Slot], weights: &[f64], tolerance: f64, cells: u64) -> Vec<Share> {
    let total: f64 = weights.iter().sum();
    let share = |(slot, weight): (&Slot, &f64)| {
        let fair = cells as f64 * (weight / total);
        let slack = fair * (SLACK * tolerance).max(LEAST_SLACK);
        // A step of fewer cells than slots must have room for them.
        let cap = (fair * (1.0 + USED_TOLERANCE * tolerance)).floor().max(fair.ceil());
        Share { rank: slot.rank, cap: cap as u64, slack: slack as u64, link: slot.link, closed: false }
    };
    slots.iter().zip(weights).map(share).collect()
}

/// What every slot holds at first: the rows its rank is home of, and documents of ranks without a slot where there is
/// room.
pub(crate) fn start(sheets: &[Sheet<'_>], shares: &[Share]) -> Vec<Vec<Strip>> {
    let slot_of: BTreeMap<u32, usize> =
        shares.iter().enumerate().filter_map(|(n, share)| Some((share.rank?, n))).collect();
    let mut held = vec![Vec::new(); shares.len()];
    let mut homeless = Vec::new();
    for (n, sheet) in sheets.iter().enumerate() {
        for home in sheet.document.homes() {
            if let Some(strip) = Strip::new(sheets, n, sheet.kv_heads, home.tokens) {
                let at = slot_of.get(&home.rank).and_then(|&slot| held.get_mut(slot));
                at.unwrap_or(&mut homeless).push(strip);
            }
        }
    }
    place(homeless, shares, &mut held);
    held
}

/// Gives each homeless strip to the slot with the most room, largest first, and parts it between kv heads where it does
/// not fit: that duplicates nothing. Small ones go where the fewest tokens have gone.
fn place(mut homeless: Vec<Strip>, shares: &[Share], held: &mut [Vec<Strip>]) {
    homeless.sort_unstable_by_key(|strip| (Reverse(strip.cells()), strip.place()));
    let mut room: Vec<i128> = shares.iter().map(|share| i128::from(share.cap)).collect();
    for (room, strips) in room.iter_mut().zip(held.iter()) {
        *room -= strips.iter().map(|s| i128::from(s.cells())).sum::<i128>();
    }
    let open: Vec<usize> = (0..shares.len()).filter(|&n| !shares[n].closed).collect();
    let open = if open.is_empty() { (0..shares.len()).collect() } else { open };
    let mut tokens = vec![0usize; shares.len()];
    let mean = shares.iter().map(|share| share.cap as f64).sum::<f64>() / shares.len() as f64;
    for mut strip in homeless {
        while !strip.kv_heads.is_empty() {
            let cells = i128::from(strip.cells());
            let fits = |n: &usize| (strip.cells() as f64) < SMALL * mean && room[*n] >= cells;
            let load = |n: &usize| tokens[*n] as f64 / shares[*n].cap as f64;
            let light = open.iter().copied().filter(fits).min_by(|a, b| load(a).total_cmp(&load(b)));
            let Some(n) = light.or_else(|| open.iter().copied().max_by_key(|&n| (room[n], Reverse(n))))
            else {
                return;
            };
            let heads = strip.kv_heads.len();
            let fit = (room[n] / i128::from(strip.unit)).clamp(1, heads as i128) as usize;
            let part = Strip { kv_heads: Span::at(strip.kv_heads.start(), fit), ..strip };
            room[n] -= i128::from(part.cells());
            tokens[n] = tokens[n].saturating_add(part.q.len().saturating_mul(fit));
            held[n].push(part);
            strip.kv_heads = Span::at(part.kv_heads.end(), heads - fit);
        }
    }
}
