//! Bytes that a plan moves.

use std::collections::BTreeMap;

use outboard_attention::{DocumentId, HomeRange, PlannedTask, Span, StepPlan, TickPlan};

use crate::judge::needs::{Fetch, Need, by_heads, fetches, needs};
use crate::judge::pieces::{Piece, Shelf};
use crate::judge::price::{Fare, Price};
use crate::{Problem, Slot};

/// Bytes that a plan moves in one layer, apart from any framing.
///
/// Each slot gets the tokens that its tasks need and its rank is not home of: Q, K and V forward, dO, LSE and D
/// backward (Q, K and V are still there), and sends back O and LSE, and dQ, dK and dV. Tokens that several tasks of a
/// slot need count once; what several slots compute a part of travels back in f32.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Traffic {
    /// The forward pass.
    pub forward: Pass,
    /// The backward pass.
    pub backward: Pass,
}

/// Bytes of one pass of one layer.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Pass {
    /// To slots and back.
    pub total: u64,
    /// Into each slot's device, over all ticks.
    pub bytes_in: Vec<u64>,
    /// Out of each slot's device, over all ticks.
    pub bytes_out: Vec<u64>,
    /// The most that any slot's device sends or receives, the maximum of each tick summed.
    pub busiest: u64,
    /// The same over the slot's [`Slot::link`]: bytes of a link of 1 that takes as long.
    pub longest: f64,
}

impl Traffic {
    /// Bytes that `plan` moves. Tasks of documents or slots that the problem does not have move nothing.
    pub fn of(plan: &StepPlan, problem: &Problem) -> Traffic {
        let ports = Ports::new(problem);
        let mut traffic = ports.idle();
        for tick in &plan.ticks {
            let mut moved = ports.idle();
            ports.of_tick(tick, problem, |homes, needs| moved.add(&ports, homes, needs));
            traffic.append(&ports, &moved);
        }
        traffic
    }

    /// Adds what one document's tasks need.
    pub(crate) fn add(&mut self, ports: &Ports<'_>, homes: &[HomeRange], needs: &[Need]) {
        ports.shipments(homes, needs, |Shipment { slot, rank, fare, tokens }| {
            let home = ports.of_rank.get(&rank).copied();
            self.forward.ship(slot, home, fare.forward, tokens);
            self.backward.ship(slot, home, fare.backward, tokens);
        });
    }

    /// Adds a tick.
    pub(crate) fn append(&mut self, ports: &Ports<'_>, tick: &Traffic) {
        self.forward.append(ports, &tick.forward);
        self.backward.append(ports, &tick.backward);
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

    /// Bytes over link of the link that is in use longest.
    pub(crate) fn longest_of(&self, ports: &Ports<'_>) -> f64 {
        let over_link = |(n, bytes): (usize, &u64)| *bytes as f64 / ports.link(n);
        let [into, out] =
            [&self.bytes_in, &self.bytes_out].map(|bytes| bytes.iter().enumerate().map(over_link));
        into.chain(out).fold(0.0, f64::max)
    }

    /// Adds a tick.
    fn append(&mut self, ports: &Ports<'_>, tick: &Pass) {
        self.longest += tick.longest_of(ports);
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

/// Tokens of one kv head that go from their home to a slot and back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shipment {
    pub(crate) slot: usize,
    /// Their home.
    pub(crate) rank: u32,
    /// What one of them costs.
    pub(crate) fare: Fare,
    pub(crate) tokens: u64,
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

    /// What each document's tasks of a tick need, with the document's homes. Tasks of documents or slots that the problem
    /// does not have need nothing.
    pub(crate) fn of_tick(
        &self,
        tick: &TickPlan,
        problem: &Problem,
        mut each: impl FnMut(&[HomeRange], &[Need]),
    ) {
        let mut by_document: BTreeMap<DocumentId, Vec<&PlannedTask>> = BTreeMap::new();
        for task in tick.tasks.iter().filter(|task| self.has(task.slot)) {
            by_document.entry(task.document).or_default().push(task);
        }
        for document in &problem.documents {
            let Some(tasks) = by_document.get(&document.id()) else { continue };
            let shelf = Shelf::new(&document.mask(problem.geometry.kv_heads()));
            let pieces: Vec<Piece> = tasks.iter().map(|task| shelf.piece(task)).collect();
            each(document.homes(), &needs(&pieces));
        }
    }

    /// What crosses links for the needs of one document's tasks. A slot on the tokens' home gets nothing.
    pub(crate) fn shipments(&self, homes: &[HomeRange], needs: &[Need], mut each: impl FnMut(Shipment)) {
        for (heads, needs) in by_heads(needs) {
            let rows: Vec<(usize, Span)> = needs.iter().map(|need| (need.slot, need.rows)).collect();
            let keys: Vec<(usize, Span)> = needs.iter().map(|need| (need.slot, need.keys)).collect();
            for (spans, [whole, partial]) in [(rows, self.row), (keys, self.key)] {
                for Fetch { slot, rank, alone, shared } in fetches(spans, homes) {
                    if self.rank(slot) == Some(rank) {
                        continue;
                    }
                    for (fare, tokens) in [(whole, alone), (partial, shared)] {
                        each(Shipment { slot, rank, fare, tokens: tokens.saturating_mul(heads) });
                    }
                }
            }
        }
    }

    fn has(&self, slot: u32) -> bool {
        (slot as usize) < self.slots.len()
    }

    fn rank(&self, slot: usize) -> Option<u32> {
        self.slots.get(slot).and_then(|slot| slot.rank)
    }

    fn link(&self, slot: usize) -> f64 {
        self.slots.get(slot).map_or(1.0, |slot| slot.link)
    }

    /// Nothing moved yet.
    pub(crate) fn idle(&self) -> Traffic {
        let zero = vec![0; self.slots.len()];
        let pass = Pass { total: 0, bytes_in: zero.clone(), bytes_out: zero, busiest: 0, longest: 0.0 };
        Traffic { forward: pass.clone(), backward: pass }
    }
}
