//! Keys that fetches of this process share: who computes for several homes of one document fetches its keys once, for as
//! long as anybody holds them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use outboard_attention::{DocumentId, Span, TensorSlice};
use outboard_proto::{KeyRange, LayerRef};
use tokio::sync::watch;

/// Above this many documents, those whose keys nobody holds any more are looked for and forgotten.
const MANY: usize = 256;

/// What parts are of: a layer's document, some kv heads, and the address of a home.
type PartOf = (LayerRef, DocumentId, Span, String);

/// The keys that fetches of this process have, or will have.
#[derive(Debug, Default)]
pub(crate) struct Parts(Mutex<HashMap<PartOf, Vec<Weak<Part>>>>);

/// Some tokens' keys, which one fetch gets.
#[derive(Debug)]
pub(crate) struct Part {
    tokens: Span,
    state: watch::Sender<State>,
}

#[derive(Clone, Debug)]
enum State {
    Coming,
    Here([TensorSlice; 2]),
    Lost,
}

/// A fetch's word that it gets a part. Others find the part for as long as this is held.
#[derive(Debug)]
pub(crate) struct Claim(Arc<Part>);

/// How a fetch gets some of the tokens that it wants of a home.
#[derive(Debug)]
pub(crate) enum Segment {
    /// By a fetch that began earlier.
    Held(Arc<Part>, Span),
    /// From the home itself.
    New(Claim),
}

impl Parts {
    /// Says how a fetch gets each of the ranges that it wants, of homes at these addresses. All at once: so a fetch waits
    /// for earlier ones alone, and never for one that waits for it.
    pub(crate) fn claim(&self, wanted: &[(KeyRange, &str)]) -> Vec<Vec<Segment>> {
        let mut parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if parts.len() > MANY {
            parts.retain(|_, held| held.iter().any(|part| part.strong_count() > 0));
        }
        let claim = |(range, address): &(KeyRange, &str)| {
            let KeyRange { layer, document, tokens, kv_heads } = range;
            let of = (layer.clone(), *document, *kv_heads, (*address).to_owned());
            let held = parts.entry(of).or_default();
            held.retain(|part| part.strong_count() > 0);
            segments(held, *tokens)
        };
        wanted.iter().map(claim).collect()
    }
}

/// Covers `tokens` by parts that are held, and claims what these leave.
fn segments(held: &mut Vec<Weak<Part>>, tokens: Span) -> Vec<Segment> {
    let mut known: Vec<Arc<Part>> = held.iter().filter_map(Weak::upgrade).collect();
    known.retain(|part| !matches!(*part.state.borrow(), State::Lost));
    let mut segments = Vec::new();
    let mut at = tokens.start();
    while at < tokens.end() {
        let here = known.iter().filter(|part| part.tokens.contains(at));
        if let Some(part) = here.max_by_key(|part| part.tokens.end()) {
            let end = part.tokens.end().min(tokens.end());
            segments.push(Segment::Held(Arc::clone(part), Span::at(at, end - at)));
            at = end;
            continue;
        }
        let next = known.iter().map(|part| part.tokens.start()).filter(|&start| start > at).min();
        let end = next.map_or(tokens.end(), |next| next.min(tokens.end()));
        let (state, _) = watch::channel(State::Coming);
        let part = Arc::new(Part { tokens: Span::at(at, end - at), state });
        held.push(Arc::downgrade(&part));
        segments.push(Segment::New(Claim(part)));
        at = end;
    }
    segments
}

impl Part {
    /// K and V of some of its tokens, once they are there; `None` when they will not come.
    pub(crate) async fn wait(&self, tokens: Span) -> Option<[TensorSlice; 2]> {
        let mut changes = self.state.subscribe();
        let state = changes.wait_for(|state| !matches!(state, State::Coming)).await.ok()?.clone();
        match state {
            State::Here([k, v]) => Some([k.with_tokens(tokens)?, v.with_tokens(tokens)?]),
            State::Coming | State::Lost => None,
        }
    }
}

