//! What every plan must hold, on random steps.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use outboard_attention::{
    BandSlice, Document, DocumentId, HeadGeometry, HomeRange, Mask, MaskPart, PlannedTask, Span, StepPlan,
};
use outboard_planner::{Loads, PlanError, Problem, Slot, Traffic, plan};
use proptest::prelude::*;
use proptest::sample::Index;

/// Plans the problem and checks everything that the crate guarantees.
fn check(problem: &Problem) -> StepPlan {
    let plan = plan(problem).expect("a sound problem");
    let Problem { geometry, documents, slots, tolerance } = problem;
    plan.check(documents, geometry).expect("every cell exactly once");
    assert_eq!(plan.slots as usize, slots.len());

    let by_id: BTreeMap<DocumentId, &Document> = documents.iter().map(|d| (d.id(), d)).collect();
    for (_, task) in plan.tasks() {
        let mask = by_id[&task.document].mask(geometry.kv_heads()).clip(task.q, task.kv, task.kv_heads);
        let sees = |row: usize| mask.cells_of_row(row) > 0;
        assert!(sees(task.q.start()) && sees(task.q.end() - 1), "idle rows at an end of {task:?}");
        assert_eq!(task.kv, keys(&mask), "{task:?}");
    }
    check_balance(problem, &plan, 2.0 * tolerance);
    check_pieces(problem, &plan);
    check_groups(&plan);
    plan
}

