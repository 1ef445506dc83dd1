//! How fast a run's servers are, by what its ranks report of finished steps. Pure.

use std::collections::{BTreeMap, BTreeSet};

use outboard_planner::{Sample, Speeds};

use crate::report::StepReport;
use crate::server::ServerId;

/// Most steps that are planned and not reported by all ranks; of more, the oldest is forgotten.
const MAX_OPEN: usize = 16;

/// What a server was given in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Given {
    /// Tasks.
    pub(crate) tasks: u64,
    /// What they are predicted to take at its weight, in the time of a device of speed 1.
    pub(crate) seconds: f64,
}

/// What was planned, what has been reported, and what follows of speeds.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    ranks: usize,
    open: BTreeMap<u64, Open>,
    speeds: Speeds<ServerId>,
}

#[derive(Clone, Debug, Default)]
struct Open {
    given: BTreeMap<ServerId, Given>,
    reported: BTreeSet<u32>,
    measured: BTreeMap<ServerId, Measured>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Measured {
    tasks: u64,
    seconds: f64,
    lost: bool,
}

impl Pace {
    pub(crate) fn new(ranks: u32) -> Pace {
        Pace { ranks: ranks as usize, open: BTreeMap::new(), speeds: Speeds::default() }
    }

    /// Notes what servers are given in a step.
    pub(crate) fn planned(&mut self, step: u64, given: BTreeMap<ServerId, Given>) {
        self.open.insert(step, Open { given, ..Open::default() });
        if self.open.len() > MAX_OPEN {
            self.open.pop_first();
        }
    }

    /// Takes a rank's report. A step says something of speeds once all ranks have reported it, each once: what a server
    /// did for one of them is not told apart in the plan. True when this was the last.
    pub(crate) fn reported(&mut self, report: &StepReport) -> bool {
        let Some(open) = self.open.get_mut(&report.step) else { return false };
        if !open.reported.insert(report.rank) {
            return false;
        }
        for server in report.servers.iter().filter(|server| open.given.contains_key(&server.server)) {
            let measured = open.measured.entry(server.server).or_default();
            measured.tasks = measured.tasks.saturating_add(server.tasks);
            measured.seconds += server.compute_seconds;
            measured.lost |= server.lost;
        }
        if open.reported.len() < self.ranks {
            return false;
        }
        let samples = open.samples();
        self.open.retain(|&step, _| step > report.step);
        self.speeds.observe(&samples);
        true
    }

    /// Forgets servers that take no tasks any more.
    pub(crate) fn retain(&mut self, takes: impl Fn(ServerId) -> bool) {
        self.speeds.retain(|&id| takes(id));
    }

    /// Whether anything is known of a server's speed: it has measured something, and still takes tasks.
    pub(crate) fn knows(&self, server: ServerId) -> bool {
        self.speeds.knows(&server)
    }

    /// The servers that are clearly slower than the others, each with its speed relative to them.
    pub(crate) fn slow(&self) -> BTreeMap<ServerId, f64> {
        self.speeds.slow()
    }
}

impl Open {
    fn samples(&self) -> BTreeMap<ServerId, Sample> {
        let sample = |(id, measured): (&ServerId, &Measured)| {
            let given = self.given.get(id).filter(|given| given.tasks > 0 && !measured.lost)?;
            // Layers and directions come in here, and tasks that were sent elsewhere or came from there.
            let rounds = measured.tasks as f64 / given.tasks as f64;
            Some((*id, Sample { work: given.seconds * rounds, seconds: measured.seconds }))
        };
        self.measured.iter().filter_map(sample).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::JobId;
    use crate::report::ServerReport;

    /// A run of two ranks and four servers, each given ten tasks a step.
    fn pace() -> Pace {
        Pace::new(2)
    }

    fn plan(pace: &mut Pace, step: u64) {
        let given = Given { tasks: 10, seconds: 1.0 };
        pace.planned(step, (0..4).map(|id| (ServerId(id), given)).collect());
    }

    fn report(rank: u32, step: u64, seconds: [f64; 4]) -> StepReport {
        let server = |(id, compute_seconds)| ServerReport {
            server: ServerId(id),
            tasks: 20,
            compute_seconds,
            lost: false,
        };
        let servers = (0..).zip(seconds).map(server).collect();
        StepReport { job: JobId(1), rank, step, seconds: 1.0, exposed_seconds: 0.0, servers }
    }

    fn run(pace: &mut Pace, steps: std::ops::Range<u64>, seconds: [f64; 4]) {
        for step in steps {
            plan(pace, step);
            assert!(!pace.reported(&report(0, step, seconds)));
            assert!(pace.reported(&report(1, step, seconds)));
        }
    }

    #[test]
    fn a_server_that_takes_longer_is_slow_until_it_does_not() {
        let mut pace = pace();
        run(&mut pace, 0..40, [1.0, 1.0, 2.0, 1.0]);
        let slow = pace.slow();
        assert_eq!(slow.keys().copied().collect::<Vec<_>>(), [ServerId(2)]);
        assert!((slow[&ServerId(2)] - 0.5).abs() < 0.01, "{slow:?}");
        run(&mut pace, 40..80, [1.0; 4]);
        assert!(pace.slow().is_empty());
    }

    #[test]
    fn one_absurd_report_makes_nobody_slow() {
        for absurd in [1e-9, 0.01, 0.1, 10.0, 1e9, f64::MAX] {
            let mut pace = pace();
            run(&mut pace, 0..5, [1.0; 4]);
            run(&mut pace, 5..6, [1.0, absurd, 1.0, 1.0]);
            assert!(pace.slow().is_empty(), "{absurd}");
        }
    }

    #[test]
    fn a_rank_counts_once_and_unknown_steps_and_servers_do_not() {
        let mut pace = pace();
        assert!(!pace.reported(&report(0, 7, [1.0; 4])));
        plan(&mut pace, 7);
        assert!(!pace.reported(&report(0, 7, [1.0; 4])));
        assert!(!pace.reported(&report(0, 7, [1.0, 1.0, 1.0, 1e6])), "the same rank again");
        let mut last = report(1, 7, [1.0; 4]);
        last.servers.push(ServerReport { server: ServerId(99), ..last.servers[0] });
        assert!(pace.reported(&last));
        assert!(!pace.reported(&last), "the step is over");
        assert!((0..4).all(|id| pace.speeds.speed(&ServerId(id)) == 1.0));
    }

    #[test]
    fn work_that_others_took_over_is_not_counted() {
        let mut pace = pace();
        for step in 0..40 {
            plan(&mut pace, step);
            // Half of its tasks in half of the time, and one that was given up on the way.
            let mut half = report(0, step, [1.0, 0.5, 1.0, 9.0]);
            half.servers[1].tasks = 10;
            half.servers[3].lost = true;
            pace.reported(&half);
            pace.reported(&StepReport { rank: 1, ..half });
        }
        assert!(pace.slow().is_empty(), "{:?}", pace.slow());
    }

    #[test]
    fn steps_that_are_never_reported_are_forgotten() {
        let mut pace = pace();
        (0..100).for_each(|step| plan(&mut pace, step));
        assert_eq!(pace.open.len(), MAX_OPEN);
        pace.reported(&report(0, 99, [1.0; 4]));
        assert!(pace.reported(&report(1, 99, [1.0; 4])));
        assert!(pace.open.is_empty());
    }
}
