//! What every plan must hold, on random steps.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use outboard_attention::{BandSlice, Document, DocumentId, Mask, MaskPart, PlannedTask, Span, StepPlan};
use outboard_planner::{Loads, PlanError, Policy, Problem, Rates, Slot, Traffic, judge, plan, plan_by};
use proptest::prelude::*;

mod common;

use common::checks::{check_rows, check_tasks};
use common::steps::{any_problem, document, geometry, in_place, spanning};

/// Plans the problem and checks everything that the crate guarantees.
fn check(problem: &Problem) -> StepPlan {
    let plan = plan(problem).expect("a sound problem");
    check_tasks(problem, &plan);
    check_rows(problem, &plan);
    check_balance(problem, &plan, 2.0 * problem.tolerance);
    check_pieces(problem, &plan);
    plan
}

/// In every tick no slot is above its share by more than the tolerance or one block of rows.
fn check_balance(problem: &Problem, plan: &StepPlan, tolerance: f64) {
    let Problem { geometry, documents, slots, .. } = problem;
    let loads = Loads::planned(plan, documents, geometry);
    let weights: f64 = slots.iter().map(|slot| slot.weight).sum();
    for (tick, cells) in plan.ticks.iter().zip(&loads.ticks) {
        let here = documents.iter().filter(|d| d.tick() == tick.tick);
        let block = here.map(|d| heaviest_block(d, geometry.kv_heads())).max().unwrap_or(0) as f64;
        let total: f64 = cells.iter().map(|&c| c as f64).sum();
        for (n, &cells) in cells.iter().enumerate() {
            let share = total * slots[n].weight / weights;
            let most = (share * (1.0 + tolerance)).max(share + block);
            assert!(
                cells as f64 <= most,
                "slot {n} holds {cells} cells, its share is {share}, a block {block}"
            );
        }
    }
}

/// The most cells of 128 rows of one kv head.
fn heaviest_block(document: &Document, kv_heads: usize) -> u64 {
    let mask = document.mask(kv_heads);
    let rows = |i: usize| Span::at(i, 128);
    let head = |h: usize| (0..document.tokens()).step_by(128).map(move |i| (rows(i), h));
    let cells = |(q, h)| mask.clip(q, Span::to(document.tokens()), Span::at(h, 1)).cells();
    (0..kv_heads).flat_map(head).map(cells).max().unwrap_or(0)
}

/// Every slot has 8 pieces, none above a quarter, unless 512 rows of one kv head are all its work.
fn check_pieces(problem: &Problem, plan: &StepPlan) {
    let by_id: BTreeMap<DocumentId, &Document> = problem.documents.iter().map(|d| (d.id(), d)).collect();
    for tick in &plan.ticks {
        for slot in 0..plan.slots {
            let tasks: Vec<&PlannedTask> = tick.tasks.iter().filter(|t| t.slot == slot).collect();
            let mask = |t: &PlannedTask| {
                by_id[&t.document].mask(problem.geometry.kv_heads()).clip(t.q, t.kv, t.kv_heads)
            };
            let cells = |t: &PlannedTask| mask(t).cells();
            let work: u64 = tasks.iter().map(|t| cells(t)).sum();
            let heaviest =
                |t: &PlannedTask| t.q.iter().map(|row| mask(t).cells_of_row(row)).max().unwrap_or(0);
            let small = || tasks.iter().any(|t| t.kv_heads.len() == 1 && 512 * heaviest(t) >= work);
            let largest = tasks.iter().map(|t| cells(t)).max().unwrap_or(0);
            assert!(
                4 * largest <= work || small(),
                "slot {slot} has a piece of {largest} cells out of {work}"
            );
            assert!(tasks.len() >= 8 || work == 0 || small(), "slot {slot} has {} pieces", tasks.len());
        }
    }
}

proptest! {
    #[test]
    fn any_step_is_planned_well(problem in any_problem()) {
        let plan = check(&problem);
        let mut turned = problem.clone();
        turned.documents.reverse();
        prop_assert_eq!(&check(&turned), &plan, "the order of documents does not matter");
    }

    #[test]
    fn traffic_adds_up(problem in any_problem()) {
        let traffic = Traffic::of(&check(&problem), &problem);
        let all_in_place = problem.documents.iter().flat_map(|d| d.homes())
            .all(|home| problem.slots.iter().any(|slot| slot.rank == Some(home.rank)));
        for pass in [&traffic.forward, &traffic.backward] {
            let (sum_in, sum_out) = (pass.bytes_in.iter().sum::<u64>(), pass.bytes_out.iter().sum::<u64>());
            if all_in_place {
                prop_assert_eq!((sum_in, sum_out), (pass.total, pass.total));
            } else {
                prop_assert!(sum_in <= pass.total && sum_out <= pass.total && sum_in + sum_out >= pass.total);
            }
            prop_assert!(pass.busiest <= sum_in + sum_out);
        }
    }
}