/// From the first to the last key that any row sees.
fn keys(mask: &Mask) -> Span {
    let row = |p: &MaskPart, i: usize| Some(p.slice.keys_of(i)).filter(|keys| !keys.is_empty());
    let all = mask.parts().iter().flat_map(|p| p.slice.q().iter().filter_map(move |i| row(p, i)));
    all.reduce(Span::hull).expect("no empty task")
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

/// A group is the tasks of one document, kv-head range and slot, numbered in plan order; kv-head ranges of one document
/// on one slot are equal or disjoint.
fn check_groups(plan: &StepPlan) {
    let mut members: BTreeMap<u32, Vec<&PlannedTask>> = BTreeMap::new();
    let mut heads: BTreeMap<(DocumentId, u32), BTreeSet<Span>> = BTreeMap::new();
    let mut last = 0;
    for (_, task) in plan.tasks() {
        let group = members.entry(task.group).or_default();
        assert_eq!(task.position as usize, group.len(), "positions in plan order");
        group.push(task);
        assert!(task.group >= last, "groups in plan order");
        last = task.group;
        heads.entry((task.document, task.slot)).or_default().insert(task.kv_heads);
    }
    let key = |t: &PlannedTask| (t.document, t.kv_heads, t.slot);
    let keys: BTreeSet<_> = members.values().map(|tasks| key(tasks[0])).collect();
    assert_eq!(keys.len(), members.len(), "one group a document, range and slot");
    assert!(members.values().all(|tasks| tasks.iter().all(|t| key(t) == key(tasks[0]))));
    for ranges in heads.values() {
        let ranges: Vec<&Span> = ranges.iter().collect();
        assert!(ranges.windows(2).all(|pair| !pair[0].meets(*pair[1])), "{ranges:?}");
    }
}

fn geometry(kv_heads: usize) -> HeadGeometry {
    HeadGeometry::standard(4 * kv_heads, kv_heads, 64).expect("sound heads")
}

/// A document of rank `rank` alone.
fn document(rank: u32, index: u32, tokens: usize) -> Document {
    spanning(rank, index, &[(rank, tokens)])
}

/// A document whose homes are `(rank, tokens)`, one after the other.
fn spanning(rank: u32, index: u32, homes: &[(u32, usize)]) -> Document {
    let mut at = 0;
    let homes = homes.iter().map(|&(rank, tokens)| {
        let tokens = Span::at(at, tokens);
        at = tokens.end();
        HomeRange { rank, tokens }
    });
    let homes = homes.collect();
    Document::new(DocumentId { rank, index }, at, homes).expect("homes in a row")
}

fn in_place(ranks: u32) -> Vec<Slot> {
    (0..ranks).map(Slot::in_place).collect()
}

/// Rows, first and last key, band.
type Draw = (Index, Index, Index, Option<i64>, Option<i64>);

/// Disjoint slices: rows in a row, each with its own keys and band, perhaps others for other heads.
fn mask(tokens: usize, kv_heads: usize) -> impl Strategy<Value = Mask> {
    let end = || prop_oneof![Just(None), (-600i64..600).prop_map(Some), Just(Some(0))];
    let slice = (any::<Index>(), any::<Index>(), any::<Index>(), end(), end());
    let slices = prop::collection::vec(slice, 1..6);
    let by_rows = move |(border, slices): (usize, Vec<Draw>)| {
        let mut parts = Vec::new();
        for (n, heads) in
            [Span::to(border), Span::new(border, kv_heads).unwrap_or_default()].into_iter().enumerate()
        {
            let mut at = 0;
            for (rows, a, b, lo, hi) in slices.iter().skip(n) {
                if heads.is_empty() || at >= tokens {
                    break;
                }
                let q = Span::at(at, 1 + rows.index(tokens - at));
                let (a, b) = (a.index(tokens), b.index(tokens));
                let kv = Span::at(a.min(b), a.abs_diff(b) + 1);
                let (lo, hi) = match (*lo, *hi) {
                    (Some(lo), Some(hi)) => (Some(lo.min(hi)), Some(lo.max(hi))),
                    ends => ends,
                };
                let slice = BandSlice::new(q, kv, lo, hi).expect("a sound band");
                parts.push(MaskPart { kv_heads: heads, slice });
                at = q.end();
            }
        }
        Mask::new(parts).expect("disjoint rows")
    };
    (0..=kv_heads, slices).prop_map(by_rows)
}

fn any_document(index: u32, ranks: u32, kv_heads: usize) -> impl Strategy<Value = Document> {
    let tokens = prop_oneof![1usize..6, 1usize..400, 400usize..6000, 6000usize..40000];
    let homes = tokens.prop_flat_map(move |tokens| {
        let home = (0..ranks, any::<Index>());
        let homes = prop::collection::vec(home, 1..4).prop_map(move |homes| {
            let (mut parts, mut left) = (Vec::new(), tokens);
            for (n, (rank, part)) in homes.iter().enumerate() {
                let len = if n + 1 == homes.len() { left } else { part.index(left + 1) };
                if len > 0 {
                    parts.push((*rank, len));
                    left -= len;
                }
            }
            parts
        });
        (homes, prop::option::of(mask(tokens, kv_heads)))
    });
    (homes, 0u32..3, 0..ranks).prop_map(move |((homes, mask), tick, rank)| {
        let document = spanning(rank, index, &homes).with_tick(tick / 2);
        match mask {
            Some(mask) => document.with_mask(mask).expect("within the document"),
            None => document,
        }
    })
}

fn any_problem() -> impl Strategy<Value = Problem> {
    let kv_heads = prop_oneof![Just(1usize), Just(8), 1usize..5];
    (kv_heads, 1u32..6).prop_flat_map(|(kv_heads, ranks)| {
        let documents: Vec<_> = (0..12).map(|n| any_document(n, ranks, kv_heads)).collect();
        let slot = prop_oneof![8 => Just(1.0), 8 => 0.2f64..5.0, 1 => Just(1e-3), 1 => Just(1e3)];
        let slots = prop::collection::vec((slot, any::<bool>()), 1..10);
        (documents, 1usize..=12, slots).prop_map(move |(mut documents, count, slots)| {
            documents.truncate(count);
            let slot = |(n, &(weight, in_place)): (u32, &(f64, bool))| Slot {
                rank: (in_place && n < ranks).then_some(n),
                weight,
            };
            Problem::new(geometry(kv_heads), documents, (0..).zip(&slots).map(slot).collect())
        })
    })
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
        let slots = vec![Slot::in_place(0), Slot { rank: None, weight }];
        let says = format!("slots[1].weight is {weight}; it must be finite and above zero");
        assert_eq!(refused(documents(), slots, 0.01), says);
    }
    let apart = vec![Slot { rank: None, weight: 1e-300 }, Slot { rank: None, weight: f64::MAX }];
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
