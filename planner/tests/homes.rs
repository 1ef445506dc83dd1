//! Homes that the planner chooses.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use outboard_attention::{Document, DocumentId, HomeRange, Span};
use outboard_planner::{
    PlanError, Policy, Problem, Rates, Settled, Slot, Traffic, judge, plan, plan_by, settle,
};
use proptest::prelude::*;

mod common;

use common::checks::{check_rows, check_tasks};
use common::steps::{any_problem, document, geometry, in_place};

/// The same document, whose home is still to be chosen.
fn unplaced(document: &Document) -> Document {
    let free = Document::unplaced(document.id(), document.tokens()).expect("some tokens");
    let free = free.with_tick(document.tick());
    if document.is_causal() { free } else { free.with_mask(document.mask(64)).expect("within the document") }
}

/// Settles the problem and checks what is promised of homes.
fn check(problem: &Problem, slack: f64) -> Settled {
    let settled = settle(problem, slack).expect("a sound problem");
    assert_eq!(settled, settle(problem, slack).expect("a sound problem"), "same input, same plan");
    let Settled { documents, plan } = &settled;
    let placed = Problem { documents: documents.clone(), ..problem.clone() };
    placed.check().expect("every document has homes");
    check_tasks(&placed, plan);
    check_rows(&placed, plan);
    for (before, after) in problem.documents.iter().zip(documents) {
        assert_eq!((before.id(), before.tokens(), before.tick()), (after.id(), after.tokens(), after.tick()));
        assert!(!before.is_placed() || before == after, "homes that were given stay");
        let borders = after.homes().windows(2);
        assert!(before.is_placed() || borders.into_iter().all(|pair| pair[0].rank != pair[1].rank));
    }
    check_tokens(problem, documents, slack);
    settled
}

/// In every tick, no rank holds more than the slack allows, or a token above the mean.
fn check_tokens(problem: &Problem, documents: &[Document], slack: f64) {
    let mut ticks: BTreeMap<u32, BTreeMap<u32, usize>> = BTreeMap::new();
    for (document, before) in documents.iter().zip(&problem.documents) {
        let tick = ticks.entry(document.tick()).or_default();
        for slot in problem.slots.iter().filter_map(|slot| slot.rank) {
            tick.entry(slot).or_default();
        }
        (0..problem.ranks).for_each(|rank| {
            tick.entry(rank).or_default();
        });
        let may_hold = |rank| {
            rank < problem.ranks
                || problem.slots.iter().any(|slot| slot.rank == Some(rank))
                || problem.documents.iter().flat_map(|d| d.homes()).any(|home| home.rank == rank)
        };
        for home in document.homes() {
            assert!(before.is_placed() || may_hold(home.rank), "nobody knows rank {}", home.rank);
            *tick.entry(home.rank).or_default() += home.tokens.len();
        }
    }
    let free = |tick: u32| problem.documents.iter().any(|d| d.tick() == tick && !d.is_placed());
    for (tick, ranks) in ticks.into_iter().filter(|(tick, _)| free(*tick)) {
        let mean = ranks.values().sum::<usize>() as f64 / ranks.len() as f64;
        let most = ((1.0 + slack) * mean).max(mean.ceil()) as usize;
        assert!(ranks.values().all(|&tokens| tokens <= most), "tick {tick}: {ranks:?}, at most {most}");
    }
}

/// Some of the documents without homes.
fn freed(problem: Problem, free: &[bool]) -> Problem {
    let of = |(document, free): (&Document, &bool)| if *free { unplaced(document) } else { document.clone() };
    Problem { documents: problem.documents.iter().zip(free).map(of).collect(), ..problem }
}