#[test]
fn nothing_moves_when_all_is_balanced() {
    let documents = (0..4).map(|rank| document(rank, 0, 4096)).collect();
    let problem = Problem::new(geometry(2), documents, in_place(4));
    let plan = check(&problem);
    assert!(plan.tasks().all(|(_, task)| task.slot == task.document.rank));
    assert_eq!(Traffic::of(&plan, &problem).forward.total, 0);
}

#[test]
fn one_long_document_spreads_over_all_slots() {
    for kv_heads in [1, 8] {
        for tokens in [131_072, 131_071, 100_003] {
            let mut documents = vec![document(0, 0, tokens)];
            documents.extend((1..8).map(|rank| document(rank, 0, 8191)));
            let problem = Problem::new(geometry(kv_heads), documents, in_place(8));
            let before = Loads::at_home(&problem.documents, &problem.geometry, 8).max_over_mean();
            let plan = check(&problem);
            let after = Loads::planned(&plan, &problem.documents, &problem.geometry).max_over_mean();
            assert!(
                before > 7.0 && after < 1.01,
                "{kv_heads} kv heads, {tokens} tokens: {before} to {after}"
            );
        }
    }
}

#[test]
fn tiny_steps_are_planned() {
    for kv_heads in [1, 8] {
        for tokens in [1, 2, 3, 17] {
            for slots in [1, 2, 64] {
                check(&Problem::new(geometry(kv_heads), vec![document(0, 0, tokens)], in_place(slots)));
                check(&Problem::new(
                    geometry(kv_heads),
                    vec![document(9, 0, tokens)],
                    vec![Slot::dedicated(); 3],
                ));
            }
        }
    }
    let many = (0..1000).map(|n| document(0, n, 1)).collect();
    let plan = check(&Problem::new(geometry(1), many, in_place(4)));
    assert_eq!(plan.tasks().count(), 1000);
}

#[test]
fn a_step_without_work_has_no_tasks() {
    let problem = Problem::new(geometry(1), Vec::new(), in_place(2));
    assert_eq!(check(&problem).tasks().count(), 0);
    let blind = document(0, 0, 10).with_mask(Mask::default()).expect("an empty mask");
    let problem = Problem::new(geometry(1), vec![blind], in_place(2));
    assert_eq!(check(&problem).tasks().count(), 0);
}

#[test]
fn a_dedicated_pool_takes_all() {
    for kv_heads in [1, 8] {
        let documents = (0..3).map(|rank| document(rank, 0, 20_000 + rank as usize)).collect();
        check(&Problem::new(geometry(kv_heads), documents, vec![Slot::dedicated(); 5]));
    }
}

#[test]
fn rows_of_a_spanning_document_stay_with_their_homes() {
    // A window of 1024: every rank has about the same work, and nothing needs to move but a few keys.
    let window = BandSlice::new(Span::to(40_000), Span::to(40_000), Some(-1024), Some(0)).expect("a window");
    let window = Mask::new(vec![MaskPart { kv_heads: Span::to(2), slice: window }]).expect("one slice");
    let homes = [(0, 10_000), (1, 10_000), (2, 10_000), (3, 10_000)];
    let document = spanning(0, 0, &homes).with_mask(window).expect("within the document");
    let problem = Problem { tolerance: 0.05, ..Problem::new(geometry(2), vec![document], in_place(4)) };
    let plan = check(&problem);
    assert!(plan.tasks().all(|(_, t)| t.q.start() / 10_000 == t.slot as usize && t.q.len() <= 10_000));
    assert!(plan.tasks().all(|(_, t)| t.kv.len() <= t.q.len() + 1024));
    let moved = Traffic::of(&plan, &problem).forward;
    assert_eq!(moved.total, 3 * 1024 * 2 * 2 * 64 * 4, "the window's keys and values across three borders");
}

#[test]
fn ticks_balance_by_themselves() {
    let documents =
        (0..8).map(|n| document(n % 4, n, 3000 * (n as usize + 1)).with_tick(n / 4 * 5)).collect();
    let plan = check(&Problem::new(geometry(4), documents, in_place(4)));
    assert_eq!(plan.ticks.iter().map(|t| t.tick).collect::<Vec<_>>(), [0, 5]);
}

