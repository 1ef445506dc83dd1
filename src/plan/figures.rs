//! What a plan amounts to, for the table and the page.

use std::collections::BTreeSet;

use outboard_attention::StepPlan;
use outboard_planner::{Fault, Loads, Pass, Problem, Rates, Slot, Times, Traffic, Verdict, judge};

/// What computes or lends: a server, or a rank that has none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Device {
    /// Its slot, if it has a server.
    pub(super) slot: Option<usize>,
    /// Its rank, if it is one.
    pub(super) rank: Option<u32>,
    /// Work that it takes, relative to others.
    pub(super) weight: f64,
}

/// The figures of a plan.
#[derive(Clone, Debug)]
pub(super) struct Figures {
    /// Servers in order of their slots, then ranks without one.
    pub(super) devices: Vec<Device>,
    /// Cells of each device and tick where every rank computes its own rows.
    pub(super) before: Vec<Vec<u64>>,
    /// The same as planned.
    pub(super) after: Vec<Vec<u64>>,
    /// Most over mean of all ranks, each computing its own rows.
    pub(super) imbalance_before: f64,
    /// Tasks of each slot.
    pub(super) tasks: Vec<usize>,
    /// Bytes.
    pub(super) traffic: Traffic,
    /// What the judge says.
    pub(super) verdict: Verdict,
    /// What the problem's profile predicts, if it has one.
    pub(super) times: Option<Times>,
}

/// The link that is in use longest in a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    /// Whose link it is.
    pub(super) slot: usize,
    /// Which way: "into" or "out of".
    pub(super) way: &'static str,
    /// Bytes of all ticks.
    pub(super) bytes: u64,
}

impl Figures {
    pub(super) fn of(problem: &Problem, plan: &StepPlan) -> Result<Figures, Fault> {
        let Problem { geometry, documents, slots, .. } = problem;
        let verdict = judge(plan, problem)?;
        let homes: BTreeSet<u32> = documents.iter().flat_map(|d| d.homes()).map(|home| home.rank).collect();
        let served: BTreeSet<u32> = slots.iter().filter_map(|slot| slot.rank).collect();
        let ranks: Vec<u32> = homes.union(&served).copied().collect();
        let servers = slots.iter().enumerate().map(|(n, slot)| Device {
            slot: Some(n),
            rank: slot.rank,
            weight: slot.weight,
        });
        let others =
            homes.difference(&served).map(|&rank| Device { slot: None, rank: Some(rank), weight: 1.0 });
        let devices: Vec<Device> = servers.chain(others).collect();
        let at_home = Loads::at_home_of(documents, geometry, &ranks);
        let planned = Loads::planned(plan, documents, geometry);
        let before = at_home.ticks.iter().map(|tick| {
            let cells = |device: &Device| {
                let rank = device.rank.and_then(|rank| ranks.binary_search(&rank).ok());
                rank.and_then(|n| tick.get(n)).copied().unwrap_or(0)
            };
            devices.iter().map(cells).collect()
        });
        let after = planned.ticks.iter().map(|tick| {
            let cells = |device: &Device| device.slot.and_then(|n| tick.get(n)).copied().unwrap_or(0);
            devices.iter().map(cells).collect()
        });
        let mut tasks = vec![0usize; slots.len()];
        for (_, task) in plan.tasks() {
            if let Some(tasks) = tasks.get_mut(task.slot as usize) {
                *tasks += 1;
            }
        }
        Ok(Figures {
            before: before.collect(),
            after: after.collect(),
            imbalance_before: at_home.max_over_mean(),
            tasks,
            traffic: Traffic::of(plan, problem),
            verdict,
            times: problem.profile.as_ref().map(|profile| Times::planned(plan, problem, profile)),
            devices,
        })
    }

    /// Cells over weight of each device over the mean of all servers, at home and as planned, all ticks together.
    pub(super) fn shares(&self) -> (Vec<f64>, Vec<f64>) {
        (self.share(&sum(&self.before)), self.share(&sum(&self.after)))
    }

    /// The same of given cells of each device.
    pub(super) fn share(&self, cells: &[u64]) -> Vec<f64> {
        let served = |device: &&Device| device.slot.is_some();
        let weights: f64 = self.devices.iter().filter(served).map(|device| device.weight).sum();
        let total: f64 = cells.iter().map(|&cells| cells as f64).sum();
        let mean = if total > 0.0 { total / weights } else { 1.0 };
        cells.iter().zip(&self.devices).map(|(&cells, device)| cells as f64 / device.weight / mean).collect()
    }