proptest! {
    #[test]
    fn any_step_is_settled(
        problem in any_problem(), free in prop::collection::vec(prop::bool::weighted(0.8), 12),
        slack in prop_oneof![Just(0.0), Just(0.02), 0.0f64..1.0],
    ) {
        let problem = freed(problem, &free);
        match settle(&problem, slack) {
            Ok(_) => { check(&problem, slack); }
            Err(PlanError::NoRank { document }) => {
                prop_assert!(problem.slots.iter().all(|slot| slot.rank.is_none()));
                prop_assert!(problem.documents.iter().any(|d| d.id() == document && !d.is_placed()));
            }
            Err(PlanError::PinnedTooMany { rank, tokens, most, .. }) => {
                let homes = problem.documents.iter().flat_map(|d| d.homes());
                let held: usize = homes.filter(|home| home.rank == rank).map(|home| home.tokens.len()).sum();
                prop_assert!(tokens <= held && tokens > most);
            }
            Err(error) => prop_assert!(false, "{error}"),
        }
    }

    #[test]
    fn documents_are_settled_whatever_their_lengths(
        lengths in prop::collection::vec(prop_oneof![1usize..5, 1usize..300, 300usize..60_000, Just(200_000)], 1..40),
        ranks in 1u32..9, kv_heads in prop_oneof![Just(1usize), Just(4)], rates in prop::option::of(Just(1e9)),
    ) {
        let documents = (0..).zip(&lengths).map(|(n, &tokens)| unplaced(&document(0, n, tokens)));
        let rates = rates.map(|bytes_per_second| Rates { flops_per_second: 1e13, bytes_per_second });
        let problem = Problem { rates, ..Problem::new(geometry(kv_heads), documents.collect(), in_place(ranks)) };
        let Settled { documents, .. } = check(&problem, 0.02);
        // The order of documents does not matter.
        let mut turned = problem.clone();
        turned.documents.reverse();
        let mut again = settle(&turned, 0.02).expect("a sound problem").documents;
        again.reverse();
        prop_assert_eq!(documents, again);
    }
}

/// Documents of many lengths as they come, rank after rank, and the same without homes.
fn mixed(ranks: u32, kv_heads: usize) -> (Problem, Problem) {
    let tokens = 65_536;
    let mut documents = Vec::new();
    for rank in 0..ranks {
        let long = if rank % 4 == 0 { tokens } else { 3_000 + 1_777 * rank as usize };
        documents.push(document(rank, 0, long));
        documents.extend((1..).take(((tokens - long) / 2_048).min(40)).map(|n| document(rank, n, 2_048)));
    }
    let fixed = Problem::new(geometry(kv_heads), documents, in_place(ranks));
    let free = Problem { documents: fixed.documents.iter().map(unplaced).collect(), ..fixed.clone() };
    (fixed, free)
}

#[test]
fn chosen_homes_move_much_less_than_given_ones() {
    for kv_heads in [1, 8] {
        let (fixed, free) = mixed(16, kv_heads);
        let bytes = |problem: &Problem, plan| {
            let traffic = Traffic::of(&plan, problem);
            traffic.forward.total + traffic.backward.total
        };
        let before = bytes(&fixed, plan(&fixed).expect("a plan"));
        let Settled { documents, plan } = check(&free, 0.02);
        let placed = Problem { documents, ..free };
        assert!(judge(&plan, &placed).expect("a valid plan").max_over_mean <= 1.01);
        let after = bytes(&placed, plan);
        assert!((after as f64) < 0.75 * before as f64, "{kv_heads} kv heads: {after} after {before}");
    }
}

#[test]
fn ranks_without_slots_hold_tokens_too() {
    let documents =
        (0..).zip([5_000, 300, 900, 1, 2_000]).map(|(n, tokens)| unplaced(&document(0, n, tokens)));
    let slots = vec![Slot::dedicated(), Slot::dedicated()];
    let problem = Problem::new(geometry(2), documents.collect(), slots);
    let Err(PlanError::NoRank { .. }) = settle(&problem, 0.02) else { panic!("there is no rank") };
    let Settled { documents, .. } = check(&Problem { ranks: 3, ..problem.clone() }, 0.02);
    let mut held = [0; 3];
    documents.iter().flat_map(|d| d.homes()).for_each(|home| held[home.rank as usize] += home.tokens.len());
    assert!(held.iter().all(|&tokens| tokens <= 2_789), "{held:?}");
    let Err(PlanError::TooManyRanks { .. }) = settle(&Problem { ranks: u32::MAX, ..problem }, 0.02) else {
        panic!("that many cannot be counted with")
    };
}

