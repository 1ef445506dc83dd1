//! What the plans of every policy must hold, and what each of them is.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use outboard_attention::{BandSlice, Document, DocumentId, Mask, MaskPart, PlannedTask, Span, StepPlan};
use outboard_planner::{DISTCA_TOLERANCE, Loads, PlanError, Policy, Problem, Slot, Traffic, plan, plan_by};
use proptest::prelude::*;

mod common;

use common::checks::check_tasks;
use common::steps::{POLICIES, any_problem, document, geometry, in_place, spanning};

/// Plans the problem and checks everything that holds for all policies.
fn check(problem: &Problem, policy: Policy) -> StepPlan {
    let plan = plan_by(problem, policy).expect("a sound problem");
    check_tasks(problem, &plan);
    plan
}

fn check_all(problem: &Problem) {
    for policy in POLICIES {
        check(problem, policy);
    }
}

/// The tasks of one document, rows ascending.
fn tasks_of(plan: &StepPlan, document: DocumentId) -> Vec<PlannedTask> {
    let mut tasks: Vec<PlannedTask> =
        plan.tasks().map(|(_, task)| *task).filter(|task| task.document == document).collect();
    tasks.sort_by_key(|task| (task.q, task.kv_heads));
    tasks
}

/// Cells over weight of the slot with the most, over that of a perfect balance.
fn max_over_mean(problem: &Problem, plan: &StepPlan) -> f64 {
    let loads = Loads::planned(plan, &problem.documents, &problem.geometry);
    loads.max_over_mean_by(|slot| problem.slots[slot].weight)
}

proptest! {
    #[test]
    fn any_step_is_planned_by_any_policy(problem in any_problem()) {
        let mut turned = problem.clone();
        turned.documents.reverse();
        for policy in POLICIES {
            let plan = check(&problem, policy);
            prop_assert_eq!(&plan_by(&problem, policy).expect("as before"), &plan, "{} twice", policy);
            prop_assert_eq!(&plan_by(&turned, policy).expect("as before"), &plan, "{} in another order", policy);
        }
    }

    #[test]
    fn fixed_leaves_rows_at_home(problem in any_problem()) {
        let plan = check(&problem, Policy::Fixed);
        let by_id: BTreeMap<DocumentId, &Document> = problem.documents.iter().map(|d| (d.id(), d)).collect();
        for (_, task) in plan.tasks() {
            let mut homes = by_id[&task.document].homes().iter().filter(|home| home.tokens.meets(task.q));
            let slot = problem.slots[task.slot as usize].rank;
            prop_assert!(homes.all(|home| {
                slot == Some(home.rank) || problem.slots.iter().all(|slot| slot.rank != Some(home.rank))
            }), "{task:?}");
        }
    }

    #[test]
    fn wlb_cuts_nothing(problem in any_problem()) {
        let plan = check(&problem, Policy::Wlb);
        for document in &problem.documents {
            let tasks = tasks_of(&plan, document.id());
            let slots: BTreeSet<u32> = tasks.iter().map(|task| task.slot).collect();
            prop_assert!(slots.len() <= 1, "{tasks:?}");
            let apart = |pair: &[PlannedTask]| !pair[0].kv_heads.meets(pair[1].kv_heads);
            prop_assert!(tasks.windows(2).all(apart), "a document is cut by its heads' masks alone: {tasks:?}");
        }
    }

    #[test]
    fn cp_gives_each_slot_two_chunks(problem in any_problem()) {
        let plan = check(&problem, Policy::Cp);
        let slots = problem.slots.len();
        for document in &problem.documents {
            let (tokens, tasks) = (document.tokens(), tasks_of(&plan, document.id()));
            if tokens < 2 * slots {
                prop_assert!(tasks.iter().all(|task| task.slot == tasks[0].slot), "{tasks:?}");
                continue;
            }
            for task in tasks {
                for row in [task.q.start(), task.q.end() - 1] {
                    // Chunk n starts at row floor(n * tokens / chunks), so it holds the rows up to the next start.
                    let chunk = ((row + 1) * 2 * slots).div_ceil(tokens) - 1;
                    prop_assert_eq!(chunk.min(2 * slots - 1 - chunk), task.slot as usize, "row {}", row);
                }
            }
        }
    }

    #[test]
    fn distca_keeps_heads_together(problem in any_problem(), tolerance in 0.0f64..=1.0) {
        let plan = check(&problem, Policy::Distca { tolerance });
        for document in problem.documents.iter().filter(|document| document.is_causal()) {
            let tasks = tasks_of(&plan, document.id());
            let all = Span::to(problem.geometry.kv_heads());
            prop_assert!(tasks.iter().all(|t| t.kv_heads == all && t.kv == Span::to(t.q.end())), "{tasks:?}");
        }
    }
}

