//! Bytes that a plan moves between each home and each slot.

use std::collections::BTreeMap;

use outboard_attention::StepPlan;

use crate::Problem;
use crate::judge::price::Price;
use crate::traffic::{Ports, Shipment};

/// Bytes between a home rank and a slot that computes for it, in one layer, over all ticks. Added up, flows are the
/// bytes of [`crate::Traffic`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The home rank of the tokens.
    pub rank: u32,
    /// The slot, never on the device of `rank`.
    pub slot: usize,
    /// The forward pass.
    pub forward: Carried,
    /// The backward pass.
    pub backward: Carried,
}

/// Bytes of one pass by direction of travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Carried {
    /// From the home rank to the slot: Q, K and V, or dO, LSE and D.
    pub there: u64,
    /// From the slot to the home rank: O and LSE, or dQ, dK and dV.
    pub back: u64,
}

impl Flow {
    /// The flows of `plan` that carry anything, in order of rank, then slot. Tasks of documents or slots that the
    /// problem does not have move nothing.
    pub fn of(plan: &StepPlan, problem: &Problem) -> Vec<Flow> {
        let ports = Ports::new(problem);
        let mut carried: BTreeMap<(u32, usize), [Carried; 2]> = BTreeMap::new();
        for tick in &plan.ticks {
            ports.of_tick(tick, problem, |homes, needs| {
                ports.shipments(homes, needs, |Shipment { slot, rank, fare, tokens }| {
                    if tokens > 0 {
                        let [forward, backward] = carried.entry((rank, slot)).or_default();
                        forward.add(fare.forward, tokens);
                        backward.add(fare.backward, tokens);
                    }
                });
            });
        }
        let flows = carried.into_iter();
        flows.map(|((rank, slot), [forward, backward])| Flow { rank, slot, forward, backward }).collect()
    }

    /// Bytes of both passes and directions. Saturates.
    pub fn total(&self) -> u64 {
        self.forward.total().saturating_add(self.backward.total())
    }
}

impl Carried {
    /// Bytes of both directions. Saturates.
    pub fn total(&self) -> u64 {
        self.there.saturating_add(self.back)
    }

    fn add(&mut self, price: Price, tokens: u64) {
        self.there = self.there.saturating_add(price.there.saturating_mul(tokens));
        self.back = self.back.saturating_add(price.back.saturating_mul(tokens));
    }
}
