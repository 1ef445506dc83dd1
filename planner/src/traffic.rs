//! Bytes that a plan moves.

use std::collections::{BTreeMap, BTreeSet};

use outboard_attention::{DocumentId, HomeRange, Mask, PlannedTask, Span, StepPlan};

use crate::cost::{PassPrice, Price};
use crate::sheet::extent;
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
        let ports = Ports::new(&problem.slots);
        let mut traffic = Traffic { forward: ports.idle(), backward: ports.idle() };
        for tick in &plan.ticks {
            let mut by_document: BTreeMap<DocumentId, Vec<&PlannedTask>> = BTreeMap::new();
            for task in &tick.tasks {
                by_document.entry(task.document).or_default().push(task);
            }
            let mut this = Traffic { forward: ports.idle(), backward: ports.idle() };
            for (id, tasks) in by_document {
                let Some(document) = documents.get(&id) else { continue };
                let mask = document.mask(problem.geometry.kv_heads());
                this.add(problem, &ports, document.homes(), &needs(&mask, &tasks));
            }
            traffic.forward.append(&this.forward);
            traffic.backward.append(&this.backward);
        }
        traffic
    }

    /// Adds what one document's tasks need.
    fn add(&mut self, problem: &Problem, ports: &Ports<'_>, homes: &[HomeRange], needs: &[Need]) {
        let prices = [false, true].map(|partial| {
            [PassPrice::forward(&problem.geometry, partial), PassPrice::backward(&problem.geometry, partial)]
        });
        let borders: BTreeSet<usize> =
            needs.iter().flat_map(|n| [n.kv_heads.start(), n.kv_heads.end()]).collect();
        let borders: Vec<usize> = borders.into_iter().collect();
        for pair in borders.windows(2) {
            let heads = (pair[1] - pair[0]) as u64;
            let here: Vec<&Need> = needs.iter().filter(|need| need.kv_heads.contains(pair[0])).collect();
            let rows: Vec<_> = here.iter().map(|need| (need.rows, need.slot)).collect();
            let keys: Vec<_> = here.iter().map(|need| (need.keys, need.slot)).collect();
            for (spans, are_keys) in [(rows, false), (keys, true)] {
                let price = |pass: PassPrice| if are_keys { pass.key } else { pass.row };
                for (tokens, rank, slots) in ranges(&spans, homes) {
                    let [forward, backward] = prices[usize::from(slots.len() > 1)].map(price);
                    for slot in slots {
                        if ports.rank(slot) != Some(rank) {
                            let home = ports.of_rank.get(&rank).copied();
                            self.forward.ship(slot, home, forward, tokens * heads);
                            self.backward.ship(slot, home, backward, tokens * heads);
                        }
                    }
                }
            }
        }
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

/// Whose device a slot is on.
struct Ports<'a> {
    slots: &'a [Slot],
    of_rank: BTreeMap<u32, usize>,
}

impl<'a> Ports<'a> {
    fn new(slots: &'a [Slot]) -> Ports<'a> {
        let of_rank = slots.iter().enumerate().filter_map(|(n, slot)| Some((slot.rank?, n))).collect();
        Ports { slots, of_rank }
    }

    fn rank(&self, slot: usize) -> Option<u32> {
        self.slots.get(slot).and_then(|slot| slot.rank)
    }

    fn idle(&self) -> Pass {
        let zero = vec![0; self.slots.len()];
        Pass { total: 0, bytes_in: zero.clone(), bytes_out: zero, busiest: 0 }
    }
}

/// Tokens that a task needs for some kv heads.
struct Need {
    kv_heads: Span,
    rows: Span,
    keys: Span,
    slot: usize,
}

fn needs(mask: &Mask, tasks: &[&PlannedTask]) -> Vec<Need> {
    let need = |task: &PlannedTask| {
        let part = mask.clip(task.q, task.kv, task.kv_heads);
        let parts = part.parts().iter();
        let extents =
            parts.filter_map(|p| extent(&p.slice, p.slice.q()).map(|(rows, keys)| (p.kv_heads, rows, keys)));
        let all = extents.reduce(|a, b| (a.0.hull(b.0), a.1.hull(b.1), a.2.hull(b.2)));
        all.map(|(kv_heads, rows, keys)| Need { kv_heads, rows, keys, slot: task.slot as usize })
    };
    tasks.iter().filter_map(|task| need(task)).collect()
}

/// The ranges of tokens between any two borders of `spans` and `homes` that some slot needs: their length, their home
/// and who needs them.
fn ranges<'a>(
    spans: &'a [(Span, usize)],
    homes: &'a [HomeRange],
) -> impl Iterator<Item = (u64, u32, BTreeSet<usize>)> + 'a {
    let all = spans.iter().map(|(span, _)| *span).chain(homes.iter().map(|home| home.tokens));
    let borders: BTreeSet<usize> = all.flat_map(|span| [span.start(), span.end()]).collect();
    let borders: Vec<usize> = borders.into_iter().collect();
    let pairs: Vec<(usize, usize)> = borders.windows(2).map(|pair| (pair[0], pair[1])).collect();
    pairs.into_iter().filter_map(move |(start, end)| {
        let slots: BTreeSet<usize> =
            spans.iter().filter(|(s, _)| s.contains(start)).map(|&(_, slot)| slot).collect();
        let home = homes.get(homes.partition_point(|home| home.tokens.end() <= start))?;
        (!slots.is_empty()).then_some(((end - start) as u64, home.rank, slots))
    })
}
