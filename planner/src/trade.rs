//! Balance for bytes: where links are slow, a step ends sooner when its busiest slot computes more and its busiest link
//! carries less.

use std::collections::BTreeMap;

use outboard_attention::{Direction, PlannedTask, Span};

use crate::judge::needs::needs;
use crate::judge::pieces::{Piece, Shelf};
use crate::plan::{Effort, Tick};
use crate::profile::{flops, predicted};
use crate::sheet::Strip;
use crate::traffic::Ports;
use crate::{PassVerdict, Rates};

/// The least tolerance tried: where links are fast, balance is all that counts.
const LEAST: f64 = 1e-3;
/// At first, tolerances are tried that are so far apart, as a factor.
const STRIDE: f64 = 2.0;
/// At most so many of these are tried: with the last, a slot may have 2^18 times its share.
const STRIDES: u32 = 28;
/// After that, both neighbours of the best one are tried so many times, ever closer, with all effort.
const REFINEMENTS: u32 = 3;

/// What slots hold at the tolerance at which a tick's layer time is least, as far as was tried. Layer time falls with the
/// tolerance as long as links take longer than computing, and rises afterwards.
pub(crate) fn hold(tick: &Tick<'_>, rates: Rates) -> Vec<Vec<Strip>> {
    let first = seconds(tick, rates, &tick.hold(LEAST, Effort::Greedy));
    let mut best = (first, LEAST);
    let mut at = LEAST;
    for _ in 0..STRIDES {
        at *= STRIDE;
        // A slot that uses all of it would take longer.
        if computing(tick, rates, 1.0 + at) > best.0 {
            break;
        }
        let seconds = seconds(tick, rates, &tick.hold(at, Effort::Greedy));
        if seconds < best.0 {
            best = (seconds, at);
        }
    }
    let still = tick.hold(LEAST, Effort::Nothing);
    let search = |tolerance: f64| {
        let held = tick.hold(tolerance, Effort::Search);
        (seconds(tick, rates, &held), tolerance, held)
    };
    let mut best = search(best.1);
    let mut step = STRIDE;
    for _ in 0..REFINEMENTS {
        step = step.sqrt();
        // Where computing takes longer than links at the least tolerance, there is nothing to trade.
        if best.0 <= computing(tick, rates, 1.0 + LEAST) {
            break;
        }
        for at in [best.1 / step, best.1 * step] {
            if at > LEAST {
                let other = search(at);
                if other.0 < best.0 {
                    best = other;
                }
            }
        }
    }
    if seconds(tick, rates, &still) < best.0 { still } else { best.2 }
}

/// Seconds of computing, forward and backward, of a slot with so many times the mean work; with a profile, at least so
/// many.
fn computing(tick: &Tick<'_>, rates: Rates, over_mean: f64) -> f64 {
    let weights: f64 = tick.problem.slots.iter().map(|slot| slot.weight).sum();
    let geometry = &tick.problem.geometry;
    if let Some(profile) = &tick.problem.profile {
        let pass = |direction| {
            flops(geometry, direction, tick.cells) / profile.highest_flops_per_second(geometry, direction)
        };
        return (pass(Direction::Forward) + pass(Direction::Backward)) / weights * over_mean;
    }
    let flops = geometry.forward_flops(1) + geometry.backward_flops(1);
    flops * tick.cells as f64 / weights * over_mean / rates.flops_per_second
}

/// Layer time of what slots hold, forward and backward, in seconds.
fn seconds(tick: &Tick<'_>, rates: Rates, held: &[Vec<Strip>]) -> f64 {
    let work = |strips: &Vec<Strip>| strips.iter().map(Strip::cells).sum::<u64>() as f64;
    let slots = held.iter().zip(&tick.problem.slots);
    let busiest = slots.map(|(strips, slot)| work(strips) / slot.weight).fold(0.0, f64::max);
    let [forward, backward] = busiest_links(tick, held);
    let predicted = tick.problem.profile.as_ref().map(|profile| predicted(tick, profile, held));
    let pass = |bytes: u64, flops_a_cell: f64, n: usize| {
        let flops = busiest * flops_a_cell;
        let predicted = predicted.map(|passes| passes[n]);
        PassVerdict { bytes: 0, busiest: bytes, flops, predicted }.seconds(rates)
    };
    let geometry = &tick.problem.geometry;
    pass(forward, geometry.forward_flops(1), 0) + pass(backward, geometry.backward_flops(1), 1)
}

/// Bytes of the busiest link, forward and backward.
fn busiest_links(tick: &Tick<'_>, held: &[Vec<Strip>]) -> [u64; 2] {
    let ports = Ports::new(tick.problem);
    let at_home = |slot: usize, strip: &Strip| {
        let homes = tick.sheets[strip.sheet].document.homes();
        homes.iter().all(|home| Some(home.rank) == tick.problem.slots[slot].rank)
    };
    // Documents that stay whole at home move nothing, and most do.
    let mut moved: BTreeMap<usize, Vec<(usize, Strip)>> = BTreeMap::new();
    let strips = || held.iter().enumerate().flat_map(|(n, strips)| strips.iter().map(move |s| (n, *s)));
    for (slot, strip) in strips() {
        if !at_home(slot, &strip) {
            moved.entry(strip.sheet).or_default();
        }
    }
    for (slot, strip) in strips() {
        if let Some(all) = moved.get_mut(&strip.sheet) {
            all.push((slot, strip));
        }
    }
    let mut traffic = ports.idle();
    for (sheet, strips) in moved {
        let sheet = &tick.sheets[sheet];
        let shelf = Shelf::new(&sheet.document.mask(tick.problem.geometry.kv_heads()));
        let piece = |(slot, strip): &(usize, Strip)| -> Piece {
            shelf.piece(&PlannedTask {
                document: sheet.document.id(),
                q: strip.q,
                kv: Span::to(sheet.document.tokens()),
                kv_heads: strip.kv_heads,
                slot: *slot as u32,
                group: 0,
                position: 0,
            })
        };
        let pieces: Vec<Piece> = strips.iter().map(piece).collect();
        traffic.add(&ports, sheet.document.homes(), &needs(&pieces));
    }
    [&traffic.forward, &traffic.backward]
        .map(|pass| pass.bytes_in.iter().chain(&pass.bytes_out).max().copied().unwrap_or(0))
}
