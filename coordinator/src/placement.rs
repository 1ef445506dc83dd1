//! Placement: which server computes which task. Pure.
//!
//! Cuts belong to the job, placement to the pool: tasks and their slots come from the plan and never change here. A slot
//! changes servers only when it must:
//!
//! - An in-place slot belongs to its rank's server. While that takes no tasks (it drains, or a rank gave it up), the slot
//!   has no server; it never gets another.
//! - A dedicated slot keeps its server while that takes tasks, whoever joins. When it has none, it gets a dedicated
//!   server without a slot, if there is one: the first such slot the server that has been in the pool longest. So as many
//!   slots change servers as servers with a slot are gone and servers without one fill gaps.
//! - A server that finds no gap has no slot, and is given tasks only of slots without a server and by `correction`.
//!
//! A slot without a server is spread, task by task, largest first, each to the server with the least work over weight in
//! that tick. Those that have a slot keep its tasks besides, so a server gets of it what evens the loads out, to within
//! a task. `correction` then takes tasks from servers that are slow.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use crate::server::ServerId;
use crate::slots::SlotSpec;

/// Which servers fill a job's slots.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct Assignment {
    /// The server of each slot; `None` when its tasks are spread.
    pub(crate) slots: Vec<Option<ServerId>>,
    /// The servers that tasks are spread over, in order of id; empty when every slot has its own.
    pub(crate) spread: Vec<ServerId>,
}

/// The servers that take a job's tasks now.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct Takers {
    /// By rank.
    pub(crate) in_place: BTreeMap<u32, ServerId>,
    /// The others, in order of id.
    pub(crate) dedicated: Vec<ServerId>,
}

/// What placement needs to know of a task.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Load {
    /// Its nano-batch.
    pub(crate) tick: u32,
    /// Its slot.
    pub(crate) slot: u32,
    /// Its work, in cells.
    pub(crate) cells: u64,
    /// Its work as predicted, in seconds of a device of speed 1: finite and above zero.
    pub(crate) work: f64,
}

/// Fills slots with servers, as before where those still take tasks. `None` when nobody does.
pub(crate) fn assign(slots: &[SlotSpec], before: &Assignment, takers: &Takers) -> Option<Assignment> {
    let mut free: BTreeSet<ServerId> = takers.dedicated.iter().copied().collect();
    let mut filled: Vec<Option<ServerId>> = vec![None; slots.len()];
    for (n, slot) in slots.iter().enumerate() {
        filled[n] = match slot.rank {
            Some(rank) => takers.in_place.get(&rank).copied(),
            None => before.slots.get(n).copied().flatten().filter(|id| free.remove(id)),
        };
    }
    for (slot, server) in slots.iter().zip(&mut filled) {
        if slot.rank.is_none() && server.is_none() {
            *server = free.pop_first();
        }
    }
    let mut spread = Vec::new();
    if filled.iter().any(Option::is_none) {
        spread.extend(takers.in_place.values().chain(&takers.dedicated).copied());
        spread.sort_unstable();
        if spread.is_empty() {
            return None;
        }
    }
    Some(Assignment { slots: filled, spread })
}

/// The declared weight of each server: of its slots. A server without one is taken to be like a slot on average.
pub(crate) fn weights(
    servers: impl Iterator<Item = ServerId>,
    slots: &[SlotSpec],
    assignment: &Assignment,
) -> BTreeMap<ServerId, f64> {
    let mut held: BTreeMap<ServerId, f64> = BTreeMap::new();
    for (slot, server) in slots.iter().zip(&assignment.slots) {
        if let Some(id) = server {
            *held.entry(*id).or_default() += slot.weight;
        }
    }
    let mean = slots.iter().map(|slot| slot.weight).sum::<f64>() / slots.len().max(1) as f64;
    let usual = if mean > 0.0 { mean } else { 1.0 };
    servers.map(|id| (id, held.get(&id).copied().unwrap_or(usual))).collect()
}

