//! Homes: which rank holds which tokens of documents that come without.
//!
//! Only attention connects the tokens of a document, so any rank may hold any range of it. A rank that holds rows up to some
//! token needs the keys before it that it does not hold, and a row costs as much as several keys: where late rows of long
//! documents live decides what moves. Long documents are packed into ranks like boxes into bins, by work and by tokens, and
//! cut where they do not fit ([`pack`]); [`anneal`] improves that; short documents make up the rest ([`fill`]). Where rates
//! are given, [`makespan`] places long documents by the time that ranks take.

mod anneal;
mod bin;
mod field;
mod fill;
mod makespan;
mod pack;
mod price;
mod soonest;

use std::collections::BTreeMap;

use outboard_attention::{Document, DocumentId, StepPlan};

use crate::{PlanError, Problem, Rates, plan};

use field::{Field, Homes, Setting, Sorted};
use price::{Priced, Pricing};

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
/// Exchanges for each rank that make it end soonest.
const SOONEST: usize = 1200;
/// So many drafts are planned in full where layer time counts, and the one in order: the plan will not take longer than
/// if documents had the homes that trainers give which look at no lengths.
const PLANNED: usize = 2;
/// But none that takes this many times as long as another when it is planned greedily.
const HOPEFUL: f64 = 1.3;

/// Chooses homes for the documents that have none, and plans the step. In a tick with such documents no rank holds more than
/// `1 + slack` times the mean number of tokens, or the mean rounded up. Ranks are those with a slot, those
/// below [`Problem::ranks`], and those that other documents of the tick name.
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

/// A tick's documents with homes, by the draft that is cheapest, or with rates the one whose layer takes least time.
fn best(problem: &Problem, field: &Field<'_>, documents: &[&Document]) -> Result<Vec<Document>, PlanError> {
    let pricing = Pricing { problem, field, documents };
    let mut sorted: Vec<Sorted> = Vec::new();
    for long in LONG.map(|long| field.sort(long)) {
        let same = |other: &Sorted| other.long() == long.long();
        if long.long() > 0 && !sorted.iter().any(same) {
            sorted.push(long);
        }
    }
    // Where nothing is long, documents stay whole, as far as there is space: that moves nothing by itself.
    let plain = Setting { dear: 1.0, toll: 0.0, exchanges: 0 };
    let mut drafts = vec![pricing.price(field.draft(&field.sort(f64::INFINITY), plain))?];
    drafts.extend(of_fewest_bytes(&pricing, &sorted)?);
    if let Some(rates) = problem.rates {
        for sorted in &sorted {
            drafts.push(pricing.price(field.soonest(problem, rates, sorted, SOONEST))?);
        }
    }
    drafts.sort_by(|a, b| a.price.total_cmp(&b.price));
    if let Some(rates) = problem.rates {
        drafts.truncate(PLANNED);
        drafts.push(pricing.price(field.in_order())?);
        drafts = vec![of_least_time(&pricing, rates, drafts)?];
    }
    let homes = drafts.first().map(|best| field.homes(&best.draft));
    with_homes(documents.iter().copied(), homes.unwrap_or_default())
}

/// Settings are compared, and the best ones given more time.
fn of_fewest_bytes(pricing: &Pricing<'_>, sorted: &[Sorted]) -> Result<Vec<Priced>, PlanError> {
    let attempt = |sorted: &Sorted, setting: Setting| pricing.price(pricing.field.draft(sorted, setting));
    let mut tried = Vec::new();
    for sorted in sorted {
        for dear in DEAR {
            let setting = Setting { dear, toll: TOLL, exchanges: FIRST };
            tried.push((attempt(sorted, setting)?.price, sorted, setting));
        }
    }
    tried.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut drafts = Vec::new();
    for (_, sorted, setting) in tried.into_iter().take(BEST) {
        for toll in TOLLS {
            drafts.push(attempt(sorted, Setting { toll, exchanges: LAST, ..setting })?);
        }
    }
    Ok(drafts)
}

/// The draft whose plan takes least time, of equals the first. There is at least one.
fn of_least_time(pricing: &Pricing<'_>, rates: Rates, mut drafts: Vec<Priced>) -> Result<Priced, PlanError> {
    let mut least = (f64::INFINITY, 0);
    for (n, draft) in drafts.iter().enumerate().filter(|(_, draft)| draft.seconds.is_finite()) {
        if draft.seconds <= HOPEFUL * least.0 {
            let seconds = pricing.seconds(&draft.draft, rates)?;
            if seconds < least.0 {
                least = (seconds, n);
            }
        }
    }
    Ok(drafts.swap_remove(least.1))
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
