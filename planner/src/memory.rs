//! Memory: what slots hold of other homes' tokens, and less work for those that would hold too much.

use outboard_attention::{HomeRange, PlannedTask, StepPlan, TickPlan};

use crate::judge::needs::{Need, needs};
use crate::judge::pieces::{Piece, Shelf};
use crate::plan::Tick;
use crate::sheet::Strip;
use crate::start::Share;
use crate::traffic::{Ports, Shipment};
use crate::{PlanError, Problem};

/// A slot that holds too much is given so many times less work than would just fit, since what it holds does not shrink with
/// its work alone.
const LESS: f64 = 0.9;

/// Adds the bytes that each slot holds for one document's tasks of tokens that are not its own: what comes to it in the
/// forward pass of as many layers as are `kept`, and goes back in one.
fn add(ports: &Ports<'_>, kept: u64, bytes: &mut [u64], homes: &[HomeRange], needs: &[Need]) {
    ports.shipments(homes, needs, |Shipment { slot, fare, tokens, .. }| {
        if let Some(bytes) = bytes.get_mut(slot) {
            let each = fare.forward.there.saturating_mul(kept).saturating_add(fare.forward.back);
            *bytes = bytes.saturating_add(tokens.saturating_mul(each));
        }
    });
}

/// Calls `each` with the homes and needs of every document that is not whole at its home.
pub(crate) fn needs_away(tick: &Tick<'_>, held: &[Vec<Strip>], mut each: impl FnMut(&[HomeRange], &[Need])) {
    // Documents that stay whole at home move nothing, and most do.
    let mut away = vec![false; tick.sheets.len()];
    let strips = || held.iter().enumerate().flat_map(|(n, strips)| strips.iter().map(move |s| (n, *s)));
    for (slot, strip) in strips() {
        away[strip.sheet] |= !is_home(tick, slot, &strip);
    }
    let mut of_sheet: Vec<Vec<(usize, Strip)>> = vec![Vec::new(); tick.sheets.len()];
    for (slot, strip) in strips().filter(|(_, strip)| away[strip.sheet]) {
        of_sheet[strip.sheet].push((slot, strip));
    }
    for (sheet, strips) in tick.sheets.iter().zip(of_sheet).filter(|(_, strips)| !strips.is_empty()) {
        let shelf = Shelf::new(&sheet.document.mask(tick.problem.geometry.kv_heads()));
        let piece = |(slot, strip): &(usize, Strip)| -> Piece {
            shelf.piece(&PlannedTask {
                document: sheet.document.id(),
                q: strip.q,
                kv: strip.kv,
                kv_heads: strip.kv_heads,
                slot: *slot as u32,
                group: 0,
                position: 0,
            })
        };
        let pieces: Vec<Piece> = strips.iter().map(piece).collect();
        each(sheet.document.homes(), &needs(&pieces));
    }
}

fn is_home(tick: &Tick<'_>, slot: usize, strip: &Strip) -> bool {
    let homes = tick.sheets[strip.sheet].document.homes();
    homes.iter().all(|home| Some(home.rank) == tick.problem.slots[slot].rank)
}

/// Who takes less when slots hold more than their memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resort {
    /// They do, by as much as should do.
    Less,
    /// They take nothing of others.
    Nothing,
    /// None with limited memory takes anything of others.
    Nobody,
}

/// What each slot holds, when one holds more than its memory.
pub(crate) fn excess(tick: &Tick<'_>, held: &[Vec<Strip>]) -> Option<Vec<u64>> {
    let slots = &tick.problem.slots;
    if !is_limited(tick.problem) {
        return None;
    }
    let (ports, mut bytes) = (Ports::new(tick.problem), vec![0; slots.len()]);
    needs_away(tick, held, |homes, needs| add(&ports, tick.problem.kept, &mut bytes, homes, needs));
    let fits = bytes.iter().zip(slots).all(|(bytes, slot)| slot.memory.is_none_or(|memory| *bytes <= memory));
    (!fits).then_some(bytes)
}

/// Lowers caps for slots that hold so many bytes, and closes those that are to take nothing. False when nothing changes.
pub(crate) fn lower(
    tick: &Tick<'_>,
    shares: &mut [Share],
    held: &[Vec<Strip>],
    bytes: &[u64],
    resort: Resort,
) -> bool {
    let mut lowered = false;
    for (n, ((share, strips), &bytes)) in shares.iter_mut().zip(held).zip(bytes).enumerate() {
        let Some(memory) = tick.problem.slots[n].memory else { continue };
        if bytes <= memory && resort != Resort::Nobody {
            continue;
        }
        let cells = |own: bool| -> u64 {
            strips.iter().filter(|strip| is_home(tick, n, strip) == own).map(Strip::cells).sum()
        };
        let part = if resort == Resort::Less { memory as f64 / bytes as f64 * LESS } else { 0.0 };
        let cap = cells(true).saturating_add((cells(false) as f64 * part) as u64);
        let closed = resort != Resort::Less;
        lowered |= cap < share.cap || closed && !share.closed;
        share.cap = share.cap.min(cap);
        share.closed |= closed;
    }
    lowered
}

/// What each slot holds in a tick of a plan, beside what it may.
fn held_in<'a>(problem: &'a Problem, tick: &TickPlan) -> impl Iterator<Item = (usize, u64, u64)> + 'a {
    let (ports, mut held) = (Ports::new(problem), vec![0; problem.slots.len()]);
    ports.of_tick(tick, problem, |homes, needs| add(&ports, problem.kept, &mut held, homes, needs));
    let slots = problem.slots.iter().enumerate();
    slots.zip(held).filter_map(|((slot, of), bytes)| Some((slot, bytes, of.memory?)))
}

/// Whether any slot's memory is limited.
fn is_limited(problem: &Problem) -> bool {
    problem.slots.iter().any(|slot| slot.memory.is_some())
}

/// Checks that no slot holds more than its memory.
pub(crate) fn check(problem: &Problem, tick: &TickPlan) -> Result<(), PlanError> {
    if !is_limited(problem) {
        return Ok(());
    }
    match held_in(problem, tick).find(|(_, bytes, memory)| bytes > memory) {
        Some((slot, bytes, memory)) => Err(PlanError::NoMemory { slot, tick: tick.tick, bytes, memory }),
        None => Ok(()),
    }
}

/// The largest part of a slot's memory that a plan holds at once; more than 1 does not fit. Infinite where something is
/// held and nothing may be.
pub(crate) fn largest_part(problem: &Problem, plan: &StepPlan) -> f64 {
    if !is_limited(problem) {
        return 0.0;
    }
    let parts = plan.ticks.iter().flat_map(|tick| held_in(problem, tick));
    let part =
        |(_, bytes, memory): (usize, u64, u64)| if bytes == 0 { 0.0 } else { bytes as f64 / memory as f64 };
    parts.map(part).fold(0.0, f64::max)
}
