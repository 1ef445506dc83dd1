//! Kin: slots that have other rows of the same document have its keys already, and take rows of it for less than others.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::balance::{self, Donor};
use crate::cost::Cost;
use crate::cut::Edge;
use crate::search::Rect;
use crate::sheet::{Sheet, Strip};
use crate::start::Share;

/// At most so many take rows of one slot.
const MEMBERS: usize = 64;

/// Kin is preferred to others if it costs no more than this part of what they do at best.
const WORTH: f64 = 0.9;

/// The sheets of which several slots have rows with all kv heads and all their keys: who has which.
struct Family {
    of_sheet: BTreeMap<usize, Vec<(usize, Strip)>>,
}

/// Moves slices from slots above their cap to slots below that have the keys, where that costs less than to move them to
/// others.
pub(crate) fn relieve(sheets: &[Sheet<'_>], cost: &Cost, shares: &[Share], held: &mut [Vec<Strip>]) {
    let family = Family::of(sheets, held);
    if family.of_sheet.is_empty() {
        return;
    }
    let load: Vec<u64> = held.iter().map(|strips| strips.iter().map(Strip::cells).sum()).collect();
    let mut room: Vec<u64> =
        shares.iter().zip(&load).map(|(share, load)| share.cap.saturating_sub(*load)).collect();
    let surplus = |n: usize| load[n].saturating_sub(shares[n].cap);
    let mut donors: Vec<usize> =
        (0..shares.len()).filter(|&n| surplus(n) > shares[n].slack.saturating_mul(2)).collect();
    donors.sort_unstable_by_key(|&n| (Reverse(surplus(n)), n));
    for slot in donors {
        let edges = edges(sheets, cost, shares, &family, &held[slot], (slot, surplus(slot)), &mut room);
        if edges.is_empty() {
            continue;
        }
        let is_kin = |strip: &Strip| family.of_sheet.contains_key(&strip.sheet);
        let (strips, rest) = std::mem::take(&mut held[slot]).into_iter().partition(is_kin);
        let donor = Donor { slot, surplus: surplus(slot), strips, edges, scarce: 0.0 };
        let cut = balance::relieve(sheets, cost, shares[slot].rank, &donor);
        held[slot] = rest;
        held[slot].extend(cut.kept);
        for taken in cut.given {
            held[taken.slot].push(taken.strip);
        }
    }
}

/// Who of the family takes how much, the cheapest first.
fn edges(
    sheets: &[Sheet<'_>],
    cost: &Cost,
    shares: &[Share],
    family: &Family,
    strips: &[Strip],
    (giver, surplus): (usize, u64),
    room: &mut [u64],
) -> Vec<Edge> {
    let shape = cost.shape();
    let rect =
        |strip: &Strip| Rect::new(strip.kv_heads.len() as f64, strip.q.start() as f64, strip.q.end() as f64);
    let causal: Vec<Rect> = strips.iter().filter(|strip| sheets[strip.sheet].is_causal()).map(rect).collect();
    let hull = Rect::hull(&causal);
    let mut edges: Vec<Edge> = Vec::new();
    let mut sheets_of_giver: Vec<usize> = strips.iter().map(|strip| strip.sheet).collect();
    sheets_of_giver.sort_unstable();
    sheets_of_giver.dedup();
    let mut left = surplus;
    let mut used: Vec<(usize, u64)> = Vec::new();
    while left > shares[giver].slack && edges.len() < MEMBERS {
        let mut best: Option<(f64, usize, usize, u64)> = None;
        for strip in strips {
            let Some(members) = family.of_sheet.get(&strip.sheet) else { continue };
            let gone = used.iter().find(|(sheet, _)| *sheet == strip.sheet).map_or(0, |(_, cells)| *cells);
            let there = strip.cells().saturating_sub(gone);
            for (slot, other) in members.iter().filter(|(slot, _)| *slot != giver) {
                if room[*slot] <= shares[*slot].slack.saturating_mul(2)
                    || edges.iter().any(|e| e.slot == *slot)
                {
                    continue;
                }
                let cells = left.min(room[*slot]).min(there);
                if cells == 0 {
                    continue;
                }
                let bytes = bytes(shape.prices(), strip, other.q.end(), cells);
                if bytes > WORTH * shape.least(&hull, cells as f64) {
                    continue;
                }
                let rate = bytes / cells as f64;
                if best.is_none_or(|(least, ..)| rate < least) {
                    best = Some((rate, *slot, strip.sheet, cells));
                }
            }
        }
        let Some((_, slot, sheet, cells)) = best else { break };
        let of_slot = |sheet: &usize| family.of_sheet.get(sheet).into_iter().flatten();
        let kin = sheets_of_giver
            .iter()
            .flat_map(of_slot)
            .filter(|(other, _)| *other == slot)
            .map(|(_, strip)| *strip);
        let Share { rank, slack, .. } = shares[slot];
        edges.push(Edge { slot, rank, cells, slack, kin: kin.collect() });
        room[slot] -= cells;
        left -= cells;
        match used.iter_mut().find(|(of, _)| *of == sheet) {
            Some((_, gone)) => *gone += cells,
            None => used.push((sheet, cells)),
        }
    }
    edges.sort_by_key(|edge| (Reverse(edge.cells), edge.slot));
    if let Some(last) = edges.last_mut() {
        last.slack = last.slack.min(shares[giver].slack);
    }
    edges
}

/// About what it costs to move so many cells of a strip to a slot that has the first `known` keys: the last rows with what
/// is missing of their keys, or the first ones after those that it has.
fn bytes((row, key): (f64, f64), strip: &Strip, known: usize, cells: u64) -> f64 {
    let heads = strip.kv_heads.len() as f64;
    let (lo, hi, known) = (strip.q.start() as f64, strip.q.end() as f64, known as f64);
    let w = cells as f64 / heads;
    let last = row * w / hi + key * (hi - known).max(0.0);
    let from = lo.max(known);
    let rows = w / from.max(1.0);
    let first = if from < hi { (row + key) * rows + key * (from - known) } else { f64::INFINITY };
    heads * last.min(first)
}

impl Family {
    fn of(sheets: &[Sheet<'_>], held: &[Vec<Strip>]) -> Family {
        let mut first: Vec<Option<usize>> = vec![None; sheets.len()];
        let mut shared = vec![false; sheets.len()];
        for (slot, strip) in
            held.iter().enumerate().flat_map(|(n, strips)| strips.iter().map(move |s| (n, s)))
        {
            match first[strip.sheet] {
                Some(other) => shared[strip.sheet] |= other != slot,
                None => first[strip.sheet] = Some(slot),
            }
        }
        let mut of_sheet: BTreeMap<usize, Vec<(usize, Strip)>> = BTreeMap::new();
        for (slot, strips) in held.iter().enumerate() {
            for strip in strips {
                let sheet = &sheets[strip.sheet];
                let whole = strip.kv_heads == sheet.kv_heads && strip.kv == sheet.all_keys();
                if shared[strip.sheet] && sheet.is_causal() && whole {
                    of_sheet.entry(strip.sheet).or_default().push((slot, *strip));
                }
            }
        }
        Family { of_sheet }
    }
}
