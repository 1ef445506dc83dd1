//! How long a layer of a plan takes, roughly: whether its bytes are hidden.

use outboard_attention::StepPlan;
use outboard_planner::{Loads, Problem, Rates, Times, Traffic};

use crate::setting::Setting;

/// Seconds of one layer, both passes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Core attention of the busiest server.
    attention: f64,
    /// Everything else of the rank with most tokens.
    dense: f64,
    /// Bytes of the busiest link.
    carried: f64,
}

impl Pace {
    /// Of a plan, where no rank holds more than `tokens` tokens.
    pub(super) fn of(setting: &Setting<'_>, problem: &Problem, plan: &StepPlan, tokens: f64) -> Pace {
        let [forward, backward] = Times::planned(plan, problem, &setting.scenario.gpu.profile).busiest();
        let traffic = Traffic::of(plan, problem);
        let again = if setting.scenario.keep { 0 } else { traffic.forward.busiest };
        let bytes = (traffic.forward.busiest + traffic.backward.busiest + again) as f64;
        Pace {
            attention: (forward + backward) / setting.scenario.tuning.attention_efficiency,
            dense: setting.token_seconds() * tokens,
            carried: bytes / link(setting),
        }
    }

    /// The longer of computing and carrying.
    pub(super) fn seconds(&self) -> f64 {
        self.carried.max(self.attention + self.dense)
    }

    /// Rates to plan with where bytes are not hidden. Links carry while the rest of the layer is computed too, so they count
    /// for as much faster.
    pub(super) fn rates(&self, setting: &Setting<'_>, problem: &Problem, plan: &StepPlan) -> Option<Rates> {
        if self.carried <= self.attention + self.dense || self.attention <= 0.0 {
            return None;
        }
        let loads = Loads::planned(plan, &problem.documents, &problem.geometry).totals();
        let most = loads.into_iter().max().unwrap_or(0);
        let flops = problem.geometry.forward_flops(most) + problem.geometry.backward_flops(most);
        let bytes_per_second = link(setting) * (1.0 + self.dense / self.attention).min(1e3);
        (flops > 0.0).then(|| Rates { flops_per_second: flops / self.attention, bytes_per_second })
    }
}

/// Bytes a second that a plan counts on of the links that most bytes take.
fn link(setting: &Setting<'_>) -> f64 {
    let link = usize::from(setting.devices() > setting.closing.devices_per_node);
    setting.links.bytes_per_second[link] * setting.link_share
}