#[test]
fn names_are_read_and_printed() {
    for name in Policy::NAMES {
        assert_eq!(name.parse::<Policy>().expect("a policy").to_string(), name);
    }
    assert_eq!("distca".parse(), Ok(Policy::Distca { tolerance: DISTCA_TOLERANCE }));
    assert_eq!(Policy::default(), Policy::Outboard);
    let unknown = "best".parse::<Policy>().expect_err("no such policy").to_string();
    assert_eq!(unknown, "no policy is called `best`; there are outboard, fixed, wlb, cp, distca");
}

#[test]
fn outboard_is_the_planner() {
    let documents = (0..4).map(|rank| document(rank, 0, 9000 * (rank as usize + 1))).collect();
    let problem = Problem { tolerance: 0.03, ..Problem::new(geometry(2), documents, in_place(4)) };
    assert_eq!(plan_by(&problem, Policy::Outboard), plan(&problem));
}

#[test]
fn steps_at_the_edges_are_planned() {
    for kv_heads in [1, 8] {
        for tokens in [1, 2, 3, 5, 17, 1001] {
            for slots in [1, 2, 3, 64] {
                let odd = vec![document(0, 0, tokens), document(0, 1, 1)];
                check_all(&Problem::new(geometry(kv_heads), odd.clone(), in_place(slots)));
                check_all(&Problem::new(geometry(kv_heads), odd, vec![Slot::dedicated(); slots as usize]));
                let homes = [(0, tokens), (1, 7), (0, 2 * tokens), (2, 1), (0, 3)];
                check_all(&Problem::new(geometry(kv_heads), vec![spanning(1, 0, &homes)], in_place(slots)));
            }
        }
    }
    check_all(&Problem::new(geometry(1), (0..300).map(|n| document(0, n, 1)).collect(), in_place(4)));
    check_all(&Problem::new(geometry(1), Vec::new(), in_place(2)));
    let blind = document(0, 0, 10).with_mask(Mask::default()).expect("an empty mask");
    check_all(&Problem::new(geometry(1), vec![blind], in_place(2)));
}

#[test]
fn rows_without_a_slot_go_whole_to_the_lightest() {
    // Ranks 2 and 3 have no slot; slot 1 is three times as fast.
    let slots = vec![Slot::in_place(0), Slot { weight: 3.0, ..Slot::in_place(1) }];
    let documents = vec![document(0, 0, 1000), document(1, 0, 1000), spanning(2, 0, &[(2, 300), (3, 300)])];
    let problem = Problem::new(geometry(2), documents, slots);
    let plan = check(&problem, Policy::Fixed);
    let tasks: Vec<(Span, u32)> = plan.tasks().map(|(_, task)| (task.q, task.slot)).collect();
    assert_eq!(tasks, [(Span::to(1000), 0), (Span::to(1000), 1), (Span::to(600), 1)]);
}

#[test]
fn wlb_packs_the_longest_first() {
    let lengths = [1000, 900, 800, 700];
    let documents = (0..4).map(|n| document(0, n, lengths[n as usize])).collect();
    let problem = Problem::new(geometry(2), documents, in_place(2));
    let plan = check(&problem, Policy::Wlb);
    // 1000 at home, 900 and 800 to the other, which then has more.
    assert_eq!(plan.tasks().map(|(_, task)| task.slot).collect::<Vec<_>>(), [0, 1, 1, 0]);
}