    /// Both passes by name.
    pub(super) fn passes(&self) -> [(&'static str, &Pass); 2] {
        [("forward", &self.traffic.forward), ("backward", &self.traffic.backward)]
    }

    /// How much longer the busiest server would compute if every rank computed its own rows. Nothing is known of ranks
    /// without a server.
    pub(super) fn compute_at_home(&self) -> Option<f64> {
        if self.devices.iter().any(|device| device.slot.is_none()) {
            return None;
        }
        let worst = |ticks: &[Vec<u64>]| -> f64 {
            let over_weight = |(&cells, device): (&u64, &Device)| cells as f64 / device.weight;
            ticks.iter().map(|tick| tick.iter().zip(&self.devices).map(over_weight).fold(0.0, f64::max)).sum()
        };
        let after = worst(&self.after);
        (after > 0.0).then(|| worst(&self.before) / after)
    }
}

fn sum(ticks: &[Vec<u64>]) -> Vec<u64> {
    let mut sums = vec![0u64; ticks.first().map_or(0, Vec::len)];
    for tick in ticks {
        for (sum, cells) in sums.iter_mut().zip(tick) {
            *sum = sum.saturating_add(*cells);
        }
    }
    sums
}

/// The link of a pass that is in use longest, if any carries anything.
pub(super) fn busiest(pass: &Pass, slots: &[Slot]) -> Option<Link> {
    let side = |way, bytes: &[u64]| -> Vec<Link> {
        bytes.iter().enumerate().map(|(slot, &bytes)| Link { slot, way, bytes }).collect()
    };
    let links = side("into", &pass.bytes_in).into_iter().chain(side("out of", &pass.bytes_out));
    // Of equals the first is named.
    let time = |link: &Link| link.bytes as f64 / slots.get(link.slot).map_or(1.0, |slot| slot.link);
    links
        .filter(|link| link.bytes > 0)
        .reduce(|most, link| if time(&link) > time(&most) { link } else { most })
}

/// Layer time of both passes, with its parts: compute and link seconds.
pub(super) fn layer_times(verdict: &Verdict, rates: Rates) -> [(&'static str, f64, f64, f64); 2] {
    [("forward", verdict.forward), ("backward", verdict.backward)].map(|(name, pass)| {
        (name, pass.seconds(rates), pass.compute_seconds(rates), pass.link_seconds(rates))
    })
}

#[cfg(test)]
mod tests {
    use outboard_planner::{Policy, plan, plan_by};

    use super::super::examples::{in_place, mixed};
    use super::*;

    #[test]
    fn no_cell_is_lost_on_the_way_to_a_server() {
        let problem = mixed();
        let figures = Figures::of(&problem, &plan(&problem).unwrap()).unwrap();
        let ranks: Vec<_> = figures.devices.iter().map(|device| (device.slot, device.rank)).collect();
        assert_eq!(ranks, [(Some(0), Some(0)), (Some(1), Some(1)), (Some(2), None), (None, Some(2))]);
        assert_eq!(figures.before.len(), 2);
        for (before, after) in figures.before.iter().zip(&figures.after) {
            assert_eq!(before.iter().sum::<u64>(), after.iter().sum::<u64>());
            assert_eq!((before[2], after[3]), (0, 0), "what has no rank, and what has no server");
        }
        let (_, after) = figures.shares();
        assert!(after[..3].iter().all(|share| (0.9..1.02).contains(share)), "{after:?}");
        assert_eq!(figures.compute_at_home(), None, "rank 2 has no server");
        assert_eq!(figures.tasks.iter().sum::<usize>(), figures.verdict.tasks);
    }

    #[test]
    fn balance_shortens_computing_by_what_was_too_much() {
        let problem = in_place(2);
        let figures = Figures::of(&problem, &plan(&problem).unwrap()).unwrap();
        let expected = figures.imbalance_before / figures.verdict.max_over_mean;
        let ratio = figures.compute_at_home().unwrap();
        assert!((ratio / expected - 1.0).abs() < 1e-12 && ratio > 1.9, "{ratio} {expected}");
        let fixed = Figures::of(&problem, &plan_by(&problem, Policy::Fixed).unwrap()).unwrap();
        assert_eq!(fixed.compute_at_home(), Some(1.0));
        assert_eq!(busiest(&fixed.traffic.forward, &problem.slots), None);
    }

    #[test]
    fn the_busiest_link_is_named_with_its_way() {
        let pass = Pass { bytes_in: vec![3, 5], bytes_out: vec![7, 7], ..Pass::default() };
        assert_eq!(busiest(&pass, &[]), Some(Link { slot: 0, way: "out of", bytes: 7 }));
        let slots = [Slot::dedicated(), Slot { link: 0.5, ..Slot::dedicated() }];
        assert_eq!(busiest(&pass, &slots), Some(Link { slot: 1, way: "out of", bytes: 7 }));
    }
}