#[test]
fn cuts_lie_on_blocks_where_lengths_allow() {
    let documents = (0..8).map(|rank| document(rank, 0, if rank == 0 { 200_000 } else { 60_001 })).collect();
    let plan = check(&Problem::new(geometry(8), documents, in_place(8)));
    assert!(plan.tasks().all(|(_, t)| t.q.start() % 128 == 0));
}

#[test]
fn what_cannot_be_planned_is_refused() {
    let documents = || vec![document(0, 0, 100), document(1, 0, 100)];
    let refused = |documents, slots, tolerance| {
        let problem = Problem { tolerance, ..Problem::new(geometry(1), documents, slots) };
        plan(&problem).expect_err("no sound problem").to_string()
    };
    assert_eq!(refused(documents(), Vec::new(), 0.01), PlanError::NoSlots.to_string());
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let slots = vec![Slot::in_place(0), Slot { weight, ..Slot::dedicated() }];
        let says = format!("slots[1].weight is {weight}; it must be finite and above zero");
        assert_eq!(refused(documents(), slots, 0.01), says);
    }
    let apart =
        vec![Slot { weight: 1e-300, ..Slot::dedicated() }, Slot { weight: f64::MAX, ..Slot::dedicated() }];
    assert!(refused(documents(), apart, 0.01).contains("the smallest is 1e-300"));
    let shared = vec![Slot::in_place(3), Slot::in_place(3)];
    assert!(refused(documents(), shared, 0.01).contains("slots[0].rank and slots[1].rank are both 3"));
    for tolerance in [-0.1, 1.1, f64::NAN] {
        assert!(refused(documents(), in_place(2), tolerance).starts_with("tolerance is"));
    }
    let twice = vec![document(0, 7, 100), document(0, 7, 200)];
    assert!(refused(twice, in_place(2), 0.01).contains("0.7 twice"));
    let huge = (0..8).map(|n| document(0, n, 1 << 30)).collect();
    assert!(refused(huge, in_place(2), 0.01).contains("cells"));
}

#[test]
fn more_tolerance_moves_fewer_bytes() {
    let documents: Vec<_> = (0..8).map(|rank| document(rank, 0, 20_000 * (rank as usize + 1))).collect();
    let moved = |tolerance| {
        let problem = Problem { tolerance, ..Problem::new(geometry(4), documents.clone(), in_place(8)) };
        Traffic::of(&check(&problem), &problem).forward.total
    };
    let totals = [0.0, 0.01, 0.1, 0.5].map(moved);
    assert!(totals.windows(2).all(|pair| pair[0] > pair[1]), "{totals:?}");
}

/// Layer time of a plan by the judge, forward and backward, in seconds.
fn layer_time(problem: &Problem, plan: &StepPlan, rates: Rates) -> f64 {
    let verdict = judge(plan, problem).expect("a valid plan");
    verdict.forward.seconds(rates) + verdict.backward.seconds(rates)
}

/// Rates at which computing a causal document of 10,000 tokens takes from much longer to much shorter than moving it.
fn any_rates() -> impl Strategy<Value = Rates> {
    (6i32..14, 3i32..11).prop_map(|(flops, bytes)| Rates {
        flops_per_second: 10f64.powi(flops),
        bytes_per_second: 10f64.powi(bytes),
    })
}

proptest! {
    #[test]
    fn no_layer_takes_longer_than_without_a_pool_or_by_distca(problem in any_problem(), rates in any_rates()) {
        // The judge adds ticks up before it compares computing with links.
        let documents = problem.documents.iter().map(|d| d.clone().with_tick(0)).collect();
        let problem = Problem { documents, ..problem };
        let told = Problem { rates: Some(rates), ..problem.clone() };
        let fixed = plan_by(&problem, Policy::Fixed).expect("a plan");
        let ours = plan(&told).expect("a plan");
        check_tasks(&told, &ours);
        let (ours, fixed) = (layer_time(&told, &ours, rates), layer_time(&problem, &fixed, rates));
        for tolerance in [0.0, 0.05, 0.1] {
            let theirs = plan_by(&problem, Policy::Distca { tolerance }).expect("a plan");
            let theirs = layer_time(&problem, &theirs, rates);
            prop_assert!(ours <= theirs * (1.0 + 1e-9), "{ours} against {theirs} of DistCA at {tolerance}");
        }
        let homeless = problem.documents.iter().flat_map(|d| d.homes())
            .any(|home| problem.slots.iter().all(|slot| slot.rank != Some(home.rank)));
        // Rows of ranks without a slot have no place where they would stay.
        prop_assert!(homeless || ours <= fixed * (1.0 + 1e-9), "{ours} against {fixed}");
    }
}

