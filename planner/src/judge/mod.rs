//! What a plan is worth, by rules that hold for any planner.
//!
//! A plan is judged from its tasks and the step's documents alone: nothing here knows how it was made. [`judge()`] first
//! makes sure that every cell is computed exactly once, then counts cells, tiles and bytes. With several ticks, maxima
//! are taken per tick and summed, since a tick ends when its slowest slot does.

mod check;
mod fault;
pub(crate) mod needs;
pub(crate) mod pieces;
pub(crate) mod price;
mod tiles;

use outboard_attention::{Document, HeadGeometry, StepPlan};

use crate::traffic::{Pass, Ports, Traffic};
use crate::{Loads, Problem, Times, memory};

pub use fault::Fault;
pub use tiles::TILE;

use check::{Numbered, by_document, pieces_of};
use needs::needs;
use tiles::tiles;

/// The figures of a valid plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// Cells over weight of the busiest slot, over all cells over all weight: 1 is perfect balance. 1 for a step without
    /// cells.
    pub max_over_mean: f64,
    /// The same of the tick that is worst by itself.
    pub worst_tick: f64,
    /// Tiles of 128 x 128 over weight of the slot with most, over those of the *uncut* documents over all weight: it
    /// also charges what cutting wastes. 1 for a step without cells.
    pub tiles_over_ideal: f64,
    /// The largest part of a slot's cells, of all ticks, that is one task: 0 to 1.
    pub largest_piece: f64,
    /// The largest part of a slot's memory that it holds at once: more than 1 does not fit. 0 where none has a limit.
    pub memory: f64,
    /// The forward pass of one layer.
    pub forward: PassVerdict,
    /// The backward pass of one layer, on servers that still hold Q, K and V.
    pub backward: PassVerdict,
    /// How many tasks the plan has.
    pub tasks: usize,
    /// How many documents the step has.
    pub documents: usize,
    /// How many slots the step has.
    pub slots: usize,
}

impl Verdict {
    /// Layer time in seconds, forward and backward.
    pub fn seconds(&self, rates: Rates) -> f64 {
        self.forward.seconds(rates) + self.backward.seconds(rates)
    }
}

/// One pass of one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PassVerdict {
    /// Bytes to slots and back.
    pub bytes: u64,
    /// Bytes in or out, whichever are more, of the slot with most.
    pub busiest: u64,
    /// The same over [`Slot::link`](crate::Slot::link): bytes of a link of 1 that takes as long.
    pub longest: f64,
    /// FLOPs over weight of the busiest slot.
    pub flops: f64,
    /// Seconds of computing on the busiest slot, where the problem's profile predicts them.
    pub predicted: Option<f64>,
}

/// How fast slots compute and links carry.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// FLOPs a second of a slot of weight 1.
    pub flops_per_second: f64,
    /// Bytes a second of a link of 1, each way.
    pub bytes_per_second: f64,
}

impl Default for Rates {
    /// 4e14 FLOP/s and 5e10 bytes/s.
    fn default() -> Rates {
        Rates { flops_per_second: 4e14, bytes_per_second: 5e10 }
    }
}

impl PassVerdict {
    /// Seconds of computing on the busiest slot: as predicted, or else its FLOPs at the rate.
    pub fn compute_seconds(&self, rates: Rates) -> f64 {
        self.predicted.unwrap_or(self.flops / rates.flops_per_second)
    }

    /// Seconds that the busiest link is in use.
    pub fn link_seconds(&self, rates: Rates) -> f64 {
        self.longest / rates.bytes_per_second
    }

    /// Layer time in seconds: computing and carrying at once, so the longer of both.
    pub fn seconds(&self, rates: Rates) -> f64 {
        self.compute_seconds(rates).max(self.link_seconds(rates))
    }
}