/// The server of each task, in the order of `loads`.
pub(crate) fn place(loads: &[Load], slots: &[SlotSpec], assignment: &Assignment) -> Vec<Option<ServerId>> {
    let owner = |load: &Load| assignment.slots.get(load.slot as usize).copied().flatten();
    let mut placed: Vec<Option<ServerId>> = loads.iter().map(owner).collect();
    let mut ticks: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (n, load) in loads.iter().enumerate() {
        ticks.entry(load.tick).or_default().push(n);
    }
    let weights = weights(assignment.spread.iter().copied(), slots, assignment);
    for tasks in ticks.values() {
        spread_tick(tasks, loads, &weights, &mut placed);
    }
    placed
}

/// Places what is still without a server among the tasks of one tick.
fn spread_tick(
    tasks: &[usize],
    loads: &[Load],
    weights: &BTreeMap<ServerId, f64>,
    placed: &mut [Option<ServerId>],
) {
    let (owned, mut orphans): (Vec<usize>, Vec<usize>) = tasks.iter().partition(|&&n| placed[n].is_some());
    if orphans.is_empty() {
        return;
    }
    let mut work: BTreeMap<ServerId, u64> = BTreeMap::new();
    for n in owned {
        if let Some(id) = placed[n] {
            let sum = work.entry(id).or_default();
            *sum = sum.saturating_add(loads[n].cells);
        }
    }
    let busy = |(&id, &weight): (&ServerId, &f64)| {
        Reverse(Busy { id, weight, cells: work.get(&id).copied().unwrap_or(0) })
    };
    let mut heap: BinaryHeap<_> = weights.iter().map(busy).collect();
    orphans.sort_by_key(|&n| Reverse(loads[n].cells));
    for n in orphans {
        if let Some(mut least) = heap.peek_mut() {
            placed[n] = Some(least.0.id);
            least.0.cells = least.0.cells.saturating_add(loads[n].cells);
        }
    }
}

/// A server ordered by its work over weight, then by id.
#[derive(Clone, Copy, Debug)]
struct Busy {
    id: ServerId,
    weight: f64,
    cells: u64,
}

impl Ord for Busy {
    fn cmp(&self, other: &Self) -> Ordering {
        let level = |b: &Busy| b.cells as f64 / b.weight;
        level(self).total_cmp(&level(other)).then(self.id.cmp(&other.id))
    }
}

impl PartialOrd for Busy {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Busy {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Busy {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn server(id: u64) -> ServerId {
        ServerId(id)
    }

    fn takers(in_place: &[(u32, u64)], dedicated: &[u64]) -> Takers {
        Takers {
            in_place: in_place.iter().map(|&(rank, id)| (rank, server(id))).collect(),
            dedicated: dedicated.iter().copied().map(server).collect(),
        }
    }

    #[test]
    fn slots_keep_their_servers_and_newcomers_fill_gaps() {
        let slots = [SlotSpec::of(Some(0)), SlotSpec::of(None), SlotSpec::of(None)];
        let first = assign(&slots, &Assignment::default(), &takers(&[(0, 1)], &[2, 3])).unwrap();
        assert_eq!(first.slots, [Some(server(1)), Some(server(2)), Some(server(3))]);
        assert!(first.spread.is_empty());
        let second = assign(&slots, &first, &takers(&[(0, 1)], &[3])).unwrap();
        assert_eq!(second.slots, [Some(server(1)), None, Some(server(3))]);
        assert_eq!(second.spread, [server(1), server(3)]);
        let third = assign(&slots, &second, &takers(&[(0, 1)], &[3, 4])).unwrap();
        assert_eq!(third.slots, [Some(server(1)), Some(server(4)), Some(server(3))]);
    }

    #[test]
    fn nobody_left_is_no_assignment() {
        assert_eq!(assign(&[SlotSpec::of(None)], &Assignment::default(), &takers(&[], &[])), None);
    }