#[test]
fn a_document_longer_than_a_rank_spans_ranks() {
    let problem = Problem::new(geometry(2), vec![unplaced(&document(0, 0, 100_000))], in_place(4));
    let Settled { documents, .. } = check(&problem, 0.02);
    let homes = documents[0].homes();
    assert!(homes.iter().all(|home| home.tokens.start().is_multiple_of(128)), "{homes:?}");
}

#[test]
fn documents_that_have_homes_keep_them() {
    let mut documents = vec![document(0, 0, 9_000), document(1, 0, 100)];
    documents.extend((1..20).map(|n| unplaced(&document(0, n, 1_000))));
    let Settled { documents, .. } = check(&Problem::new(geometry(2), documents, in_place(3)), 0.02);
    let of_rank = |rank: u32| {
        let homes = documents.iter().skip(2).flat_map(|d| d.homes());
        homes.filter(|home| home.rank == rank).map(|home| home.tokens.len()).sum::<usize>()
    };
    // 28,100 tokens, so rank 0 has room for few besides its own. The others have equal work without parting anything.
    assert!(of_rank(0) < 1_000);
    assert!(documents.iter().filter(|d| d.homes().len() > 1).count() <= 1, "{documents:?}");
}

/// Memory that holds nothing of others keeps documents whole, if that is how they fit.
#[test]
fn homes_fit_the_slots_memory() {
    for (memory, kept) in [(0, 1), (10_000_000, 1), (100_000_000, 4)] {
        let slots: Vec<Slot> =
            (0..4).map(|rank| Slot { memory: Some(memory), ..Slot::in_place(rank) }).collect();
        let mut documents: Vec<_> = (0..8).map(|n| unplaced(&document(0, n, 10_000))).collect();
        documents.push(unplaced(&document(0, 8, 5_000)));
        for rates in [None, Some(Rates { flops_per_second: 1e13, bytes_per_second: 1e10 })] {
            let problem =
                Problem { kept, rates, ..Problem::new(geometry(2), documents.clone(), slots.clone()) };
            let Settled { documents, plan } = check(&problem, 1.0);
            let placed = Problem { documents, ..problem };
            assert!(judge(&plan, &placed).expect("a valid plan").memory <= 1.0);
        }
    }
}

/// Where links are slow, documents stay whole: a layer takes no longer than its attention on the busiest rank.
#[test]
fn slow_links_keep_documents_whole() {
    let documents: Vec<_> = (0..12).map(|n| unplaced(&document(0, n, 4_000 + 500 * n as usize))).collect();
    let rates = Rates { flops_per_second: 1e14, bytes_per_second: 1e6 };
    let problem = Problem { rates: Some(rates), ..Problem::new(geometry(2), documents, in_place(4)) };
    let Settled { documents, plan } = check(&problem, 0.5);
    let placed = Problem { documents, ..problem };
    let verdict = judge(&plan, &placed).expect("a valid plan");
    assert_eq!(verdict.forward.bytes, 0);
    assert!(verdict.max_over_mean < 1.2, "{}", verdict.max_over_mean);
}

/// The same documents on rank after rank, each up to the mean number of tokens.
fn in_order(problem: &Problem) -> Problem {
    let tokens: usize = problem.documents.iter().map(Document::tokens).sum();
    let full = tokens.div_ceil(problem.slots.len());
    let mut at = 0;
    let place = |document: &Document| {
        let (start, end) = (at, at + document.tokens());
        at = end;
        let homes = (start / full..=(end - 1) / full).map(|rank| {
            let (first, last) = (start.max(rank * full), end.min((rank + 1) * full));
            HomeRange { rank: rank as u32, tokens: Span::at(first - start, last - first) }
        });
        document.clone().with_homes(homes.collect()).expect("all tokens")
    };
    Problem { documents: problem.documents.iter().map(place).collect(), ..problem.clone() }
}

