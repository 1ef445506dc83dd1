//! Correction: which tasks slow servers give to others. Pure.
//!
//! Cuts and slots stay; single tasks change servers. A slow server gives tasks, the largest that fit first, until it is
//! expected to end no later than everybody would if all work were spread by power, give or take [`SLACK`]; one it keeps.
//! Whoever would end first takes the next one, so long as it then still ends sooner than the giver would have.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use crate::placement::{Assignment, Load, weights};
use crate::server::ServerId;
use crate::slots::SlotSpec;

/// A server this little late, as a fraction, keeps its tasks.
const SLACK: f64 = 0.05;

/// What a server does in a second, relative to others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Power {
    /// As declared: the weight of its slots, or the mean of all slots for a server without one.
    pub(crate) weight: f64,
    /// Of that, how much it is seen to do; below 1 for a slow server, and 1 for all others.
    pub(crate) speed: f64,
}

impl Power {
    /// The powers of all servers that take tasks.
    pub(crate) fn of_all(
        takers: impl Iterator<Item = ServerId>,
        slots: &[SlotSpec],
        assignment: &Assignment,
        slow: &BTreeMap<ServerId, f64>,
    ) -> BTreeMap<ServerId, Power> {
        let power = |(id, weight)| (id, Power { weight, speed: slow.get(&id).copied().unwrap_or(1.0) });
        weights(takers, slots, assignment).into_iter().map(power).collect()
    }

    fn seconds(self, work: f64) -> f64 {
        work / (self.weight * self.speed)
    }

    fn is_slow(self) -> bool {
        self.speed < 1.0
    }
}

/// Takes tasks from slow servers, tick by tick; says how many.
pub(crate) fn relieve(
    loads: &[Load],
    powers: &BTreeMap<ServerId, Power>,
    placed: &mut [Option<ServerId>],
) -> u64 {
    if powers.values().all(|power| !power.is_slow()) {
        return 0;
    }
    let mut ticks: BTreeMap<u32, Tick<'_>> = BTreeMap::new();
    for (n, (load, server)) in loads.iter().zip(placed.iter()).enumerate() {
        let tick = ticks.entry(load.tick).or_insert_with(|| Tick::idle(loads, powers));
        if let Some(held) = server.and_then(|id| tick.held.get_mut(&id)) {
            held.work += load.work;
            held.tasks.push(n);
        }
    }
    ticks.into_values().map(|mut tick| tick.relieve(placed)).sum()
}

/// What servers hold of one tick.
struct Tick<'a> {
    loads: &'a [Load],
    held: BTreeMap<ServerId, Held>,
}

struct Held {
    power: Power,
    work: f64,
    tasks: Vec<usize>,
}

impl Held {
    fn seconds(&self) -> f64 {
        self.power.seconds(self.work)
    }
}

