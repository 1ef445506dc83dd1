//! Plans of another planner, DistCA's: as they were judged and written down, or made by our policy of that name.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use outboard_planner::{PassVerdict, Policy, Problem, Rates, Verdict, judge, plan_by};
use serde::Deserialize;

/// The file beside the steps: figures by `STEP@TOLERANCE`.
const FILE: &str = "distca.json";
/// The tolerance at which it balances like we do.
const BALANCED: f64 = 0.0;
/// Those of which it may choose the best where links are slow.
const TOLERANCES: [f64; 3] = [0.0, 0.05, 0.1];
/// Slow links, in bytes a second.
pub(super) const LINKS: [f64; 2] = [12.5e9, 3e9];

/// The figures of one of its plans. There are others, which are not needed here.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Entry {
    valid: bool,
    max_over_mean: f64,
    forward_gb: f64,
    backward_gb: f64,
    busiest_mb: f64,
    busiest_backward_mb: f64,
}

/// Its plans of a folder's steps, each with its tolerance.
#[derive(Debug, Default)]
pub(super) struct Rivals(BTreeMap<String, Vec<(f64, Entry)>>);

/// Our figures over its: below one is better.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ratios {
    /// Bytes forward.
    pub(super) forward: f64,
    /// Busiest link forward.
    pub(super) busiest: f64,
    /// Busiest link backward.
    pub(super) busiest_backward: f64,
    /// Bytes forward and backward.
    pub(super) both: f64,
    /// Layer time, forward and backward, at each of [`LINKS`], over the best that it reaches there.
    pub(super) layer: [f64; 2],
}

impl Rivals {
    /// Reads the figures of a folder; there are none where the file is not.
    pub(super) fn read(folder: &Path) -> anyhow::Result<Rivals> {
        let path = folder.join(FILE);
        let text = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Rivals::default()),
            text => text.with_context(|| format!("cannot read {}", path.display()))?,
        };
        let entries: BTreeMap<String, Entry> =
            serde_json::from_slice(&text).with_context(|| format!("{} is not valid", path.display()))?;
        let mut rivals: BTreeMap<String, Vec<(f64, Entry)>> = BTreeMap::new();
        for (key, entry) in entries {
            let parts = key.rsplit_once('@').and_then(|(step, at)| Some((step, at.parse::<f64>().ok()?)));
            let (step, tolerance) =
                parts.with_context(|| format!("{}: {key:?} is not STEP@TOLERANCE", path.display()))?;
            rivals.entry(step.to_owned()).or_default().push((tolerance, entry));
        }
        Ok(Rivals(rivals))
    }

    /// The plans of a step, if there are any.
    pub(super) fn of(&self, step: &str) -> Option<&[(f64, Entry)]> {
        self.0.get(step).map(Vec::as_slice).filter(|plans| balanced(plans).is_some())
    }
}

/// Plans that our own policy makes of a problem.
pub(super) fn plans(problem: &Problem) -> anyhow::Result<Vec<(f64, Entry)>> {
    let plan = |tolerance: f64| {
        let plan = plan_by(problem, Policy::Distca { tolerance })?;
        Ok((tolerance, Entry::of(&judge(&plan, problem)?)))
    };
    TOLERANCES.into_iter().map(plan).collect()
}

/// Our plan of a step beside `plans`, and those that were told of each of [`LINKS`]. DistCA cuts by query only, so that
/// each of `lanes` equal lanes moves its part of the bytes. `None` where it moves nothing.
pub(super) fn ratios(
    plans: &[(f64, Entry)],
    ours: &Verdict,
    linked: &[Verdict; 2],
    lanes: usize,
    rates: Rates,
) -> Option<Ratios> {
    let [forward, backward] =
        balanced(plans)?.passes(ours, lanes).map(|pass| (pass.bytes as f64, pass.busiest as f64));
    let layer = [0, 1].map(|n: usize| {
        let rates = Rates { bytes_per_second: LINKS[n], ..rates };
        let seconds =
            |[forward, backward]: [PassVerdict; 2]| forward.seconds(rates) + backward.seconds(rates);
        let may = plans.iter().filter(|(at, plan)| plan.valid && TOLERANCES.contains(at));
        let best = may.map(|(_, plan)| seconds(plan.passes(ours, lanes))).reduce(f64::min);
        seconds([linked[n].forward, linked[n].backward]) / best.unwrap_or(f64::NAN)
    });
    let ratios = Ratios {
        forward: ours.forward.bytes as f64 / forward.0,
        busiest: ours.forward.busiest as f64 / forward.1,
        busiest_backward: ours.backward.busiest as f64 / backward.1,
        both: (ours.forward.bytes as f64 + ours.backward.bytes as f64) / (forward.0 + backward.0),
        layer,
    };
    let Ratios { forward, busiest, busiest_backward, both, layer: [fast, slow] } = ratios;
    let all = [forward, busiest, busiest_backward, both, fast, slow];
    all.iter().all(|ratio| ratio.is_finite()).then_some(ratios)
}

fn balanced(plans: &[(f64, Entry)]) -> Option<&Entry> {
    plans.iter().find(|(at, plan)| *at == BALANCED && plan.valid).map(|(_, plan)| plan)
}

impl Entry {
    fn of(verdict: &Verdict) -> Entry {
        let (forward, backward) = (&verdict.forward, &verdict.backward);
        Entry {
            valid: true,
            max_over_mean: verdict.max_over_mean,
            forward_gb: forward.bytes as f64 / 1e9,
            backward_gb: backward.bytes as f64 / 1e9,
            busiest_mb: forward.busiest as f64 / 1e6,
            busiest_backward_mb: backward.busiest as f64 / 1e6,
        }
    }

    /// Its passes in one of `lanes` lanes. The mean work of a step is the same in any valid plan, ours included.
    fn passes(&self, ours: &Verdict, lanes: usize) -> [PassVerdict; 2] {
        let lane = |bytes: f64| (bytes / lanes.max(1) as f64) as u64;
        let pass = |gigabytes: f64, megabytes: f64, ours_of_pass: &PassVerdict| PassVerdict {
            bytes: lane(gigabytes * 1e9),
            busiest: lane(megabytes * 1e6),
            longest: lane(megabytes * 1e6) as f64,
            flops: ours_of_pass.flops * self.max_over_mean / ours.max_over_mean,
            predicted: None,
        };
        [
            pass(self.forward_gb, self.busiest_mb, &ours.forward),
            pass(self.backward_gb, self.busiest_backward_mb, &ours.backward),
        ]
    }
}
