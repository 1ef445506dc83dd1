//! Which rank holds which tokens of documents that are computed together.

use outboard_attention::{Document, DocumentId, HomeRange, Span};
use outboard_planner::{PlanError, Problem, Settled, Slot, settle};

use super::Policy;
use super::pace::Pace;
use crate::setting::Setting;

/// Documents that are computed together, with the tokens that each rank holds of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Group {
    /// Homes are ranks, whatever the stage.
    pub(super) documents: Vec<Document>,
    /// Of each rank.
    pub(super) tokens: Vec<u64>,
}

/// Documents with homes: chosen by the planner, or in order, as many tokens on each rank as on any other.
pub(super) fn placed(setting: &Setting<'_>, policy: Policy, lengths: &[usize]) -> Result<Group, PlanError> {
    let documents =
        if policy == Policy::Outboard { chosen(setting, lengths) } else { in_order(setting, lengths) }?;
    let mut tokens = vec![0; setting.ranks()];
    for home in documents.iter().flat_map(Document::homes) {
        if let Some(tokens) = tokens.get_mut(home.rank as usize) {
            *tokens += home.tokens.len() as u64;
        }
    }
    Ok(Group { documents, tokens })
}

/// Servers on the devices of the model, or dedicated ones.
pub(super) fn slots(setting: &Setting<'_>, model: usize) -> Vec<Slot> {
    let servers = setting.devices() - setting.layout.model_devices() as usize;
    if servers > 0 {
        vec![Slot::dedicated(); servers]
    } else {
        (0..model as u32).map(Slot::in_place).collect()
    }
}

/// The homes that move the fewest bytes; where these are not hidden, those for the least time, if that is sooner done.
fn chosen(setting: &Setting<'_>, lengths: &[usize]) -> Result<Vec<Document>, PlanError> {
    let ranks = setting.ranks();
    let documents = ids().zip(lengths).map(|(id, &tokens)| Document::unplaced(id, tokens));
    let documents = documents.collect::<Result<Vec<Document>, _>>().map_err(bad)?;
    let problem = Problem::new(setting.heads, documents, slots(setting, ranks));
    let problem = Problem { ranks: ranks as u32, ..problem };
    let slack = setting.scenario.token_slack;
    let most = lengths.iter().sum::<usize>() as f64 / ranks as f64 * (1.0 + slack);
    let placed = |settled: &Settled| Problem { documents: settled.documents.clone(), ..problem.clone() };
    let pace = |settled: &Settled| Pace::of(setting, &placed(settled), &settled.plan, most);
    let settled = settle(&problem, slack)?;
    let Some(rates) = pace(&settled).rates(setting, &placed(&settled), &settled.plan) else {
        return Ok(settled.documents);
    };
    let bounded = settle(&Problem { rates: Some(rates), ..problem.clone() }, slack)?;
    let is_sooner = pace(&bounded).seconds() < pace(&settled).seconds();
    Ok(if is_sooner { bounded } else { settled }.documents)
}

fn in_order(setting: &Setting<'_>, lengths: &[usize]) -> Result<Vec<Document>, PlanError> {
    let ranks = setting.ranks();
    let total: usize = lengths.iter().sum();
    let border = |rank: usize| (total as u128 * rank as u128 / ranks as u128) as usize;
    let (mut at, mut rank) = (0, 0);
    let mut documents = Vec::with_capacity(lengths.len());
    for (id, &tokens) in ids().zip(lengths) {
        let first = at;
        let mut homes = Vec::new();
        while at < first + tokens {
            while border(rank + 1) <= at {
                rank += 1;
            }
            let until = border(rank + 1).min(first + tokens);
            homes.push(HomeRange { rank: rank as u32, tokens: Span::at(at - first, until - at) });
            at = until;
        }
        documents.push(Document::new(id, tokens, homes).map_err(bad)?);
    }
    Ok(documents)
}

fn ids() -> impl Iterator<Item = DocumentId> {
    (0u32..).map(|index| DocumentId { rank: 0, index })
}

fn bad(error: outboard_attention::InvalidAttention) -> PlanError {
    PlanError::BadHomes(error.to_string())
}
