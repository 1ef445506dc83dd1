//! Balance for bytes: where links are slow, a step ends sooner when its busiest slot computes more and its busiest link
//! carries less.

use outboard_attention::Direction;

use crate::memory::{self, needs_away};
use crate::plan::{Effort, Tick};
use crate::policy::distca;
use crate::profile::{flops, predicted};
use crate::sheet::Strip;
use crate::traffic::{Ports, Traffic};
use crate::{DISTCA_TOLERANCE, PassVerdict, Rates, Slot};

/// The least tolerance tried: where links are fast, balance is all that counts.
const LEAST: f64 = 1e-3;
/// At first, tolerances are tried that are so far apart, as a factor.
const STRIDE: f64 = 2.0;
/// At most so many of these are tried: with the last, a slot may have 2^18 times its share.
const STRIDES: u32 = 28;
/// After that, both neighbours of the best one are tried so many times, ever closer, with all effort.
const REFINEMENTS: u32 = 3;

/// Where links differ, parts of what a link of 1 carries in the time of the best plan so far: slots are given work by their
/// links then, and not by their weights alone.
const REACHES: [f64; 6] = [2.0, 1.0, 0.5, 0.25, 0.125, 0.0625];

/// Tolerances at which DistCA's planner is tried: its own default, half of that, and none.
const DISTCA_TOLERANCES: [f64; 3] = [0.0, 0.05, DISTCA_TOLERANCE];
/// It takes moves times documents, and is left alone where it would price more items than this: more than it does for 512
/// servers.
const DISTCA_ITEMS: u64 = 1 << 25;

/// What slots hold.
type Held = Vec<Vec<Strip>>;

/// What slots hold where a tick's layer time is least, as far as was tried.
pub(crate) fn hold(tick: &Tick<'_>, rates: Rates) -> Held {
    let still = tick.hold(LEAST, f64::INFINITY, Effort::Nothing);
    let mut best = at_best_tolerance(tick, rates, f64::INFINITY);
    let slots = &tick.problem.slots;
    let differ = slots.iter().any(|slot| slot.link != slots[0].link);
    let least = computing(tick, rates, 1.0);
    if differ && best.0 > least * (1.0 + LEAST) {
        let usual = reach(tick, rates, &still, &best);
        for part in REACHES {
            let other = at_best_tolerance(tick, rates, part * usual);
            if other.0 < best.0 {
                best = other;
            }
        }
    }
    let mut others = vec![still];
    if best.0 > least {
        others.extend(DISTCA_TOLERANCES.iter().filter_map(|&tolerance| distca(tick, tolerance)));
    }
    if best.0.is_infinite() {
        others.push(tick.hold(tick.problem.tolerance, f64::INFINITY, Effort::Search));
    }
    let others = others.into_iter().map(|held| (seconds(tick, rates, &held), held));
    others.fold(best, |best, other| if other.0 < best.0 { other } else { best }).1
}

/// What slots hold by DistCA's greedy, so that nothing takes longer than it would there.
fn distca(tick: &Tick<'_>, tolerance: f64) -> Option<Held> {
    distca::place(&tick.sheets, &tick.problem.slots, &tick.problem.geometry, tolerance, DISTCA_ITEMS)
}

/// Cells that a link of 1 carries in the time that `best` takes, if they cost it what cells cost there on average. Each pass
/// has half of the time, and each way half of the bytes.
fn reach(tick: &Tick<'_>, rates: Rates, still: &Held, (seconds, held): &(f64, Held)) -> f64 {
    let cells = |strips: &Vec<Strip>| strips.iter().map(Strip::cells).sum::<u64>();
    let moved: u64 =
        still.iter().zip(held).map(|(before, now)| cells(before).saturating_sub(cells(now))).sum();
    let (_, traffic) = traffic(tick, held);
    let bytes = traffic.forward.total as f64 + traffic.backward.total as f64;
    seconds * rates.bytes_per_second * moved as f64 / bytes.max(1.0)
}

/// The least layer time of a tick at any tolerance, as far as was tried, and what slots hold then. It falls with the
/// tolerance as long as links take longer than computing, and rises afterwards.
fn at_best_tolerance(tick: &Tick<'_>, rates: Rates, reach: f64) -> (f64, Held) {
    let greedy = |tolerance: f64| seconds(tick, rates, &tick.hold(tolerance, reach, Effort::Greedy));
    let mut best = (greedy(LEAST), LEAST);
    let mut at = LEAST;
    for _ in 0..STRIDES {
        at *= STRIDE;
        // A slot that uses all of it would take longer.
        if computing(tick, rates, 1.0 + at) > best.0 {
            break;
        }
        let seconds = greedy(at);
        if seconds < best.0 {
            best = (seconds, at);
        }
    }
    let search = |tolerance: f64| {
        let held = tick.hold(tolerance, reach, Effort::Search);
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
    (best.0, best.2)
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

/// Layer time of what slots hold, forward and backward, in seconds; infinite where it does not fit their memory.
pub(crate) fn seconds(tick: &Tick<'_>, rates: Rates, held: &[Vec<Strip>]) -> f64 {
    if memory::excess(tick, held).is_some() {
        return f64::INFINITY;
    }
    let work = |strips: &Vec<Strip>| strips.iter().map(Strip::cells).sum::<u64>() as f64;
    let slots = held.iter().zip(&tick.besides).zip(&tick.problem.slots);
    let over_weight = |((strips, besides), slot): ((&Vec<Strip>, &u64), &Slot)| {
        (work(strips) + *besides as f64) / slot.weight
    };
    let busiest = slots.map(over_weight).fold(0.0, f64::max);
    let (ports, traffic) = traffic(tick, held);
    let [forward, backward] = [&traffic.forward, &traffic.backward].map(|pass| pass.longest_of(&ports));
    let predicted = tick.problem.profile.as_ref().map(|profile| predicted(tick, profile, held));
    let pass = |longest: f64, flops_a_cell: f64, n: usize| {
        let flops = busiest * flops_a_cell;
        let predicted = predicted.map(|passes| passes[n]);
        PassVerdict { bytes: 0, busiest: 0, longest, flops, predicted }.seconds(rates)
    };
    let geometry = &tick.problem.geometry;
    pass(forward, geometry.forward_flops(1), 0) + pass(backward, geometry.backward_flops(1), 1)
}

/// Bytes that what slots hold moves, and how they reach the slots.
pub(crate) fn traffic<'a>(tick: &Tick<'a>, held: &[Vec<Strip>]) -> (Ports<'a>, Traffic) {
    let ports = Ports::new(tick.problem);
    let mut traffic = ports.idle();
    needs_away(tick, held, |homes, needs| traffic.add(&ports, homes, needs));
    (ports, traffic)
}