/// Judges `plan` as an answer to `problem`.
///
/// # Errors
/// The first [`Fault`] found, when the problem makes no sense or the plan does not compute every cell of every document
/// exactly once.
pub fn judge(plan: &StepPlan, problem: &Problem) -> Result<Verdict, Fault> {
    problem.check()?;
    let geometry = &problem.geometry;
    let mut documents: Vec<&Document> = problem.documents.iter().collect();
    documents.sort_unstable_by_key(|document| (document.tick(), document.id()));
    let tasks = by_document(plan, &documents, problem.slots.len())?;
    let ports = Ports::new(problem);
    let mut traffic = ports.idle();
    let mut count = Count::new(problem.slots.len());
    let mut at_hand = documents.iter().zip(tasks).peekable();
    while let Some(&(first, _)) = at_hand.peek() {
        let tick = first.tick();
        count.begin_tick();
        let mut moved = ports.idle();
        while let Some((document, tasks)) = at_hand.next_if(|(document, _)| document.tick() == tick) {
            count.add(document, &tasks, geometry, &ports, &mut moved)?;
        }
        traffic.append(&ports, &moved);
    }
    let mut verdict = count.verdict(problem, plan.tasks().count(), &traffic);
    verdict.memory = memory::largest_part(problem, plan);
    if let Some(profile) = &problem.profile {
        let [forward, backward] = Times::planned(plan, problem, profile).busiest().map(Some);
        (verdict.forward.predicted, verdict.backward.predicted) = (forward, backward);
    }
    Ok(verdict)
}

/// What is counted on the way.
struct Count {
    slots: usize,
    cells: Loads,
    tiles: Loads,
    /// Tiles of the uncut documents.
    uncut_tiles: u64,
    /// Cells of each slot's largest task.
    largest: Vec<u64>,
}

impl Count {
    fn new(slots: usize) -> Count {
        let (cells, tiles) = (Loads::default(), Loads::default());
        Count { slots, cells, tiles, uncut_tiles: 0, largest: vec![0; slots] }
    }

    fn begin_tick(&mut self) {
        self.cells.ticks.push(vec![0; self.slots]);
        self.tiles.ticks.push(vec![0; self.slots]);
    }

    /// Counts a document in the tick begun last. Sums cannot overflow: the problem's cells were counted before, and no
    /// tile is without one.
    fn add(
        &mut self,
        document: &Document,
        tasks: &[Numbered<'_>],
        geometry: &HeadGeometry,
        ports: &Ports<'_>,
        moved: &mut Traffic,
    ) -> Result<(), Fault> {
        let mask = document.mask(geometry.kv_heads());
        let pieces = pieces_of(document, &mask, tasks, geometry)?;
        self.uncut_tiles += tiles(mask.parts(), TILE);
        for piece in &pieces {
            let work = piece.cells();
            if let Some(load) = self.cells.ticks.last_mut().and_then(|tick| tick.get_mut(piece.slot)) {
                *load += work;
            }
            if let Some(load) = self.tiles.ticks.last_mut().and_then(|tick| tick.get_mut(piece.slot)) {
                *load += tiles(&piece.parts, TILE);
            }
            if let Some(largest) = self.largest.get_mut(piece.slot) {
                *largest = work.max(*largest);
            }
        }
        moved.add(ports, document.homes(), &needs(&pieces));
        Ok(())
    }

    fn verdict(&self, problem: &Problem, tasks: usize, traffic: &Traffic) -> Verdict {
        let weight = |slot: usize| problem.slots.get(slot).map_or(1.0, |slot| slot.weight);
        let weights: f64 = problem.slots.iter().map(|slot| slot.weight).sum();
        let worst = |loads: &Loads| loads.worst_by(weight);
        let worst_tick = self.cells.ticks.iter().map(|tick| {
            let tick = Loads { ticks: vec![tick.clone()] };
            tick.max_over_mean_by(weight)
        });
        let pieces = self.largest.iter().zip(self.cells.totals());
        let pass = |pass: &Pass, flops_per_cell: f64| PassVerdict {
            bytes: pass.total,
            busiest: pass.busiest,
            longest: pass.longest,
            flops: worst(&self.cells) * flops_per_cell,
            predicted: None,
        };
        let Traffic { forward, backward } = traffic;
        Verdict {
            max_over_mean: self.cells.max_over_mean_by(weight),
            worst_tick: worst_tick.reduce(f64::max).unwrap_or(1.0),
            tiles_over_ideal: match self.uncut_tiles {
                0 => 1.0,
                uncut => worst(&self.tiles) * weights / uncut as f64,
            },
            memory: 0.0,
            largest_piece: pieces.map(|(&piece, all)| piece as f64 / all.max(1) as f64).fold(0.0, f64::max),
            forward: pass(forward, problem.geometry.forward_flops(1)),
            backward: pass(backward, problem.geometry.backward_flops(1)),
            tasks,
            documents: problem.documents.len(),
            slots: problem.slots.len(),
        }
    }
}
