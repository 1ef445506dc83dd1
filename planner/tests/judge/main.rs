//! The judge against counting cell by cell, on small random steps with valid and with broken plans.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]
#![allow(unreachable_pub, reason = "modules of a test binary")]

mod draw;
mod oracle;

use outboard_attention::{
    Document, DocumentId, HeadGeometry, HomeRange, PlannedTask, Span, StepPlan, TickPlan,
};
use outboard_planner::{
    Carried, Fault, Flow, Pass, PassVerdict, Problem, Rates, Slot, Traffic, Verdict, judge,
};
use proptest::prelude::*;

use draw::{cut, damage, draws, problem};
use oracle::{by_counting, figures, is_true};

/// Judges the plan, and makes sure that counting says the same: figures of a valid plan, or that the fault is one.
fn check(problem: &Problem, plan: &StepPlan) -> Result<Verdict, Fault> {
    let outcome = judge(plan, problem);
    let work = by_counting(problem, plan);
    match (&outcome, work) {
        (Ok(verdict), Some(work)) => {
            agree(verdict, &figures(problem, plan, &work));
            let traffic = Traffic::of(plan, problem);
            assert_eq!(
                (verdict.forward.bytes, verdict.backward.bytes),
                (traffic.forward.total, traffic.backward.total)
            );
            assert_eq!(verdict.forward.busiest, traffic.forward.busiest);
            assert_eq!(verdict.backward.busiest, traffic.backward.busiest);
            flows_add_up(problem, plan, &traffic);
        }
        (Err(fault), None) => assert!(is_true(fault, problem, plan), "{fault}"),
        (outcome, work) => {
            assert!(
                work.is_some() == outcome.is_ok(),
                "counting finds the plan valid: {}; {outcome:?}",
                work.is_some()
            );
        }
    }
    outcome
}

/// Flows, each between a home and a slot elsewhere and named once, load every slot's device as the traffic says.
fn flows_add_up(problem: &Problem, plan: &StepPlan, traffic: &Traffic) {
    let flows = Flow::of(plan, problem);
    assert!(flows.windows(2).all(|pair| (pair[0].rank, pair[0].slot) < (pair[1].rank, pair[1].slot)));
    assert!(flows.iter().all(|f| f.total() > 0 && problem.slots[f.slot].rank != Some(f.rank)));
    let pass = |pass: &Pass, carried: fn(&Flow) -> Carried| {
        assert_eq!(flows.iter().map(|f| carried(f).total()).sum::<u64>(), pass.total);
        for (n, slot) in problem.slots.iter().enumerate() {
            let sum = |side: fn(Carried) -> u64, here: &dyn Fn(&Flow) -> bool| {
                flows.iter().filter(|f| here(f)).map(|f| side(carried(f))).sum::<u64>()
            };
            let computed = |f: &Flow| f.slot == n;
            let lent = |f: &Flow| slot.rank == Some(f.rank);
            assert_eq!(sum(|c| c.there, &computed) + sum(|c| c.back, &lent), pass.bytes_in[n]);
            assert_eq!(sum(|c| c.back, &computed) + sum(|c| c.there, &lent), pass.bytes_out[n]);
        }
    };
    pass(&traffic.forward, |f| f.forward);
    pass(&traffic.backward, |f| f.backward);
}

fn agree(a: &Verdict, b: &Verdict) {
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-12 * a.abs().max(b.abs());
    let exact = |v: &Verdict| {
        [v.forward.bytes, v.forward.busiest, v.backward.bytes, v.backward.busiest]
            .map(|n| n as usize)
            .into_iter()
            .chain([v.tasks, v.documents, v.slots])
            .collect::<Vec<_>>()
    };
    let rough = |v: &Verdict| {
        let balance = [v.max_over_mean, v.worst_tick, v.tiles_over_ideal, v.largest_piece];
        balance.into_iter().chain([v.forward.flops, v.backward.flops]).collect::<Vec<_>>()
    };
    assert_eq!(exact(a), exact(b));
    assert!(rough(a).into_iter().zip(rough(b)).all(|(a, b)| close(a, b)), "{a:?}\n{b:?}");
}

proptest! {
    #[test]
    fn valid_plans_are_worth_what_counting_says(problem in problem(30), cuts in draws(9)) {
        let plan = cut(&problem, &cuts);
        prop_assert!(check(&problem, &plan).is_ok());
    }

    #[test]
    fn broken_plans_are_faulted_for_what_they_are(
        problem in problem(20), cuts in draws(7), kind in 0u8..8, draw in draws(4),
    ) {
        let mut plan = cut(&problem, &cuts);
        for draw in &draw {
            damage(&mut plan, kind, draw);
        }
        let _ = check(&problem, &plan);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn documents_of_many_tiles_are_worth_what_counting_says(problem in problem(400), cuts in draws(5)) {
        let plan = cut(&problem, &cuts);
        prop_assert!(check(&problem, &plan).is_ok());
    }
}

#[test]
fn layer_time_is_the_longer_of_computing_and_carrying() {
    let pass = PassVerdict { bytes: 0, busiest: 3_000_000, longest: 3e6, flops: 2e10, predicted: None };
    assert_eq!(pass.seconds(Rates::default()), 6e-5, "3 MB at 50 GB/s");
    assert_eq!(
        pass.seconds(Rates { bytes_per_second: 1e12, ..Rates::default() }),
        5e-5,
        "20 GFLOP at 400 TFLOP/s"
    );
}

#[test]
fn each_kind_of_fault_is_named() {
    let all = Span::to(8);
    let home = vec![HomeRange { rank: 0, tokens: all }];
    let document = Document::new(DocumentId { rank: 0, index: 0 }, 8, home).expect("one home");
    let geometry = HeadGeometry::standard(2, 1, 4).expect("sound heads");
    let problem = Problem::new(geometry, vec![document], vec![Slot::in_place(0), Slot::dedicated()]);
    let task = |q: Span, kv: Span, slot| PlannedTask {
        document: DocumentId { rank: 0, index: 0 },
        q,
        kv,
        kv_heads: Span::to(1),
        slot,
        group: 0,
        position: 0,
    };
    let fault = |tasks: &[PlannedTask]| {
        let plan = StepPlan { ticks: vec![TickPlan { tick: 0, tasks: tasks.to_vec() }], slots: 2 };
        check(&problem, &plan).expect_err("a broken plan")
    };
    let (head, tail) = (task(Span::to(4), all, 0), task(Span::at(4, 4), all, 1));
    assert!(matches!(fault(&[]), Fault::Missing { planned: 0, needed: 36, .. }));
    assert!(matches!(fault(&[tail]), Fault::Missing { planned: 26, .. }));
    assert!(matches!(fault(&[head, tail, head]), Fault::Overlap { first: 0, second: 2, .. }));
    assert!(matches!(
        fault(&[head, task(Span::at(4, 5), all, 1)]),
        Fault::OutOfRange { task: 1, field: "q", .. }
    ));
    assert!(matches!(fault(&[task(Span::to(4), Span::at(4, 4), 0)]), Fault::Empty { task: 0, .. }));
    assert!(matches!(
        fault(&[head, task(Span::at(4, 4), all, 2)]),
        Fault::UnknownSlot { task: 1, slot: 2, .. }
    ));
    let stranger = PlannedTask { document: DocumentId { rank: 1, index: 0 }, ..head };
    assert!(matches!(fault(&[stranger]), Fault::UnknownDocument { task: 0, tick: 0, .. }));
    let none = Problem { slots: Vec::new(), ..problem.clone() };
    assert!(matches!(judge(&StepPlan::default(), &none), Err(Fault::BadProblem(_))));
}