    prop_compose! {
        /// Evenly loaded slots, some of whose servers are gone, as after a failure.
        fn failures()(
            slots in 2usize..10,
            pieces in prop::collection::vec(8u64..30, 10),
            ticks in 1u32..3,
            alive in prop::collection::vec(any::<bool>(), 10),
        ) -> (Vec<SlotSpec>, Vec<Load>, Vec<u64>) {
            // Every slot holds 2520 cells a tick, in pieces of its own size.
            let mut loads = Vec::new();
            for tick in 0..ticks {
                for (slot, count) in pieces.iter().enumerate().take(slots) {
                    let mut left = 2520;
                    while left > 0 {
                        let cells = left.min(2520 / count);
                        loads.push(Load { tick, slot: slot as u32, cells, work: cells as f64 });
                        left -= cells;
                    }
                }
            }
            let mut live: Vec<u64> = (0..slots as u64).filter(|&n| alive[n as usize]).collect();
            if live.is_empty() {
                live.push(0);
            }
            (vec![SlotSpec::of(None); slots], loads, live)
        }
    }

    proptest! {
        #[test]
        fn a_failure_leaves_survivors_within_a_piece_of_even((slots, loads, live) in failures()) {
            let all: Vec<u64> = (0..slots.len() as u64).collect();
            let before = assign(&slots, &Assignment::default(), &takers(&[], &all)).unwrap();
            let after = assign(&slots, &before, &takers(&[], &live)).unwrap();
            let placed = place(&loads, &slots, &after);
            prop_assert_eq!(&placed, &place(&loads, &slots, &after));
            let ticks = loads.iter().map(|l| l.tick).max().unwrap_or(0) + 1;
            for tick in 0..ticks {
                let mut work: BTreeMap<ServerId, u64> = live.iter().map(|&id| (server(id), 0)).collect();
                for (load, at) in loads.iter().zip(&placed).filter(|(load, _)| load.tick == tick) {
                    let sum = work.get_mut(&at.unwrap());
                    prop_assert!(sum.is_some(), "a task on a server that is gone");
                    *sum.unwrap() += load.cells;
                    // A slot whose server lives keeps its tasks.
                    if live.contains(&u64::from(load.slot)) {
                        prop_assert_eq!(at.unwrap(), server(u64::from(load.slot)));
                    }
                }
                let largest = loads.iter().map(|l| l.cells).max().unwrap_or(0);
                let (least, most) = (work.values().min().unwrap(), work.values().max().unwrap());
                prop_assert!(most - least <= largest, "{work:?}, largest piece {largest}");
            }
        }
    }

    #[test]
    fn a_server_without_a_slot_takes_as_much_as_one_with() {
        let heavy = SlotSpec { weight: 10.0, ..SlotSpec::of(None) };
        let slots = [SlotSpec { rank: Some(0), ..heavy }, heavy];
        // The server of rank 0 drains; 2 has the dedicated slot, and 3 none.
        let before = assign(&slots, &Assignment::default(), &takers(&[(0, 1)], &[2])).unwrap();
        let after = assign(&slots, &before, &takers(&[], &[2, 3])).unwrap();
        assert_eq!(after.slots, [None, Some(server(2))]);
        let load = |n: u32| Load { tick: 0, slot: n / 10, cells: 10, work: 10.0 };
        let placed = place(&(0..20).map(load).collect::<Vec<_>>(), &slots, &after);
        assert_eq!(placed.iter().filter(|at| **at == Some(server(3))).count(), 10);
    }

    #[test]
    fn heavier_servers_take_more() {
        let light = SlotSpec::of(None);
        let slots = [SlotSpec { weight: 3.0, ..light }, light, light];
        let loads: Vec<Load> = (0..40).map(|_| Load { tick: 0, slot: 2, cells: 10, work: 10.0 }).collect();
        let assignment = Assignment {
            slots: vec![Some(server(1)), Some(server(2)), None],
            spread: vec![server(1), server(2)],
        };
        let placed = place(&loads, &slots, &assignment);
        assert_eq!(placed.iter().filter(|at| **at == Some(server(1))).count(), 30);
    }
}
