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

use std::collections::{BTreeMap, BTreeSet};

use outboard_attention::{Document, DocumentId, StepPlan};

use crate::plan::{Effort, Tick};
use crate::{PlanError, Problem, plan, trade};

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
/// With a toll in between, settings are compared; the best ones are tried with each of these.
const TOLL: f64 = 0.05;
const TOLLS: [f64; 2] = [0.0, 0.1];
/// Exchanges for each rank, to compare settings and with the best ones.
const FIRST: usize = 12;
const LAST: usize = 80;
/// How many settings get the last ones.
const BEST: usize = 2;

/// Chooses homes for the documents that have none, and plans the step. No rank holds more than `1 + slack` times the mean
/// number of tokens of a tick. Ranks are those with a slot, and those that other documents name.
///
/// # Errors
/// A [`PlanError`] when the problem makes no sense, there is no rank, tokens cannot be spread within the slack, or homes that
/// were given exceed it.
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
    let ticks: BTreeSet<u32> =
        problem.documents.iter().filter(|d| !d.is_placed()).map(Document::tick).collect();
    let mut placed: BTreeMap<DocumentId, Document> = BTreeMap::new();
    for tick in ticks {
        let mut documents: Vec<&Document> = problem.documents.iter().filter(|d| d.tick() == tick).collect();
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
    let sorted = LONG.map(|long| field.sort(long));
    let mut tried = Vec::new();
    for sorted in &sorted {
        for dear in DEAR {
            let setting = Setting { dear, toll: TOLL, exchanges: FIRST };
            let (price, _) = attempt(sorted, setting)?;
            tried.push((price, sorted, setting));
        }
    }
    tried.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut best: Option<(f64, Draft)> = None;
    for (_, sorted, setting) in tried.iter().take(BEST) {
        for toll in TOLLS {
            let (price, draft) = attempt(sorted, Setting { toll, exchanges: LAST, ..*setting })?;
            if best.as_ref().is_none_or(|(least, _)| price < *least) {
                best = Some((price, draft));
            }
        }
    }
    let draft = best.map(|(_, draft)| draft).unwrap_or_default();
    with_homes(documents.iter().copied(), field.homes(&draft))
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

/// What a tick moves when it is balanced, in bytes of both passes, and a busy link besides. Where rates are given, layer time
/// counts more.
fn price(
    problem: &Problem,
    field: &Field<'_>,
    documents: &[&Document],
    draft: &Draft,
) -> Result<f64, PlanError> {
    let (homes, besides) = field.what_may_move(draft, problem.profile.is_some());
    let some = documents.iter().copied().filter(|d| d.is_placed() || homes.contains_key(&d.id()));
    let some: Vec<Document> = with_homes(some, homes.clone())?;
    let some: Vec<&Document> = some.iter().collect();
    let tick = Tick::new(problem, &some).with_work_besides(&besides);
    let held = tick.hold(problem.tolerance, f64::INFINITY, Effort::Greedy);
    let (ports, traffic) = trade::traffic(&tick, &held);
    let bytes = traffic.forward.total as f64 + traffic.backward.total as f64;
    let longest = traffic.forward.longest_of(&ports) + traffic.backward.longest_of(&ports);
    let price = bytes * longest.sqrt().sqrt();
    Ok(match problem.rates {
        Some(rates) => trade::seconds(&tick, rates, &held) * price.sqrt().sqrt().sqrt(),
        None => price,
    })
}
