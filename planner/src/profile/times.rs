//! Predicted times of a whole plan.

use std::collections::BTreeMap;

use outboard_attention::{Direction, DocumentId, PlannedTask, StepPlan};

use super::{Profile, TaskShape, flops};
use crate::judge::pieces::Shelf;
use crate::plan::Tick;
use crate::sheet::Strip;
use crate::split::split;
use crate::{Problem, Slot};

/// Predicted seconds that slots compute in one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Times {
    /// `forward[n][slot]`, ticks in order of their numbers: the tasks of a slot one after the other, over its weight.
    pub forward: Vec<Vec<f64>>,
    /// The same of the backward pass.
    pub backward: Vec<Vec<f64>>,
    /// What all tasks of both passes take on one device of speed 1.
    pub device_seconds: f64,
    /// What their FLOPs alone would take there at its peak.
    pub peak_seconds: f64,
}

impl Times {
    /// The times that `profile` predicts for `plan`. Tasks of documents or slots that the problem does not have take
    /// none.
    pub fn planned(plan: &StepPlan, problem: &Problem, profile: &Profile) -> Times {
        let Problem { geometry, documents, slots, .. } = problem;
        let shelves: BTreeMap<DocumentId, Shelf> =
            documents.iter().map(|d| (d.id(), Shelf::new(&d.mask(geometry.kv_heads())))).collect();
        let mut times =
            Times { forward: Vec::new(), backward: Vec::new(), device_seconds: 0.0, peak_seconds: 0.0 };
        for tick in &plan.ticks {
            let mut passes = [vec![0.0; slots.len()], vec![0.0; slots.len()]];
            for task in &tick.tasks {
                let (Some(slot), Some(shelf)) = (slots.get(task.slot as usize), shelves.get(&task.document))
                else {
                    continue;
                };
                let shape = shape(task, shelf, geometry.group());
                for (direction, pass) in DIRECTIONS.into_iter().zip(&mut passes) {
                    let seconds = profile.seconds(geometry, direction, shape);
                    times.device_seconds += seconds;
                    times.peak_seconds +=
                        flops(geometry, direction, shape.cells) / profile.peak_flops_per_second();
                    pass[task.slot as usize] += seconds / slot.weight;
                }
            }
            let [forward, backward] = passes;
            times.forward.push(forward);
            times.backward.push(backward);
        }
        times
    }

    /// Seconds of the busiest slot, forward and backward: the maximum of each tick, summed.
    pub fn busiest(&self) -> [f64; 2] {
        [&self.forward, &self.backward].map(|ticks| ticks.iter().map(|tick| most(tick)).sum())
    }

    /// Seconds of each slot, of all ticks and both passes.
    pub fn totals(&self) -> Vec<f64> {
        let mut totals = vec![0.0; self.forward.first().map_or(0, Vec::len)];
        for tick in self.forward.iter().chain(&self.backward) {
            for (total, seconds) in totals.iter_mut().zip(tick) {
                *total += seconds;
            }
        }
        totals
    }

    /// The share of device time that is lost to shapes and overhead: 0 at peak, up to 1.
    pub fn lost(&self) -> f64 {
        if self.device_seconds > 0.0 { 1.0 - self.peak_seconds / self.device_seconds } else { 0.0 }
    }
}

const DIRECTIONS: [Direction; 2] = [Direction::Forward, Direction::Backward];

fn most(seconds: &[f64]) -> f64 {
    seconds.iter().copied().fold(0.0, f64::max)
}

fn shape(task: &PlannedTask, shelf: &Shelf, group: usize) -> TaskShape {
    let rows = task.q.len().saturating_mul(group);
    TaskShape { rows, keys: task.kv.len(), cells: shelf.piece(task).cells() }
}

/// Seconds of the busiest slot, forward and backward, if slots held these strips and computed them in pieces.
pub(crate) fn predicted(tick: &Tick<'_>, profile: &Profile, held: &[Vec<Strip>]) -> [f64; 2] {
    let slots = held.iter().zip(&tick.problem.slots);
    slots.fold([0.0; 2], |longest: [f64; 2], (strips, slot)| {
        let seconds = device_seconds(tick, profile, strips);
        std::array::from_fn(|n| longest[n].max(seconds[n] / slot.weight))
    })
}

/// Cells that each slot computes in a second of both passes, if it held these strips, relative to the fastest; one without any
/// as many as all slots on average, by its weight. `None` where a slot's are beyond what doubles can tell.
pub(crate) fn cells_a_second(tick: &Tick<'_>, profile: &Profile, held: &[Vec<Strip>]) -> Option<Vec<f64>> {
    let of = |strips: &Vec<Strip>| {
        let cells: u64 = strips.iter().map(Strip::cells).sum();
        let [forward, backward] = device_seconds(tick, profile, strips);
        (cells as f64, forward + backward)
    };
    let slots: Vec<(f64, f64)> = held.iter().map(of).collect();
    let all = slots.iter().fold((0.0, 0.0), |all, slot| (all.0 + slot.0, all.1 + slot.1));
    let rate = |(cells, seconds): (f64, f64)| if seconds > 0.0 { cells / seconds } else { 1.0 };
    let of_slot =
        |(slot, &done): (&Slot, &(f64, f64))| slot.weight * rate(if done.1 > 0.0 { done } else { all });
    let rates: Vec<f64> = tick.problem.slots.iter().zip(&slots).map(of_slot).collect();
    let fastest = rates.iter().copied().fold(0.0, f64::max);
    let relative: Vec<f64> = rates.iter().map(|rate| rate / fastest).collect();
    relative.iter().all(|&rate| rate > 0.0 && rate <= 1.0).then_some(relative)
}

/// Seconds of both passes that a device of speed 1 takes for the pieces of these strips.
fn device_seconds(tick: &Tick<'_>, profile: &Profile, strips: &[Strip]) -> [f64; 2] {
    let geometry = &tick.problem.geometry;
    let shape = |piece: &Strip| {
        let rows = piece.q.len().saturating_mul(geometry.group());
        TaskShape { rows, keys: piece.keys(&tick.sheets).len(), cells: piece.cells() }
    };
    let shapes: Vec<TaskShape> = split(&tick.sheets, &mut strips.to_vec()).iter().map(shape).collect();
    DIRECTIONS.map(|direction| shapes.iter().map(|shape| profile.seconds(geometry, direction, *shape)).sum())
}