#[test]
fn slow_links_leave_work_at_home() {
    let documents: Vec<_> = (0..8).map(|rank| document(rank, 0, 8_000 * (rank as usize + 1))).collect();
    let problem = Problem::new(geometry(4), documents, in_place(8));
    let told = |bytes_per_second| {
        let rates = Some(Rates { flops_per_second: 1e14, bytes_per_second });
        let problem = Problem { rates, ..problem.clone() };
        let verdict = judge(&plan(&problem).expect("a plan"), &problem).expect("a valid plan");
        (verdict.max_over_mean, verdict.forward.bytes)
    };
    let plans = [1e15, 1e10, 1e9, 1e3].map(told);
    assert!(plans[0].0 <= 1.01, "free links allow balance: {plans:?}");
    assert!(plans.windows(2).all(|pair| pair[0].0 <= pair[1].0 && pair[0].1 >= pair[1].1), "{plans:?}");
    assert_eq!(plans[3].1, 0, "nothing is worth moving: {plans:?}");
}

#[test]
fn some_work_moves_where_all_or_nothing_takes_longer() {
    let documents: Vec<_> = (0..8).map(|rank| document(rank, 0, 8_000 * (rank as usize + 1))).collect();
    let problem = Problem::new(geometry(1), documents, in_place(8));
    let gain = |bytes_per_second| {
        let rates = Rates { flops_per_second: 1e14, bytes_per_second };
        let told = Problem { rates: Some(rates), ..problem.clone() };
        let time = |problem: &Problem, policy| {
            layer_time(problem, &plan_by(problem, policy).expect("a plan"), rates)
        };
        time(&told, Policy::Outboard) / time(&problem, Policy::Outboard).min(time(&problem, Policy::Fixed))
    };
    let gains = [1e9, 2e9, 4e9, 8e9, 1.6e10].map(gain);
    assert!(gains.iter().any(|&gain| gain < 0.8), "{gains:?}");
}

#[test]
fn rates_must_be_sound() {
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let rates = Some(Rates { bytes_per_second: bad, ..Rates::default() });
        let problem = Problem { rates, ..Problem::new(geometry(1), vec![document(0, 0, 100)], in_place(2)) };
        let says = plan(&problem).expect_err("no sound rate").to_string();
        assert_eq!(says, format!("rates.bytes_per_second is {bad}; it must be finite and above zero"));
    }
}

#[test]
fn a_slot_of_hardly_any_weight_is_planned() {
    // No cell of its share may be misplaced, and receivers do not quite cover what it gives.
    let tokens = [1414, 4244, 4472, 4472, 4472, 4472];
    let documents = (0..).zip(tokens).map(|(rank, tokens)| document(rank, 0, tokens)).collect();
    let weight = |rank: u32| if rank == 0 { 1e-6 } else { 1.0 };
    let slots = (0..6).map(|rank| Slot { weight: weight(rank), ..Slot::in_place(rank) }).collect();
    check(&Problem { tolerance: 0.0, ..Problem::new(geometry(1), documents, slots) });
}

#[test]
fn one_document_spreads_over_very_many_slots() {
    for slots in [63, 64, 65, 200] {
        check(&Problem::new(geometry(1), vec![document(0, 0, 500_000)], in_place(slots)));
    }
}

proptest! {
    /// What fits is planned, and what is planned fits.
    #[test]
    fn no_slot_holds_more_than_its_memory(
        problem in any_problem(),
        memories in prop::collection::vec(prop::option::of(prop_oneof![Just(0), 1u64..20_000_000]), 10),
        rates in prop::option::of(any_rates()),
        kept in 1u64..5,
    ) {
        let mut problem = Problem { rates, kept, ..problem };
        for (slot, memory) in problem.slots.iter_mut().zip(memories) {
            slot.memory = memory;
        }
        let has_slot = |rank| problem.slots.iter().any(|slot| slot.rank == Some(rank));
        let limited = problem.slots.iter().all(|slot| slot.memory.is_some());
        let elsewhere = |d: &Document| d.homes().iter().any(|home| {
            home.rank != d.homes()[0].rank || limited && !has_slot(home.rank)
        });
        match plan(&problem) {
            Ok(plan) => {
                check_tasks(&problem, &plan);
                let verdict = judge(&plan, &problem).expect("a valid plan");
                prop_assert!(verdict.memory <= 1.0, "{}", verdict.memory);
            }
            // Where every rank can compute its own rows, or some slot all others, nothing need be held.
            Err(error) => prop_assert!(
                matches!(error, PlanError::NoMemory { .. }) && problem.documents.iter().any(elsewhere), "{error}"
            ),
        }
        let cells = plan(&Problem { rates: None, ..problem.clone() });
        prop_assert!(cells.is_err() || plan(&problem).is_ok(), "rates make what fits no longer fit");
    }
}

