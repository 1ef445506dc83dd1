//! Steps of kinds that the mixes do not have: each is one of theirs, changed in one way.

use anyhow::Context;
use outboard_attention::{Document, HomeRange, Mask, Span};
use outboard_planner::{Problem, Slot};

use super::mixes::{self, Draw};

/// The step that is changed: many long documents, so that much moves.
const BASE: &str = "prolong-128k-n64";
/// Keys that a row of [`Variant::Window`] sees.
const WINDOW: usize = 16 * 1024;
/// Documents from so many tokens on lie on two ranks in [`Variant::Spanning`].
const LONG: usize = 32 * 1024;
/// Servers of [`Variant::Dedicated`] that are nobody's.
const DEDICATED: usize = 16;

/// How a step is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Variant {
    /// Every other document is of the other nano-batch.
    TwoTicks,
    /// Servers of speed 1, 1.5 and 2.
    Speeds,
    /// Every other link carries a quarter.
    Links,
    /// A dedicated pool besides.
    Dedicated,
    /// Half of each long document lies on the next rank.
    Spanning,
    /// Rows see no more than so many keys.
    Window,
}

impl Variant {
    pub(super) const ALL: [Variant; 6] = [
        Variant::TwoTicks,
        Variant::Speeds,
        Variant::Links,
        Variant::Dedicated,
        Variant::Spanning,
        Variant::Window,
    ];

    pub(super) fn name(self) -> String {
        let how = match self {
            Variant::TwoTicks => "two ticks",
            Variant::Speeds => "unequal speeds",
            Variant::Links => "unequal links",
            Variant::Dedicated => "dedicated",
            Variant::Spanning => "spanning",
            Variant::Window => "window",
        };
        format!("{BASE}, {how}")
    }

    pub(super) fn problem(self) -> anyhow::Result<Problem> {
        let draw = mixes::all().into_iter().find(|draw| draw.name() == BASE);
        let Problem { geometry, documents, mut slots, .. } =
            draw.as_ref().map(Draw::problem).context(BASE)??;
        for (n, slot) in slots.iter_mut().enumerate() {
            match self {
                Variant::Speeds => slot.weight = 1.0 + 0.5 * (n % 3) as f64,
                Variant::Links if n % 2 == 1 => slot.link = 0.25,
                _ => {}
            }
        }
        let ranks = slots.len() as u32;
        if self == Variant::Dedicated {
            slots.extend(std::iter::repeat_n(Slot::dedicated(), DEDICATED));
        }
        let change = |(n, document): (usize, Document)| -> anyhow::Result<Document> {
            let tokens = document.tokens();
            Ok(match self {
                Variant::TwoTicks => document.with_tick(n as u32 % 2),
                Variant::Window => {
                    let heads = Span::to(geometry.kv_heads());
                    document.with_mask(Mask::sliding_window(tokens, WINDOW.min(tokens), heads)?)?
                }
                Variant::Spanning if tokens >= LONG => {
                    let (id, half) = (document.id(), tokens / 2);
                    let first = HomeRange { rank: id.rank, tokens: Span::to(half) };
                    let second =
                        HomeRange { rank: (id.rank + 1) % ranks, tokens: Span::at(half, tokens - half) };
                    Document::new(id, tokens, vec![first, second])?
                }
                _ => document,
            })
        };
        let documents = documents.into_iter().enumerate().map(change).collect::<anyhow::Result<_>>()?;
        Ok(Problem::new(geometry, documents, slots))
    }
}

#[cfg(test)]
mod tests {
    use outboard_planner::{judge, plan};

    use super::*;

    #[test]
    fn every_kind_is_planned_and_differs_from_the_step_that_it_was() {
        let all: Vec<Problem> = Variant::ALL.iter().map(|variant| variant.problem().unwrap()).collect();
        for (n, problem) in all.iter().enumerate() {
            assert!(all[..n].iter().all(|other| other != problem), "{}", Variant::ALL[n].name());
        }
        for (problem, variant) in all.iter().zip(Variant::ALL) {
            let verdict = judge(&plan(problem).unwrap(), problem).unwrap();
            assert!(verdict.max_over_mean < 1.01, "{}: {verdict:?}", variant.name());
        }
    }
}