/// However slow links are, a layer takes no longer than with homes that look at no lengths.
#[test]
fn layers_take_no_longer_than_in_order() {
    let (_, free) = mixed(8, 1);
    for kv_heads in [1, 4] {
        for bytes_per_second in [1e7, 1e9, 1e10, 1e12] {
            let rates = Rates { flops_per_second: 1e14, bytes_per_second };
            let problem = Problem { rates: Some(rates), geometry: geometry(kv_heads), ..free.clone() };
            let ordered = in_order(&problem);
            let seconds = |problem: &Problem, plan| judge(&plan, problem).expect("valid").seconds(rates);
            let before = seconds(&ordered, plan(&ordered).expect("a plan"));
            let Settled { documents, plan } = check(&problem, 0.02);
            let after = seconds(&Problem { documents, ..problem }, plan);
            assert!(after <= before, "{kv_heads} kv heads, {bytes_per_second}: {after} after {before}");
        }
    }
}

/// A document that is alone too much for a rank is shared by others, as long as links carry its keys in less time.
#[test]
fn long_documents_are_shared_where_links_are_slow() {
    let lengths = [60_000].into_iter().chain(std::iter::repeat_n(2_000, 90));
    let documents: Vec<_> = (0..).zip(lengths).map(|(n, tokens)| unplaced(&document(0, n, tokens))).collect();
    let rates = Rates { flops_per_second: 1e14, bytes_per_second: 2e9 };
    let problem = Problem { rates: Some(rates), ..Problem::new(geometry(1), documents, in_place(4)) };
    let seconds = |problem: &Problem, plan| judge(&plan, problem).expect("valid").seconds(rates);
    let ordered = in_order(&problem);
    let before = seconds(&ordered, plan(&ordered).expect("a plan"));
    let Settled { documents, plan } = check(&problem, 0.02);
    let after = seconds(&Problem { documents, ..problem }, plan);
    assert!(after < 0.8 * before, "{after} after {before}");
}

#[test]
fn what_cannot_be_settled_is_refused() {
    let refused =
        |problem: &Problem, slack| settle(problem, slack).expect_err("nothing to settle").to_string();
    let free = unplaced(&document(3, 4, 100));
    for slack in [-0.1, 1.1, f64::NAN] {
        let problem = Problem::new(geometry(1), vec![free.clone()], in_place(2));
        assert_eq!(refused(&problem, slack), format!("token_slack is {slack}; it must be between 0 and 1"));
    }
    let nowhere = Problem::new(geometry(1), vec![free.clone()], vec![Slot::dedicated()]);
    assert!(refused(&nowhere, 0.02).contains("document 3.4 has no home, and there is no rank"));
    let pinned = Problem::new(geometry(1), vec![document(1, 0, 900), free.clone()], in_place(2));
    let says = refused(&pinned, 0.02);
    assert_eq!(
        says,
        "rank 1 is home of 900 tokens of tick 0 already, document 1.0 the most; it may hold 510"
    );
    let problem = Problem::new(geometry(1), vec![free], in_place(2));
    for policy in [Policy::Outboard, Policy::Fixed, Policy::Wlb] {
        let says = plan_by(&problem, policy).expect_err("no home").to_string();
        assert_eq!(says, "document 3.4 has no home; settle the step before it is planned");
    }
    let twice = vec![unplaced(&document(0, 0, 5)), unplaced(&document(0, 0, 6))];
    assert!(refused(&Problem::new(geometry(1), twice, in_place(2)), 0.02).contains("0.0 twice"));
}

#[test]
fn steps_without_anything_to_choose_are_planned_as_they_are() {
    let documents = vec![document(0, 0, 9_000), document(1, 0, 100)];
    let problem = Problem::new(geometry(2), documents.clone(), in_place(2));
    let settled = settle(&problem, 0.02).expect("a plan");
    assert_eq!((settled.documents, Ok(settled.plan)), (documents, plan(&problem)));
    let empty = HomeRange { rank: 0, tokens: Span::to(0) };
    assert!(Document::new(DocumentId { rank: 0, index: 0 }, 5, vec![empty]).is_err());
}
