//! Steps whose homes are taken away and chosen anew.

use anyhow::Context;
use outboard_attention::Document;
use outboard_planner::{Problem, Rates, Settled, Verdict, judge, settle};

use super::{Plans, linked, timed};
use crate::holdings::Holdings;

/// Ranks hold at most so much more than the mean number of tokens.
const SLACK: f64 = 0.02;

/// What homes were chosen, and what that is worth beside our plan with the step's own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chosen {
    /// The most tokens of a rank over the mean.
    pub(super) tokens_over_mean: f64,
    /// Documents that lie on several ranks.
    pub(super) split: usize,
    /// Forward and backward bytes over those with its own homes.
    pub(super) both_to_own: f64,
    /// Layer time at each of [`super::rival::LINKS`] over that with its own homes.
    pub(super) layer_to_own: [f64; 2],
}

/// Chooses homes and plans, as [`super::own_homes`] does with those that a step has, and compares with that.
pub(super) fn free_homes(problem: &Problem, rates: Rates, repeats: u32) -> anyhow::Result<(Plans, Chosen)> {
    let own = super::own_homes(problem, rates, 1).context("with the step's own homes")?;
    let freed = freed(problem)?;
    let (verdict, seconds, holdings) = measure(&freed, repeats)?;
    let linked = linked(&freed, rates, |problem| Ok(measure(problem, 1)?.0))?;
    let plans = Plans { verdict, linked, seconds };
    let both = |plans: &Plans| (plans.verdict.forward.bytes + plans.verdict.backward.bytes) as f64;
    let [fast, slow] =
        [0, 1].map(|link| over(plans.layer_seconds(link, rates), own.layer_seconds(link, rates)));
    let chosen = Chosen {
        tokens_over_mean: holdings.max_over_mean(),
        split: holdings.split,
        both_to_own: over(both(&plans), both(&own)),
        layer_to_own: [fast, slow],
    };
    Ok((plans, chosen))
}

/// A step that moves nothing either way is as good, and one that need not have moved anything infinitely worse.
fn over(ours: f64, own: f64) -> f64 {
    if ours == own { 1.0 } else { ours / own }
}

/// Settles a step `repeats` times, which only takes time, and judges the plan.
fn measure(problem: &Problem, repeats: u32) -> anyhow::Result<(Verdict, f64, Holdings)> {
    let (Settled { documents, plan }, seconds) = timed(repeats, || settle(problem, SLACK))?;
    let placed = Problem { documents, ..problem.clone() };
    let verdict = judge(&plan, &placed).context("the plan is not valid")?;
    Ok((verdict, seconds, Holdings::of(&placed.documents, &placed.slots)))
}

/// The step without homes.
fn freed(problem: &Problem) -> anyhow::Result<Problem> {
    let free = |document: &Document| {
        let free = Document::unplaced(document.id(), document.tokens())?.with_tick(document.tick());
        match document.is_causal() {
            true => Ok(free),
            false => free.with_mask(document.mask(problem.geometry.kv_heads())),
        }
    };
    let documents = problem.documents.iter().map(free).collect::<Result<_, _>>()?;
    Ok(Problem { documents, ..problem.clone() })
}

#[cfg(test)]
mod tests {
    use super::super::mixes;
    use super::super::variants::Variant;
    use super::*;

    #[test]
    fn only_homes_are_taken_away() {
        for variant in [Variant::TwoTicks, Variant::Window, Variant::Spanning] {
            let problem = variant.problem().unwrap();
            let freed = freed(&problem).unwrap();
            for (free, document) in freed.documents.iter().zip(&problem.documents) {
                assert!(!free.is_placed());
                let again = free.clone().with_homes(document.homes().to_vec()).unwrap();
                assert_eq!(&again, document);
            }
            assert_eq!(Problem { documents: problem.documents.clone(), ..freed }, problem);
        }
    }

    #[test]
    fn chosen_homes_are_within_the_slack_and_move_less() {
        let draw = mixes::all().into_iter().find(|draw| draw.name() == "prolong-128k-n8").unwrap();
        let (plans, chosen) = free_homes(&draw.problem().unwrap(), Rates::default(), 1).unwrap();
        assert!(plans.verdict.max_over_mean <= 1.01, "{plans:?}");
        assert!((1.0..=1.0 + SLACK).contains(&chosen.tokens_over_mean), "{chosen:?}");
        assert!(
            chosen.both_to_own < 1.0 && chosen.layer_to_own.iter().all(|layer| *layer > 0.0),
            "{chosen:?}"
        );
    }

    #[test]
    fn nothing_moved_is_as_good_as_nothing() {
        assert_eq!([over(0.0, 0.0), over(1.0, 2.0)], [1.0, 0.5]);
        assert!(over(1.0, 0.0) > f64::MAX);
    }
}