impl<'a> Tick<'a> {
    fn idle(loads: &'a [Load], powers: &BTreeMap<ServerId, Power>) -> Tick<'a> {
        let held = |(&id, &power): (&ServerId, &Power)| (id, Held { power, work: 0.0, tasks: Vec::new() });
        Tick { loads, held: powers.iter().map(held).collect() }
    }

    fn relieve(&mut self, placed: &mut [Option<ServerId>]) -> u64 {
        let (mut work, mut power) = (0.0, 0.0);
        for held in self.held.values() {
            work += held.work;
            power += held.power.weight * held.power.speed;
        }
        let level = work / power * (1.0 + SLACK);
        // Times are not negative, so their bits are ordered as they are.
        let by_time = |(&id, held): (&ServerId, &Held)| (held.seconds().to_bits(), id);
        let slow = |(_, held): &(&ServerId, &Held)| held.power.is_slow();
        let mut givers: Vec<_> = self.held.iter().filter(slow).map(by_time).collect();
        givers.sort_unstable_by_key(|&(time, id)| (Reverse(time), id));
        let mut takers: BTreeSet<_> = self.held.iter().filter(|entry| !slow(entry)).map(by_time).collect();
        givers.into_iter().map(|(_, giver)| self.give(giver, level, &mut takers, placed)).sum()
    }

    /// Relieves one server; says of how many tasks.
    fn give(
        &mut self,
        giver: ServerId,
        level: f64,
        takers: &mut BTreeSet<(u64, ServerId)>,
        placed: &mut [Option<ServerId>],
    ) -> u64 {
        let Some(mut from) = self.held.remove(&giver) else { return 0 };
        let loads = self.loads;
        let work = |n: usize| loads.get(n).map_or(0.0, |load| load.work);
        // Of equal tasks the last in plan order goes first.
        from.tasks.sort_by(|&a, &b| work(a).total_cmp(&work(b)));
        let mut given = 0;
        // Those that would take longer with any task of this one are left to others.
        let mut unsuitable = Vec::new();
        // It keeps a task: what computes nothing is never found to be fast again.
        while from.seconds() > level && from.tasks.len() > 1 {
            let Some(&(time, taker)) = takers.first() else { break };
            let Some(to) = self.held.get_mut(&taker) else { break };
            let spare = from.work * (1.0 - level / from.seconds());
            let fitting = from.tasks.partition_point(|&n| work(n) <= spare).max(1);
            let sooner =
                from.tasks.partition_point(|&n| to.power.seconds(to.work + work(n)) < from.seconds());
            let Some(at) = fitting.min(sooner).checked_sub(1).filter(|&at| at < from.tasks.len()) else {
                unsuitable.extend(takers.pop_first());
                continue;
            };
            let n = from.tasks.remove(at);
            from.work -= work(n);
            to.work += work(n);
            if let Some(place) = placed.get_mut(n) {
                *place = Some(taker);
            }
            given += 1;
            takers.remove(&(time, taker));
            takers.insert((to.seconds().to_bits(), taker));
        }
        takers.extend(unsuitable);
        self.held.insert(giver, from);
        given
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::placement::place;

    fn server(id: u64) -> ServerId {
        ServerId(id)
    }

    /// Loads by slot: the work of each of its tasks.
    fn loads(slots: &[&[u64]]) -> Vec<Load> {
        let load = |slot: usize, &cells: &u64| Load { tick: 0, slot: slot as u32, cells, work: cells as f64 };
        slots
            .iter()
            .enumerate()
            .flat_map(|(n, tasks)| tasks.iter().map(move |cells| load(n, cells)))
            .collect()
    }

    /// Slot n on server n, and servers without a slot after them.
    fn corrected(
        loads: &[Load],
        weights: &[f64],
        servers: u64,
        slow: &[(u64, f64)],
    ) -> (Vec<u64>, Vec<u64>, u64) {
        let slots: Vec<SlotSpec> =
            weights.iter().map(|&weight| SlotSpec { weight, ..SlotSpec::of(None) }).collect();
        let filled = (0..weights.len() as u64).map(|n| Some(server(n))).collect();
        let assignment = Assignment { slots: filled, spread: Vec::new() };
        let before = place(loads, &slots, &assignment);
        let slow = slow.iter().map(|&(id, speed)| (server(id), speed)).collect();
        let powers = Power::of_all((0..servers).map(server), &slots, &assignment, &slow);
        let mut after = before.clone();
        let moved = relieve(loads, &powers, &mut after);
        let ids = |placed: Vec<Option<ServerId>>| placed.into_iter().map(|id| id.unwrap().0).collect();
        (ids(before), ids(after), moved)
    }

    /// Without work it would never be seen to be fast again.
    #[test]
    fn a_slow_server_keeps_a_task() {
        let (_, after, moved) = corrected(&loads(&[&[10], &[10]]), &[1.0; 2], 3, &[(1, 0.3)]);
        assert_eq!((after, moved), (vec![0, 1], 0));
        let (_, after, moved) = corrected(&loads(&[&[10, 10], &[10, 10]]), &[1.0; 2], 4, &[(1, 0.125)]);
        assert_eq!((moved, after.iter().filter(|&&id| id == 1).count()), (1, 1));
    }

    #[test]
    fn a_taker_that_is_too_weak_stands_in_nobodys_way() {
        let loads = loads(&[&[100; 4], &[100; 4], &[]]);
        let (_, after, moved) = corrected(&loads, &[4.0, 4.0, 0.01], 3, &[(1, 0.5)]);
        assert!(moved > 0 && !after.contains(&2), "{after:?}");
    }

    #[test]
    fn nobody_slow_moves_nothing() {
        let (before, after, moved) = corrected(&loads(&[&[9, 1], &[1]]), &[1.0; 2], 3, &[]);
        assert_eq!((before, moved), (after, 0));
    }

    #[test]
    fn a_slow_server_gives_as_few_tasks_as_needed() {
        let tasks: &[u64] = &[10; 8];
        // Two servers do 1.5 times what one does: 160 / 1.5 x 0.5 is 53 for the slow one, so three tasks go.
        let (before, after, moved) = corrected(&loads(&[tasks, tasks]), &[1.0; 2], 2, &[(1, 0.5)]);
        assert_eq!(moved, 3);
        assert_eq!(before.iter().zip(&after).filter(|(a, b)| a != b).count(), 3);
        assert_eq!(after.iter().filter(|&&id| id == 1).count(), 5);
        // Among ever more others each takes one at most.
        let (_, after, moved) = corrected(&loads(&[tasks; 6]), &[1.0; 6], 6, &[(1, 0.5)]);
        let count = |id: u64| after.iter().filter(|&&at| at == id).count();
        assert_eq!((moved, count(1)), (4, 4));
        assert!([0, 2, 3, 4, 5].iter().all(|&id| count(id) <= 9), "{after:?}");
    }

    #[test]
    fn large_tasks_go_first_and_small_ones_fill_up() {
        let tasks: &[u64] = &[40, 1, 1, 20, 1, 1, 36];
        let (_, after, moved) = corrected(&loads(&[tasks, &[50, 50]]), &[1.0; 2], 2, &[(0, 0.5)]);
        // 200 / 1.5 x 0.5 is 67, so 33 should go, and 20 is the largest task within that.
        assert_eq!(after[..7], [0, 1, 1, 1, 1, 1, 0]);
        assert_eq!(moved, 5);
    }

    #[test]
    fn a_server_without_a_slot_takes_first() {
        let (_, after, moved) = corrected(&loads(&[&[10; 8], &[10; 8]]), &[1.0; 2], 3, &[(0, 0.5)]);
        assert!(moved > 0 && after.iter().filter(|&&id| id == 2).count() as u64 == moved, "{after:?}");
    }

    #[test]
    fn declared_weights_are_no_slowness() {
        // Three times the work on three times the weight, as slow as it is.
        let (before, after, moved) = corrected(&loads(&[&[10; 24], &[10; 8]]), &[3.0, 1.0], 2, &[]);
        assert_eq!((before, moved), (after, 0));
        let (_, after, moved) = corrected(&loads(&[&[10; 24], &[10; 8]]), &[3.0, 1.0], 2, &[(0, 0.5)]);
        // 320 / 2.5 x 1.5 is 192.
        assert_eq!(moved, 4, "{after:?}");
    }

    #[test]
    fn one_task_stays_where_nobody_ends_it_sooner() {
        let (_, after, moved) = corrected(&loads(&[&[10], &[9]]), &[1.0; 2], 2, &[(0, 0.6)]);
        assert_eq!((after, moved), (vec![0, 1], 0));
    }

    prop_compose! {
        fn pools()(slots in 1usize..8, spare in 0u64..3)(
            tasks in prop::collection::vec((0u32..3, 0..slots as u32, 1u64..1000), 1..120),
            weights in prop::collection::vec(0.2f64..4.0, slots),
            slow in prop::collection::btree_map(0..slots as u64 + spare, 0.05f64..0.92, 0..5),
            spare in Just(spare),
        ) -> (Vec<Load>, Vec<f64>, u64, Vec<(u64, f64)>) {
            let load = |&(tick, slot, cells): &(u32, u32, u64)| Load { tick, slot, cells, work: cells as f64 };
            let servers = weights.len() as u64 + spare;
            (tasks.iter().map(load).collect(), weights, servers, slow.into_iter().collect())
        }
    }

    proptest! {
        #[test]
        fn only_slow_servers_give_and_no_tick_takes_longer((loads, weights, servers, slow) in pools()) {
            let (before, after, moved) = corrected(&loads, &weights, servers, &slow);
            let again = corrected(&loads, &weights, servers, &slow);
            prop_assert_eq!((&again.1, again.2), (&after, moved));
            prop_assert_eq!(before.iter().zip(&after).filter(|(a, b)| a != b).count() as u64, moved);
            let speed = |id: u64| slow.iter().find(|&&(at, _)| at == id).map(|&(_, speed)| speed);
            for (n, (&a, &b)) in before.iter().zip(&after).enumerate() {
                prop_assert_eq!(a, u64::from(loads[n].slot), "a slot's server is its own before");
                prop_assert!(b < servers);
                prop_assert!(a == b || (speed(a).is_some() && speed(b).is_none()));
            }
            for tick in 0..3 {
                let longest = |placed: &[u64]| {
                    let mut seconds = vec![0.0; servers as usize];
                    for (load, &id) in loads.iter().zip(placed).filter(|(load, _)| load.tick == tick) {
                        let mean = weights.iter().sum::<f64>() / weights.len() as f64;
                        let weight = weights.get(id as usize).copied().unwrap_or(mean);
                        seconds[id as usize] += load.work / (weight * speed(id).unwrap_or(1.0));
                    }
                    seconds.into_iter().fold(0.0, f64::max)
                };
                prop_assert!(longest(&after) <= longest(&before) * (1.0 + 1e-9));
            }
        }
    }
}