/// Rows of a rank without a slot go where there is memory for them.
#[test]
fn slots_without_memory_are_left_out() {
    let documents = vec![document(0, 0, 10_000), document(9, 0, 200)];
    let no_memory = Slot { memory: Some(0), ..Slot::dedicated() };
    for (weight, rates) in
        [(1.0, None), (0.004, Some(Rates { flops_per_second: 1e12, bytes_per_second: 1e12 }))]
    {
        let slots = vec![Slot::in_place(0), Slot { weight, ..no_memory }];
        let problem = Problem { rates, ..Problem::new(geometry(1), documents.clone(), slots) };
        let plan = plan(&problem).expect("slot 0 can hold all");
        assert!(plan.tasks().all(|(_, task)| task.slot == 0));
    }
}

/// A slot with little memory takes less, and the others the more.
#[test]
fn little_memory_takes_little_work() {
    let documents: Vec<Document> =
        (0..4).map(|rank| document(rank, 0, if rank == 0 { 60_000 } else { 9_000 })).collect();
    let taken = |memory, kept| {
        let slots =
            (0..4).map(|rank| Slot { memory: if rank == 3 { memory } else { None }, ..Slot::in_place(rank) });
        let problem = Problem { kept, ..Problem::new(geometry(2), documents.clone(), slots.collect()) };
        let plan = plan(&problem).expect("a sound problem");
        let loads = Loads::planned(&plan, &problem.documents, &problem.geometry).totals();
        (loads[3] as f64 / loads[1] as f64, judge(&plan, &problem).expect("a valid plan").memory)
    };
    let (free, none) = taken(None, 1);
    assert!((free - 1.0).abs() < 0.05 && none == 0.0, "{free} {none}");
    let (tight, part) = taken(Some(20_000_000), 1);
    assert!(tight < 0.9 && (0.5..=1.0).contains(&part), "{tight} {part}");
    // Q, K and V of 8 layers take more of it.
    let (tighter, part) = taken(Some(20_000_000), 8);
    assert!(tighter < 0.7 * tight && (0.5..=1.0).contains(&part), "{tighter} {part}");
}

#[test]
fn slots_keep_one_layer_at_least() {
    let problem = Problem { kept: 0, ..Problem::new(geometry(1), vec![document(0, 0, 100)], in_place(2)) };
    let says = plan(&problem).expect_err("nothing kept").to_string();
    assert_eq!(says, "kept is 0; slots hold the tensors of one layer at least");
}

/// Links are part of what is planned for: a slot with a slow one gives and takes less.
#[test]
fn slow_links_carry_less() {
    let documents = |most: usize| {
        let mut documents = vec![document(0, 0, most)];
        documents.extend((1..6).map(|rank| document(rank, 0, 30_000)));
        documents
    };
    let rates = Rates { flops_per_second: 1e12, bytes_per_second: 1e9 };
    let into_last = |link: f64| {
        let slots =
            (0..6).map(|rank| Slot { link: if rank == 5 { link } else { 1.0 }, ..Slot::in_place(rank) });
        let problem =
            Problem { rates: Some(rates), ..Problem::new(geometry(2), documents(90_000), slots.collect()) };
        let plan = plan(&problem).expect("a sound problem");
        let verdict = judge(&plan, &problem).expect("a valid plan");
        let seconds = verdict.forward.seconds(rates) + verdict.backward.seconds(rates);
        (Traffic::of(&plan, &problem).forward.bytes_in[5], seconds)
    };
    let (equal, usual) = into_last(1.0);
    let (slow, slower) = into_last(0.002);
    assert!(slow < equal / 2, "{slow} of {equal} bytes over a link of 0.002");
    assert!(slower < 3.0 * usual, "{slower} s, and {usual} s with a link like the others");
    let nonsense = |link| {
        let slots = vec![Slot { link, ..Slot::in_place(0) }];
        plan(&Problem::new(geometry(2), documents(100), slots)).expect_err("no such link")
    };
    for link in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e300] {
        assert!(matches!(nonsense(link), PlanError::BadLink { slot: 0, .. }), "{link}");
    }
}