#[test]
fn wlb_leaves_one_of_equal_documents_where_it_lives() {
    let documents = (0..4).map(|rank| document(rank, 0, 4096)).collect();
    let problem = Problem::new(geometry(2), documents, in_place(4));
    let plan = check(&problem, Policy::Wlb);
    assert_eq!(Traffic::of(&plan, &problem).forward.total, 0);
}

#[test]
fn cp_balances_causal_documents() {
    let documents = (0..8).map(|rank| document(rank, 0, 20_001 * (rank as usize + 1))).collect();
    let problem = Problem::new(geometry(2), documents, in_place(8));
    let plan = check(&problem, Policy::Cp);
    let balance = max_over_mean(&problem, &plan);
    assert!(balance < 1.001, "{balance}");
    let slot_0: Vec<Span> = tasks_of(&plan, DocumentId { rank: 7, index: 0 })
        .iter()
        .filter(|task| task.slot == 0)
        .map(|task| task.q)
        .collect();
    assert_eq!(slot_0, [Span::to(10_000), Span::new(150_007, 160_008).expect("the tail")]);
}

#[test]
fn distca_cuts_the_inner_edges_of_head_and_tail() {
    // 1000 rows hold 500 pairs of 1001 cells; the other slot has none, so 250 pairs move.
    let problem = Problem::new(geometry(2), vec![document(0, 0, 1000)], in_place(2));
    let plan = check(&problem, Policy::Distca { tolerance: 0.0 });
    let tasks: Vec<(usize, usize, u32)> = tasks_of(&plan, DocumentId { rank: 0, index: 0 })
        .iter()
        .map(|task| (task.q.start(), task.q.end(), task.slot))
        .collect();
    assert_eq!(tasks, [(0, 250, 0), (250, 500, 1), (500, 750, 1), (750, 1000, 0)]);
}

#[test]
fn distca_balances_odd_lengths_weights_and_masks() {
    let window = BandSlice::new(Span::to(90_001), Span::to(90_001), Some(-4096), Some(0)).expect("a window");
    let window = Mask::new(vec![MaskPart { kv_heads: Span::to(2), slice: window }]).expect("one slice");
    let masked = document(1, 0, 90_001).with_mask(window).expect("within the document");
    let documents = vec![document(0, 0, 70_001), masked, document(2, 0, 9_999)];
    let slot = |rank: u32| Slot { weight: f64::from(rank + 1), ..Slot::in_place(rank) };
    let problem = Problem::new(geometry(2), documents, (0..4).map(slot).collect());
    let plan = check(&problem, Policy::Distca { tolerance: 0.0 });
    let balance = max_over_mean(&problem, &plan);
    assert!(balance < 1.001, "{balance}");
}

#[test]
fn distca_moves_less_for_more_tolerance() {
    let documents: Vec<_> = (0..8).map(|rank| document(rank, 0, 15_001 * (rank as usize + 1))).collect();
    let problem = Problem::new(geometry(4), documents, in_place(8));
    let moved = |tolerance| {
        let plan = check(&problem, Policy::Distca { tolerance });
        Traffic::of(&plan, &problem).forward.total
    };
    let totals = [0.0, 0.05, 0.1, 0.2, 0.5, 0.9, 1.0].map(moved);
    assert!(totals.is_sorted_by(|a, b| a >= b), "{totals:?}");
    assert!(totals[0] > totals[6] && totals[6] == 0, "{totals:?}");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let problem = Problem::new(geometry(1), vec![document(0, 0, 100)], Vec::new());
    for policy in POLICIES {
        assert_eq!(plan_by(&problem, policy), Err(PlanError::NoSlots), "{policy}");
    }
    let problem = Problem { slots: in_place(2), ..problem };
    for tolerance in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        let refused = plan_by(&problem, Policy::Distca { tolerance }).expect_err("no sound tolerance");
        assert!(refused.to_string().starts_with("tolerance is"), "{refused}");
    }
}
