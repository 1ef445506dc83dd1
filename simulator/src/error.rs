//! What cannot be simulated, and why.

use outboard_planner::PlanError;

/// Why there is no simulation. Each names the entry that is at fault.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SimulationError {
    /// A number that makes no sense.
    #[error("{field} is {value}; it must be from {least} to {most}")]
    OutOfRange {
        /// The entry.
        field: String,
        /// What it is.
        value: f64,
        /// The least it may be.
        least: f64,
        /// The most it may be.
        most: f64,
    },
    /// A name that nothing has.
    #[error("no {what} is called `{name}`; there are {known}{}", nearest(.near))]
    Unknown {
        /// What was to be named.
        what: &'static str,
        /// The name.
        name: String,
        /// All names.
        known: String,
        /// The known one that is most like it.
        near: Option<String>,
    },
    /// Heads that do not divide among the lanes of tensor parallelism.
    #[error("layout.tensor is {tensor}, which does not divide the {heads} {what} heads of {model}")]
    UnevenHeads {
        /// The model.
        model: String,
        /// Query or kv.
        what: &'static str,
        /// How many there are.
        heads: u32,
        /// Lanes.
        tensor: u32,
    },
    /// Heads that make no geometry.
    #[error("model: {0}")]
    Heads(String),
    /// A profile with a hole where the model is.
    #[error("profile: {0}")]
    Profile(String),
    /// A layout that does not multiply out.
    #[error("layout: {0}")]
    Layout(String),
    /// Lengths of documents that make no sense for the step.
    #[error("documents: {0}")]
    Documents(String),
    /// A step that a GPU's memory does not hold.
    #[error(
        "{policy} needs {:.1} GB of the {:.1} GB of each {gpu}, {:.1} GB too much; the largest part is {part}, {:.1} GB",
        .needed / 1e9, .available / 1e9, (.needed - .available) / 1e9, .part_bytes / 1e9
    )]
    Memory {
        /// How attention is shared.
        policy: String,
        /// The GPU.
        gpu: String,
        /// Bytes of the GPU that needs most.
        needed: f64,
        /// Bytes it has.
        available: f64,
        /// What takes most of them.
        part: &'static str,
        /// How many that are.
        part_bytes: f64,
    },
    /// A policy that has no answer for the layout.
    #[error("{policy} is not defined for {what}")]
    Unsuited {
        /// How attention is shared.
        policy: String,
        /// What it has no notion of.
        what: String,
    },
    /// The planner has no plan.
    #[error("planning attention by {policy}")]
    Plan {
        /// How attention is shared.
        policy: String,
        /// Why.
        #[source]
        source: PlanError,
    },
    /// A plan that computes more or less than was asked for.
    #[error("the plan of {policy} is no answer to its step: {what}")]
    BadPlan {
        /// How attention is shared.
        policy: String,
        /// The fault.
        what: String,
    },
}

impl SimulationError {
    /// A name of `known` was to be given, and `name` is none.
    pub fn unknown(what: &'static str, name: &str, known: &[&str]) -> SimulationError {
        // Who leaves a word out writes the start of the name, or else letters are wrong.
        let started = |known: &&&str| known.starts_with(name) && 2 * name.len() > known.len();
        let near = known.iter().filter(started).min_by_key(|known| known.len()).copied();
        let near = near.or_else(|| {
            let nearest = known.iter().map(|known| (distance(name, known), *known)).min();
            nearest.filter(|(edits, known)| *edits <= known.len().div_ceil(2)).map(|(_, known)| known)
        });
        SimulationError::Unknown {
            what,
            name: name.to_owned(),
            known: known.join(", "),
            near: near.map(str::to_owned),
        }
    }
}

fn nearest(near: &Option<String>) -> String {
    near.as_ref().map_or_else(String::new, |near| format!("; did you mean `{near}`?"))
}

/// Letters to insert, leave out or replace to make one of the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = corner + usize::from(!from.eq_ignore_ascii_case(to));
            corner = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(corner + 1);
        }
    }
    row[b.len()]
}

/// Checks that a number is finite and within bounds.
pub(crate) fn in_range(field: &str, value: f64, least: f64, most: f64) -> Result<(), SimulationError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(SimulationError::OutOfRange { field: field.to_owned(), value, least, most })
}

/// Checks that a rate or size is above zero, and no larger than anything real.
pub(crate) fn positive(field: &str, value: f64) -> Result<(), SimulationError> {
    in_range(field, value, 1e-9, 1e21)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_comes_with_the_nearest_known_one() {
        let error = SimulationError::unknown("model", "lama-8b", &["llama-8b", "llama-70b"]);
        assert_eq!(
            error.to_string(),
            "no model is called `lama-8b`; there are llama-8b, llama-70b; did you mean `llama-8b`?"
        );
        let error = SimulationError::unknown("entry", "context", &["contort", "context_parallel"]);
        assert!(error.to_string().ends_with("did you mean `contort`?"), "{error}: less than half of a name");
        let error = SimulationError::unknown("entry", "at.context", &["at.contort", "at.context_parallel"]);
        assert!(error.to_string().ends_with("did you mean `at.context_parallel`?"), "{error}");
        let error = SimulationError::unknown("gpu", "abacus", &["h100", "h200"]);
        assert_eq!(error.to_string(), "no gpu is called `abacus`; there are h100, h200");
    }
}
