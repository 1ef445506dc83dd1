//! Bytes that a plan moves.

use std::collections::BTreeMap;

use outboard_attention::{DocumentId, HomeRange, PlannedTask, Span, StepPlan};

use crate::judge::needs::{Need, by_heads, fetches, needs};
use crate::judge::pieces::{Piece, Shelf};
use crate::judge::price::{Fare, Price};
use crate::{Problem, Slot};

/// Bytes that a plan moves in one layer, apart from any framing.
///
/// Each slot gets the tokens that its tasks need and its rank is not home of: Q, K and V forward, dO, LSE and D
/// backward (Q, K and V are still there), and sends back O and LSE, and dQ, dK and dV. Tokens that several tasks of a
/// slot need count once; what several slots compute a part of travels back in f32.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Traffic {
    /// The forward pass.
    pub forward: Pass,
    /// The backward pass.
    pub backward: Pass,
}

/// Bytes of one pass of one layer.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Pass {
    /// To slots and back.
    pub total: u64,
    /// Into each slot's device, over all ticks.
    pub bytes_in: Vec<u64>,
    /// Out of each slot's device, over all ticks.
    pub bytes_out: Vec<u64>,
    /// The most that any slot's device sends or receives, the maximum of each tick summed.
    pub busiest: u64,
}

impl Traffic {
    /// Bytes that `plan` moves. Tasks of documents or slots that the problem does not have move nothing.
    pub fn of(plan: &StepPlan, problem: &Problem) -> Traffic {
        let documents: BTreeMap<DocumentId, _> = problem.documents.iter().map(|d| (d.id(), d)).collect();
        let ports = Ports::new(problem);
        let mut traffic = ports.idle();
        for tick in &plan.ticks {
            let mut by_document: BTreeMap<DocumentId, Vec<&PlannedTask>> = BTreeMap::new();
            for task in tick.tasks.iter().filter(|task| ports.has(task.slot)) {
                by_document.entry(task.document).or_default().push(task);
            }
            let mut moved = ports.idle();
            for (id, tasks) in by_document {
                let Some(document) = documents.get(&id) else { continue };
                let shelf = Shelf::new(&document.mask(problem.geometry.kv_heads()));
                let pieces: Vec<Piece> = tasks.iter().map(|task| shelf.piece(task)).collect();
                moved.add(&ports, document.homes(), &needs(&pieces));
            }
            traffic.append(&moved);
        }
        traffic
    }

    /// Adds what one document's tasks need.
    pub(crate) fn add(&mut self, ports: &Ports<'_>, homes: &[HomeRange], needs: &[Need]) {
        for (heads, needs) in by_heads(needs) {
            let rows: Vec<(usize, Span)> = needs.iter().map(|need| (need.slot, need.rows)).collect();
            let keys: Vec<(usize, Span)> = needs.iter().map(|need| (need.slot, need.keys)).collect();
            for (spans, [whole, partial]) in [(rows, ports.row), (keys, ports.key)] {
                for fetch in fetches(spans, homes) {
                    if ports.rank(fetch.slot) == Some(fetch.rank) {
                        continue;
                    }
                    let home = ports.of_rank.get(&fetch.rank).copied();
                    for (fare, tokens) in [(whole, fetch.alone), (partial, fetch.shared)] {
                        self.forward.ship(fetch.slot, home, fare.forward, tokens.saturating_mul(heads));
                        self.backward.ship(fetch.slot, home, fare.backward, tokens.saturating_mul(heads));
                    }
                }
            }
        }
    }

    /// Adds a tick.
    pub(crate) fn append(&mut self, tick: &Traffic) {
        self.forward.append(&tick.forward);
        self.backward.append(&tick.backward);
    }
}

impl Pass {
    /// `tokens` tokens of one kv head to a slot and back, from the slot on their home rank, if there is one.
    fn ship(&mut self, slot: usize, home: Option<usize>, price: Price, tokens: u64) {
        let (there, back) = (price.there.saturating_mul(tokens), price.back.saturating_mul(tokens));
        let add = |to: Option<&mut u64>, bytes: u64| {
            if let Some(to) = to {
                *to = to.saturating_add(bytes);
            }
        };
        self.total = self.total.saturating_add(there).saturating_add(back);
        add(self.bytes_in.get_mut(slot), there);
        add(self.bytes_out.get_mut(slot), back);
        if let Some(home) = home {
            add(self.bytes_out.get_mut(home), there);
            add(self.bytes_in.get_mut(home), back);
        }
    }

    /// Adds a tick.
    fn append(&mut self, tick: &Pass) {
        self.total = self.total.saturating_add(tick.total);
        let busiest = tick.bytes_in.iter().chain(&tick.bytes_out).max().copied();
        self.busiest = self.busiest.saturating_add(busiest.unwrap_or(0));
        for (sum, more) in [(&mut self.bytes_in, &tick.bytes_in), (&mut self.bytes_out, &tick.bytes_out)] {
            for (sum, more) in sum.iter_mut().zip(more) {
                *sum = sum.saturating_add(*more);
            }
        }
    }
}

/// Whose device a slot is on, and what tokens cost on the way to it: alone, and where others compute parts too.
pub(crate) struct Ports<'a> {
    slots: &'a [Slot],
    of_rank: BTreeMap<u32, usize>,
    row: [Fare; 2],
    key: [Fare; 2],
}

impl<'a> Ports<'a> {
    pub(crate) fn new(problem: &'a Problem) -> Ports<'a> {
        let Problem { slots, geometry, .. } = problem;
        let of_rank = slots.iter().enumerate().filter_map(|(n, slot)| Some((slot.rank?, n))).collect();
        let row = [false, true].map(|partial| Fare::of_row(geometry, partial));
        let key = [false, true].map(|partial| Fare::of_key(geometry, partial));
        Ports { slots, of_rank, row, key }
    }

    fn has(&self, slot: u32) -> bool {
        (slot as usize) < self.slots.len()
    }

    fn rank(&self, slot: usize) -> Option<u32> {
        self.slots.get(slot).and_then(|slot| slot.rank)
    }

    /// Nothing moved yet.
    pub(crate) fn idle(&self) -> Traffic {
        let zero = vec![0; self.slots.len()];
        let pass = Pass { total: 0, bytes_in: zero.clone(), bytes_out: zero, busiest: 0 };
        Traffic { forward: pass.clone(), backward: pass }
    }
}