impl Claim {
    pub(crate) fn tokens(&self) -> Span {
        self.0.tokens
    }

    /// Gives the part to whoever wants some of it, from K and V that hold its tokens among others.
    pub(crate) fn give(&self, k: &TensorSlice, v: &TensorSlice) {
        if let (Some(k), Some(v)) = (k.with_tokens(self.0.tokens), v.with_tokens(self.0.tokens)) {
            self.0.state.send_replace(State::Here([k, v]));
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Whoever waits for it meanwhile fetches for itself.
        self.0.state.send_if_modified(|state| {
            let coming = matches!(state, State::Coming);
            if coming {
                *state = State::Lost;
            }
            coming
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(tokens: Span) -> KeyRange {
        let layer = LayerRef { job: "job".to_owned(), step: 1, layer: 2, tick: 0 };
        KeyRange { layer, document: DocumentId { rank: 0, index: 0 }, tokens, kv_heads: Span::to(1) }
    }

    /// K and V of all tokens below 100, whose elements are their tokens.
    fn keys() -> [TensorSlice; 2] {
        let tensor = || {
            let values: Vec<f32> = (0..100).map(|x| x as f32).collect();
            TensorSlice::contiguous("keys", values, Span::to(100), 1, 1).unwrap()
        };
        [tensor(), tensor()]
    }

    proptest! {
        /// Whatever is wanted is covered in order, and no token comes twice while somebody holds it.
        #[test]
        fn tokens_are_covered_once(wanted in prop::collection::vec((0usize..90, 1usize..10, any::<bool>()), 1..12)) {
            let parts = Parts::default();
            let mut claims: Vec<Claim> = Vec::new();
            for (start, length, lost) in wanted {
                let tokens = Span::at(start, length);
                let segments = parts.claim(&[(range(tokens), "there:1")]).remove(0);
                let mut at = start;
                let mut fresh = Vec::new();
                for segment in segments {
                    let span = match &segment {
                        Segment::Held(part, span) => {
                            prop_assert!(part.tokens.covers(*span));
                            *span
                        }
                        Segment::New(claim) => claim.tokens(),
                    };
                    prop_assert!(span.start() == at && !span.is_empty());
                    at = span.end();
                    if let Segment::New(claim) = segment {
                        prop_assert!(claims.iter().all(|c| c.tokens().intersect(claim.tokens()).is_empty()));
                        fresh.push(claim);
                    }
                }
                prop_assert_eq!(at, tokens.end());
                if !lost {
                    claims.extend(fresh);
                }
            }
        }
    }

    #[tokio::test]
    async fn parts_are_given_or_lost_to_all_who_wait() {
        let parts = Parts::default();
        let claim = |tokens| parts.claim(&[(range(tokens), "there:1")]).remove(0);
        let [Segment::New(first)] = &claim(Span::to(50))[..] else { panic!("nobody has any") };
        let later = claim(Span::at(40, 20));
        let [Segment::Held(held, span), Segment::New(rest)] = &later[..] else { panic!("{later:?}") };
        assert_eq!((*span, rest.tokens()), (Span::at(40, 10), Span::at(50, 10)));
        let elsewhere = parts.claim(&[(range(Span::to(5)), "there:2")]).remove(0);
        assert!(matches!(elsewhere[..], [Segment::New(_)]), "another home's");
        let [k, v] = keys();
        let (got, ()) = tokio::join!(held.wait(*span), async { first.give(&k, &v) });
        assert_eq!(got.unwrap()[0].tokens(), *span);
        let waits = claim(Span::at(55, 5));
        let [Segment::Held(held, span)] = &waits[..] else { panic!("{waits:?}") };
        let (held, span) = (Arc::clone(held), *span);
        drop(later);
        assert!(held.wait(span).await.is_none(), "its fetch was given up");
    }
}
