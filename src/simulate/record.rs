//! A policy's result as a record: the keys of JSON lines and the columns of CSV.

use std::fmt::Write;

use outboard_simulator::{Account, Memory, Outcome, Scenario};
use serde::ser::{Serialize, SerializeMap, Serializer};

use super::description::Named;
use super::point::{Point, Row};
use crate::page::numbers::{count, rate, seconds};

/// Keys with what they are, in order.
#[derive(Clone, Debug)]
pub(super) struct Record(Vec<(&'static str, Field)>);

#[derive(Clone, Debug)]
enum Field {
    /// Left out of JSON, and empty in CSV.
    Nothing,
    Text(String),
    Truth(bool),
    Whole(u64),
    Real(f64),
    Reals(Vec<f64>),
    /// In CSV each is a column, named by the key, a dot and its own name.
    Parts(Vec<(&'static str, Option<f64>)>),
}

impl Record {
    pub(super) fn of(point: &Point, row: &Row) -> Record {
        let outcome = row.outcome();
        let named = &point.named;
        let mut fields =
            vec![("kind", Field::text("simulation")), ("policy", Field::text(row.policy.name()))];
        fields.extend(inputs(&named.of_policy(row.policy), &named.mix));
        fields.extend(results(point, outcome, named.scenario.gpu.memory_bytes));
        let tuning = named.scenario.tuning.entries();
        fields.push((
            "tuning",
            Field::Parts(tuning.iter().map(|(name, value, _)| (*name, Some(*value))).collect()),
        ));
        fields.push(("error", row.result.as_ref().err().map_or(Field::Nothing, |error| Field::text(error))));
        Record(fields)
    }

    /// The names of the columns, a line.
    pub(super) fn header(&self) -> String {
        let mut columns = Vec::new();
        for (key, field) in &self.0 {
            match field {
                Field::Parts(parts) => columns.extend(
                    parts.iter().map(|(name, _)| quoted(&format!("{key}.{}", name.replace(' ', "_")))),
                ),
                _ => columns.push((*key).to_owned()),
            }
        }
        columns.join(",") + "\n"
    }

    /// The columns, a line.
    pub(super) fn line(&self) -> String {
        let mut line = String::new();
        for (n, (_, field)) in self.0.iter().enumerate() {
            if n > 0 {
                line.push(',');
            }
            field.column(&mut line);
        }
        line.push('\n');
        line
    }
}

/// What was simulated, as people read it.
pub(super) fn pairs(named: &Named) -> Vec<(&'static str, String)> {
    let text = |key: &str, field: Field| match field {
        Field::Whole(number) => count(number),
        Field::Real(number) if key.starts_with("link") => rate(number, "B/s"),
        Field::Real(number) if key.starts_with("latency") => seconds(number),
        Field::Real(number) if key.starts_with("peak") => rate(number, "FLOP/s"),
        other => {
            let mut text = String::new();
            other.column(&mut text);
            text
        }
    };
    inputs(&named.scenario, &named.mix).into_iter().map(|(key, field)| (key, text(key, field))).collect()
}

/// What was simulated, as the policy took it.
fn inputs(scenario: &Scenario, mix: &str) -> Vec<(&'static str, Field)> {
    let Scenario { model, gpu, network, layout, .. } = scenario;
    let whole = |n: u32| Field::Whole(u64::from(n));
    vec![
        ("model", Field::text(&model.name)),
        ("gpu", Field::text(&gpu.name)),
        ("gpus", whole(layout.gpus)),
        ("tensor", whole(layout.tensor)),
        ("pipeline", whole(layout.pipeline)),
        ("ranks", whole(layout.ranks())),
        ("dedicated", whole(layout.dedicated)),
        ("micro_batches", whole(layout.micro_batches)),
        ("context", Field::Whole(scenario.context as u64)),
        ("tokens", Field::Whole(scenario.tokens)),
        ("mix", Field::text(mix)),
        ("seed", Field::Whole(scenario.seed)),
        ("steps", whole(scenario.steps)),
        ("recompute", Field::text(scenario.recompute.name())),
        ("update", Field::Truth(scenario.update)),
        ("keep", Field::Truth(scenario.keep)),
        ("nano_batches", whole(scenario.nano_batches)),
        ("tolerance", Field::Real(scenario.tolerance)),
        ("token_room", Field::Real(scenario.token_room)),
        ("delay", whole(scenario.delay)),
        ("token_slack", Field::Real(scenario.token_slack)),
        ("peak_flops_per_second", Field::Real(gpu.peak_flops_per_second)),
        ("gpus_per_node", whole(network.gpus_per_node)),
        ("link_within", Field::Real(network.within.bytes_per_second)),
        ("link_between", Field::Real(network.between.bytes_per_second)),
        ("latency_within", Field::Real(network.within.latency_seconds)),
        ("latency_between", Field::Real(network.between.latency_seconds)),
    ]
}

/// What came of it; bytes and seconds of a step.
fn results(point: &Point, outcome: Option<&Outcome>, memory_bytes: f64) -> Vec<(&'static str, Field)> {
    let real =
        |value: fn(&Outcome) -> f64| outcome.map_or(Field::Nothing, |outcome| Field::Real(value(outcome)));
    let parts = |names: &[&'static str], values: Option<&[f64]>| -> Vec<(&'static str, Option<f64>)> {
        let value = |n: usize| values.and_then(|values| values.get(n).copied());
        names.iter().enumerate().map(|(n, name)| (*name, value(n))).collect()
    };
    let account = outcome.map(|outcome| outcome.account.parts());
    let mut memory =
        parts(&Memory::NAMES, outcome.map(|outcome| outcome.memory.parts()).as_ref().map(|p| &p[..]));
    memory.push(("total", outcome.map(|outcome| outcome.memory.total())));
    memory.push(("mean", outcome.map(|outcome| outcome.mean_memory)));
    memory.push(("available", Some(memory_bytes)));
    let carried = outcome.map(|outcome| {
        let carried = outcome.carried;
        [carried.within, carried.between, carried.most_within, carried.most_between]
    });
    let baseline = point.baseline().map(|baseline| baseline.policy.name());
    let fastest = point.fastest().map(|fastest| fastest.policy);
    let chosen =
        |value: fn(&Outcome) -> Option<u64>| outcome.and_then(value).map_or(Field::Nothing, Field::Whole);
    vec![
        ("context_parallel", chosen(|outcome| outcome.layout.context.map(u64::from))),
        ("window", chosen(|outcome| Some(outcome.window as u64))),
        ("link_share", real(|outcome| outcome.link_share)),
        ("step_seconds", real(|outcome| outcome.seconds)),
        ("tokens_per_second", real(|outcome| outcome.tokens_per_second)),
        ("mfu", real(|outcome| outcome.mfu)),
        ("imbalance", real(|outcome| outcome.imbalance)),
        ("baseline", baseline.map_or(Field::Nothing, Field::text)),
        ("gain", outcome.and_then(|outcome| point.gain(outcome)).map_or(Field::Nothing, Field::Real)),
        ("fastest", outcome.map_or(Field::Nothing, |outcome| Field::Truth(fastest == Some(outcome.policy)))),
        (
            "seconds_of_steps",
            outcome.map_or(Field::Nothing, |outcome| Field::Reals(outcome.step_seconds.clone())),
        ),
        ("account_seconds", Field::Parts(parts(&Account::NAMES, account.as_ref().map(|parts| &parts[..])))),
        ("memory_bytes", Field::Parts(memory)),
        (
            "bytes_sent",
            Field::Parts(parts(
                &["within", "between", "most_within", "most_between"],
                carried.as_ref().map(|parts| &parts[..]),
            )),
        ),
    ]
}

impl Field {
    fn text(text: &str) -> Field {
        Field::Text(text.to_owned())
    }

    fn column(&self, line: &mut String) {
        let written = match self {
            Field::Nothing => Ok(()),
            Field::Text(text) => {
                line.push_str(&quoted(text));
                Ok(())
            }
            Field::Truth(truth) => write!(line, "{truth}"),
            Field::Whole(number) => write!(line, "{number}"),
            Field::Real(number) => write!(line, "{number}"),
            Field::Reals(numbers) => {
                let numbers: Vec<String> = numbers.iter().map(f64::to_string).collect();
                write!(line, "{}", numbers.join(" "))
            }
            Field::Parts(parts) => {
                let numbers: Vec<String> = parts
                    .iter()
                    .map(|(_, part)| part.map_or_else(String::new, |part| part.to_string()))
                    .collect();
                write!(line, "{}", numbers.join(","))
            }
        };
        debug_assert!(written.is_ok(), "a string takes whatever is written");
    }

    /// Whether JSON has it.
    fn is_there(&self) -> bool {
        match self {
            Field::Nothing => false,
            Field::Parts(parts) => parts.iter().any(|(_, part)| part.is_some()),
            _ => true,
        }
    }
}

/// Text as a column of CSV.
fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

impl Serialize for Record {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (key, field) in self.0.iter().filter(|(_, field)| field.is_there()) {
            map.serialize_entry(key, field)?;
        }
        map.end()
    }
}

impl Serialize for Field {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Field::Nothing => serializer.serialize_none(),
            Field::Text(text) => serializer.serialize_str(text),
            Field::Truth(truth) => serializer.serialize_bool(*truth),
            Field::Whole(number) => serializer.serialize_u64(*number),
            Field::Real(number) => serializer.serialize_f64(*number),
            Field::Reals(numbers) => numbers.serialize(serializer),
            Field::Parts(parts) => {
                let mut map = serializer.serialize_map(None)?;
                for (name, part) in parts {
                    if let Some(part) = part {
                        map.serialize_entry(&name.replace(' ', "_"), part)?;
                    }
                }
                map.end()
            }
        }
    }
}
