//! One scenario by every policy that is compared.

use outboard_proto::describe;
use outboard_simulator::{Advice, Outcome, Policy, Trace, simulate};

use super::description::Named;

/// A scenario, with what became of it.
#[derive(Clone, Debug)]
pub(crate) struct Point {
    /// What varies, as it was written.
    pub(crate) labels: Vec<String>,
    pub(crate) named: Named,
    /// One for each policy, in the order in which they were asked for.
    pub(crate) rows: Vec<Row>,
}

/// What a policy makes of it.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) policy: Policy,
    /// Or why it cannot.
    pub(crate) result: Result<Outcome, String>,
}

impl Row {
    /// Simulates a scenario by a policy.
    pub(crate) fn of(named: &Named, policy: Policy) -> Row {
        let outcome = simulate(&named.of_policy(policy), policy);
        Row { policy, result: outcome.map_err(|error| describe(&error).to_string()) }
    }

    pub(crate) fn outcome(&self) -> Option<&Outcome> {
        self.result.as_ref().ok()
    }
}

impl Point {
    /// What policies that can do it make of it.
    pub(crate) fn outcomes(&self) -> impl Iterator<Item = &Outcome> {
        self.rows.iter().filter_map(Row::outcome)
    }

    /// The fastest of those that `fit`; of equally fast ones the first.
    pub(crate) fn best(&self, fit: impl Fn(&Outcome) -> bool) -> Option<&Outcome> {
        let fitting = self.outcomes().filter(|outcome| fit(outcome));
        fitting.min_by(|a, b| a.seconds.total_cmp(&b.seconds))
    }

    /// The fastest of all.
    pub(crate) fn fastest(&self) -> Option<&Outcome> {
        self.best(|_| true)
    }

    /// The fastest of what trainers do without attention servers; where none of that is compared, of all without them.
    pub(crate) fn baseline(&self) -> Option<&Outcome> {
        let usual = self.best(|outcome| Advice::WITHOUT.contains(&outcome.policy));
        usual.or_else(|| self.best(|outcome| !outcome.policy.disaggregates()))
    }

    /// The fastest with attention servers: our own, or else another's.
    pub(crate) fn servers(&self) -> Option<&Outcome> {
        let own =
            self.best(|outcome| matches!(outcome.policy, Policy::Outboard | Policy::OutboardFixedHomes));
        own.or_else(|| self.best(|outcome| outcome.policy.disaggregates()))
    }

    /// The fastest of the systems without attention servers that are known by their papers.
    pub(crate) fn published(&self) -> Option<&Outcome> {
        self.best(|outcome| Advice::PUBLISHED.contains(&outcome.policy))
    }

    /// By how much more tokens are trained in the same time than by the baseline, as a fraction.
    pub(crate) fn gain(&self, outcome: &Outcome) -> Option<f64> {
        self.baseline().map(|baseline| baseline.seconds / outcome.seconds - 1.0)
    }

    /// Why no policy can do it; nothing where one can.
    pub(crate) fn failure(&self) -> Option<String> {
        if self.outcomes().next().is_some() {
            return None;
        }
        let mut reasons: Vec<&str> = Vec::new();
        for row in &self.rows {
            if let Err(reason) = &row.result
                && !reasons.contains(&reason.as_str())
            {
                reasons.push(reason);
            }
        }
        Some(reasons.join("\n  "))
    }

    /// Forgets what devices did when.
    pub(crate) fn drop_traces(&mut self) {
        for row in &mut self.rows {
            if let Ok(outcome) = &mut row.result {
                outcome.trace = Trace::default();
            }
        }
    }
}
