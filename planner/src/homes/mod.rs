//! Homes: which rank holds which tokens of documents that come without.
//!
//! Only attention connects the tokens of a document, so any rank may hold any range of it. A rank that holds rows up to some
//! token needs the keys before it that it does not hold, and a row costs as much as several keys: where late rows of long
//! documents live decides what moves. Long documents are packed into ranks like boxes into bins, by work and by tokens, and
//! cut where they do not fit ([`pack`]); [`anneal`] improves that; short documents make up the rest ([`fill`]).

mod anneal;
mod bin;
mod field;
mod fill;
mod pack;

use std::collections::BTreeMap;

use outboard_attention::{Document, DocumentId, StepPlan};

use crate::plan::{Effort, Tick};
use crate::{PlanError, Problem, memory, plan, trade};

use field::{Draft, Field, Homes, Setting, Sorted};

/// A step with homes for all its documents.
#[derive(Clone, Debug, PartialEq)]
pub struct Settled {
    /// The problem's documents in its order, each with homes.
    pub documents: Vec<Document>,
    /// Their plan.
    pub plan: StepPlan,
}

/// What is tried: many kv heads make slices cheap, since heads can be given away one by one.
const LONG: [f64; 2] = [0.02, 0.05];
const DEAR: [f64; 4] = [1.0, 1.5, 2.5, 9.0];
/// Tolerances at which a layer may take least time.
const TOLERANCES: [f64; 3] = [0.05, 0.2, 0.8];
/// With a toll in between, settings are compared; the best ones are tried with each of these.
const TOLL: f64 = 0.05;
const TOLLS: [f64; 2] = [0.0, 0.1];
/// Exchanges for each rank, to compare settings and with the best ones.
const FIRST: usize = 12;
const LAST: usize = 80;
/// How many settings get the last ones.
const BEST: usize = 2;

/// Chooses homes for the documents that have none, and plans the step. In a tick with such documents no rank holds more than
/// `1 + slack` times the mean number of tokens, or the mean rounded up. Ranks are those with a slot, and those that other
/// documents of the tick name.
///
/// # Errors
/// A [`PlanError`] when the problem makes no sense, there is no rank, or homes that were given exceed the slack.
pub fn settle(problem: &Problem, slack: f64) -> Result<Settled, PlanError> {
    problem.check_all_but_homes()?;
    if !(0.0..=1.0).contains(&slack) {
        return Err(PlanError::BadSlack { slack });
    }
    let documents = place(problem, slack)?;
    let placed = Problem { documents, ..problem.clone() };
    let plan = plan(&placed)?;
    Ok(Settled { documents: placed.documents, plan })
}

fn place(problem: &Problem, slack: f64) -> Result<Vec<Document>, PlanError> {
    let mut ticks: BTreeMap<u32, Vec<&Document>> = BTreeMap::new();
    for document in &problem.documents {
        ticks.entry(document.tick()).or_default().push(document);
    }
    let mut placed: BTreeMap<DocumentId, Document> = BTreeMap::new();
    for mut documents in ticks.into_values().filter(|all| all.iter().any(|document| !document.is_placed())) {
        documents.sort_unstable_by_key(|document| document.id());
        let best = best(problem, &Field::new(problem, &documents, slack)?, &documents)?;
        placed.extend(best.into_iter().map(|document| (document.id(), document)));
    }
    let settled = problem
        .documents
        .iter()
        .map(|document| placed.remove(&document.id()).unwrap_or_else(|| document.clone()));
    Ok(settled.collect())
}

/// A tick's documents with homes: settings are compared, and the best ones given more time.
fn best(problem: &Problem, field: &Field<'_>, documents: &[&Document]) -> Result<Vec<Document>, PlanError> {
    let attempt = |sorted: &Sorted, setting: Setting| {
        let draft = field.draft(sorted, setting);
        Ok((price(problem, field, documents, &draft)?, draft))
    };
    // Where nothing is long, documents stay whole, as far as there is space: that moves nothing by itself.
    let plain = attempt(&field.sort(f64::INFINITY), Setting { dear: 1.0, toll: 0.0, exchanges: 0 })?;
    let mut sorted: Vec<Sorted> = Vec::new();
    for long in LONG.map(|long| field.sort(long)) {
        let same = |other: &Sorted| other.long() == long.long();
        if long.long() > 0 && !sorted.iter().any(same) {
            sorted.push(long);
        }
    }
    let mut tried = Vec::new();
    for sorted in &sorted {
        for dear in DEAR {
            let setting = Setting { dear, toll: TOLL, exchanges: FIRST };
            let (price, _) = attempt(sorted, setting)?;
            tried.push((price, sorted, setting));
        }
    }
    tried.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut best = plain;
    for (_, sorted, setting) in tried.iter().take(BEST) {
        for toll in TOLLS {
            let (price, draft) = attempt(sorted, Setting { toll, exchanges: LAST, ..*setting })?;
            if price < best.0 {
                best = (price, draft);
            }
        }
    }
    with_homes(documents.iter().copied(), field.homes(&best.1))
}

/// The documents, with those homes where they had none.
fn with_homes<'a>(
    documents: impl Iterator<Item = &'a Document>,
    mut homes: Homes,
) -> Result<Vec<Document>, PlanError> {
    let placed = documents.map(|document| match homes.remove(&document.id()) {
        Some(homes) => {
            document.clone().with_homes(homes).map_err(|error| PlanError::BadHomes(error.to_string()))
        }
        None => Ok(document.clone()),
    });
    placed.collect()
}

/// What a tick moves when it is balanced, in bytes of both passes, and a busy link and lasting imbalance besides. Where rates
/// are given, layer time counts more. Infinite where it does not fit the slots' memory.
fn price(
    problem: &Problem,
    field: &Field<'_>,
    documents: &[&Document],
    draft: &Draft,
) -> Result<f64, PlanError> {
    let (homes, besides) = field.what_may_move(draft, problem.profile.is_some());
    let mut some = documents.to_vec();
    some.retain(|document| document.is_placed() || homes.contains_key(&document.id()));
    let some: Vec<Document> = with_homes(some.into_iter(), homes)?;
    let some: Vec<&Document> = some.iter().collect();
    let tick = Tick::new(problem, &some).with_work_besides(&besides);
    let held = tick.hold(problem.tolerance, f64::INFINITY, Effort::Greedy);
    if memory::excess(&tick, &held).is_some() {
        return Ok(f64::INFINITY);
    }
    let (ports, traffic) = trade::traffic(&tick, &held);
    let bytes = traffic.forward.total as f64 + traffic.backward.total as f64;
    let longest = traffic.forward.longest_of(&ports) + traffic.backward.longest_of(&ports);
    // What memory keeps from moving stays where it is too much.
    let lasting = (tick.busiest_over_mean(&held) / (1.0 + 2.0 * problem.tolerance)).max(1.0);
    let price = (1.0 + bytes) * (1.0 + longest).sqrt().sqrt() * lasting * lasting * lasting * lasting;
    let Some(rates) = problem.rates else { return Ok(price) };
    let still = tick.hold(problem.tolerance, f64::INFINITY, Effort::Nothing);
    let others = TOLERANCES.iter().map(|&tolerance| tick.hold(tolerance, f64::INFINITY, Effort::Greedy));
    let all = others.chain([held, still]).map(|held| trade::seconds(&tick, rates, &held));
    let least = all.fold(f64::INFINITY, f64::min);
    // Of plans that take about as long, the one that moves less.
    Ok(least * price.sqrt().sqrt().sqrt().sqrt().sqrt())
}
