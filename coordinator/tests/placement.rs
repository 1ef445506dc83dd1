//! Jobs that place tokens, over gRPC: documents without homes, documents that span ranks, and each rank's part of them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use common::placed::{check, most};
use common::{Coordinator, cuts, documents, join, join_placing, patient, server, spanning, unplaced};
use outboard_attention::Span;
use outboard_coordinator::Options;
use outboard_proto::{ErrorKind, TaskError, v1};
use proptest::prelude::*;
use proptest::sample::Index;

/// Submits a step, which all ranks' parts must agree on.
async fn step(
    coordinator: &Coordinator,
    job: u64,
    step: u64,
    submitted: &[Vec<v1::Document>],
    slack: f64,
) -> Vec<v1::SubmitStepResponse> {
    let answers = coordinator.try_step(job, step, submitted).await;
    let answers: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
    check(submitted, slack, &answers);
    answers
}

/// Starts a job of three ranks whose links are so slow that every row is computed at home.
async fn slow_links(coordinator: &Coordinator, slack: f64) -> u64 {
    let rates = Some(v1::Rates { flops_per_second: 1e9, bytes_per_second: 1.0 });
    let join = |rank| v1::JoinJobRequest { rates, ..join_placing("job", rank, 3, slack) };
    coordinator.start_with((0..3).map(join).collect()).await
}

#[tokio::test]
async fn a_global_batch_from_one_rank_is_placed() {
    let coordinator = Coordinator::start(patient()).await;
    let job = coordinator.start_placing("job", 4, 0.02).await;
    let batch = unplaced(2, &[9000, 8000, 300, 300, 7000, 1, 6000, 33, 33, 500]);
    let submitted = [Vec::new(), Vec::new(), batch, Vec::new()];
    let answers = step(&coordinator, job, 0, &submitted, 0.02).await;
    let summary = answers[0].summary.unwrap();
    assert!((1.0..=1.02).contains(&summary.tokens_imbalance), "{summary:?}");
    assert!(summary.imbalance_after < 1.05, "{summary:?}");
    assert!(answers.iter().all(|answer| !answer.documents.is_empty()));
    // A rank that asks again, and the same batch once more, get the same.
    let again = coordinator.submit(job, 1, 0, Vec::new()).await.unwrap().unwrap();
    assert_eq!(again, answers[1]);
    let next = step(&coordinator, job, 1, &submitted, 0.02).await;
    assert_eq!(cuts(&next), cuts(&answers));
    let documents = |answers: &[v1::SubmitStepResponse]| -> Vec<_> {
        answers.iter().map(|answer| answer.documents.clone()).collect()
    };
    assert_eq!(documents(&next), documents(&answers));
}

#[tokio::test]
async fn a_document_longer_than_a_rank_spans_ranks() {
    let coordinator = Coordinator::start(patient()).await;
    let job = slow_links(&coordinator, 0.0).await;
    let answers = step(&coordinator, job, 0, &[unplaced(0, &[4001]), vec![], vec![]], 0.0).await;
    for answer in &answers {
        assert_eq!(answer.documents.len(), 1);
        assert!(answer.documents[0].homes.len() >= 3, "{:?}", answer.documents[0].homes);
    }
}

#[tokio::test]
async fn homes_that_are_given_stay_on_whichever_ranks_they_are() {
    let coordinator = Coordinator::start(patient()).await;
    let job = slow_links(&coordinator, 1.0).await;
    let pinned = vec![
        spanning(0, 0, &[(2, 700)]),
        spanning(0, 1, &[(1, 100), (2, 50), (1, 150)]),
        v1::Document { tick: 1, ..spanning(0, 2, &[(0, 900)]) },
    ];
    let mut free = unplaced(1, &[100, 1500]);
    free[1].mask = vec![v1::BandSlice {
        q: Some((&Span::to(1500)).into()),
        kv: Some((&Span::to(1500)).into()),
        kv_heads: Some((&Span::to(2)).into()),
        lo: Some(-63),
        hi: Some(0),
    }];
    let answers = step(&coordinator, job, 0, &[pinned, free, Vec::new()], 1.0).await;
    // In a tick where nothing is to be chosen, ranks hold what they were given, however much that is.
    assert_eq!(answers[0].summary.unwrap().tokens_imbalance, 3.0);
    let nothing = step(&coordinator, job, 1, &[vec![], vec![], vec![]], 1.0).await;
    assert_eq!(nothing[0].summary.unwrap().tokens_imbalance, 1.0);
}

#[tokio::test]
async fn ranks_hear_of_each_others_home_services() {
    let coordinator = Coordinator::start(patient()).await;
    coordinator.register(server(1)).await.unwrap();
    let joins = [2, 0, 1].map(|rank| coordinator.join(join_placing("job", rank, 3, 0.1)));
    for joined in joins {
        let addresses = joined.await.unwrap().unwrap().home_addresses;
        assert_eq!(addresses, ["host-0:7000", "host-1:7000", "host-2:7000"]);
    }
    // Two that give one address would give out each other's keys.
    let joins = [0, 1].map(|rank| {
        let home_address = "127.0.0.1:7000".into();
        coordinator.join(v1::JoinJobRequest { home_address, ..join_placing("other", rank, 2, 0.1) })
    });
    for joined in joins {
        let error = joined.await.unwrap().unwrap_err();
        assert!(
            error.message.contains("job other: ranks 0 and 1 both have home_address 127.0.0.1:7000"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn ranks_that_differ_on_placement_do_not_join() {
    let coordinator = Coordinator::start(patient()).await;
    coordinator.register(server(1)).await.unwrap();
    // The terms that are first, a rank's other ones, and why it is refused.
    let cases = [
        (
            join_placing("places", 0, 2, 0.02),
            join("places", 1, 2),
            "job places: rank 1 joins with placement none, ranks before it with token_slack 0.02; \
             all ranks must say the same: give all of them the same token_slack, or none",
        ),
        (
            join("keeps", 0, 2),
            join_placing("keeps", 1, 2, 0.5),
            "job keeps: rank 1 joins with placement token_slack 0.5, ranks before it with none",
        ),
        (
            join_placing("slack", 0, 2, 0.02),
            join_placing("slack", 1, 2, 0.03),
            "with placement token_slack 0.03, ranks before it with token_slack 0.02",
        ),
        (
            join_placing("address", 0, 2, 0.02),
            v1::JoinJobRequest { home_address: String::new(), ..join_placing("address", 1, 2, 0.02) },
            "job address, rank 1: home_address is empty; a job with placement needs",
        ),
        (
            join("stray", 0, 2),
            v1::JoinJobRequest { home_address: "host:1".into(), ..join("stray", 1, 2) },
            "job stray, rank 1: home_address is \"host:1\" and placement missing",
        ),
        (
            join_placing("number", 0, 2, 0.02),
            join_placing("number", 1, 2, f64::NAN),
            "placement.token_slack is NaN; it must be between 0 and 1",
        ),
    ];
    for (first, other, what) in cases {
        let waiting = coordinator.join(first.clone());
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        let error = coordinator.join(other).await.unwrap().unwrap_err();
        assert_eq!(error.kind, ErrorKind::Invalid, "{error}");
        assert!(error.message.contains(what), "{what}: {error}");
        // Those who agree are not disturbed.
        let second = v1::JoinJobRequest {
            rank: 1,
            home_address: first.home_address.replace("host-0", "host-1"),
            ..first
        };
        coordinator.join(second).await.unwrap().unwrap();
        waiting.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn jobs_without_placement_are_as_before() {
    let coordinator = Coordinator::start(patient()).await;
    coordinator.register(server(1)).await.unwrap();
    let job = coordinator.join_all("job", 2).await;
    for (what, document) in [
        ("homes is empty, and the job does not declare placement", unplaced(0, &[8])[0].clone()),
        (
            "homes name several ranks, and the job does not declare placement",
            spanning(0, 0, &[(0, 4), (1, 4)]),
        ),
    ] {
        let error = coordinator.submit(job, 0, 0, vec![document]).await.unwrap().unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unsupported);
        assert!(
            error.message.contains(&format!("job job, step 0, rank 0: documents[0] (0.0): {what}")),
            "{error}"
        );
    }
    // A document of another rank alone was never refused.
    let moved = vec![spanning(0, 0, &[(1, 500)])];
    let answers = coordinator.try_step(job, 0, &[moved, documents(1, &[300])]).await;
    let answers: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
    assert!(answers[0].tasks.is_empty() && answers.iter().all(|answer| answer.documents.is_empty()));
    assert_eq!(answers[0].summary.unwrap().tokens_imbalance, 0.0);
}

#[tokio::test]
async fn submissions_that_make_no_sense_are_refused_and_work_goes_on() {
    let coordinator = Coordinator::start(Options { max_documents: 3, ..patient() }).await;
    let job = coordinator.start_placing("job", 2, 0.1).await;
    let bad = [
        (
            "documents[0] (0.0): homes name rank 2; the job has 2 ranks",
            vec![spanning(0, 0, &[(1, 4), (2, 4)])],
        ),
        ("document 0.0: home ranges do not add up", {
            vec![v1::Document { tokens: 9, ..spanning(0, 0, &[(1, 8)]) }]
        }),
        ("documents[0].id.rank is 1; a rank's documents carry its own number, 0", unplaced(1, &[8])),
        ("documents[1].id is 0.0, as another one's", vec![unplaced(0, &[8])[0].clone(); 2]),
        ("documents holds 7 entries; a rank submits at most 6 a step", unplaced(0, &[8; 7])),
    ];
    for (what, documents) in bad {
        let error = coordinator.submit(job, 0, 0, documents).await.unwrap().unwrap_err();
        assert_eq!(error.kind, ErrorKind::Invalid, "{error}");
        assert!(error.message.contains(what), "{what}: {error}");
        assert!(error.message.starts_with("job job, step 0, rank 0: documents"), "{error}");
    }
    // One rank may speak for all. No step has more than all could say together: who comes too late is refused.
    let mut first = coordinator.submit(job, 0, 0, unplaced(0, &[8; 6]));
    let mut second = coordinator.submit(job, 1, 0, unplaced(1, &[8; 6]));
    let (late, refused) = tokio::select! {
        answer = &mut first => (0, answer),
        answer = &mut second => (1, answer),
    };
    let error = refused.unwrap().unwrap_err();
    assert!(
        error.message.contains("6 documents come to 6 of other ranks; a step holds at most 6 in all"),
        "{error}"
    );
    let again = coordinator.submit(job, late, 0, Vec::new()).await.unwrap().unwrap();
    let accepted = if late == 0 { second } else { first }.await.unwrap().unwrap();
    let (submitted, answers) = match late {
        0 => ([Vec::new(), unplaced(1, &[8; 6])], [again, accepted]),
        _ => ([unplaced(0, &[8; 6]), Vec::new()], [accepted, again]),
    };
    check(&submitted, 0.1, &answers);
}

/// All ranks get the same error, which ends the run.
async fn refused(coordinator: &Coordinator, job: u64, submitted: &[Vec<v1::Document>]) -> TaskError {
    let answers = coordinator.try_step(job, 0, submitted).await;
    let errors: Vec<TaskError> = answers.into_iter().map(Result::unwrap_err).collect();
    let later = coordinator.submit(job, 0, 1, Vec::new()).await.unwrap().unwrap_err();
    assert!(errors.iter().all(|error| *error == later), "{errors:?}, later {later}");
    later
}

#[tokio::test]
async fn a_step_that_cannot_be_placed_ends_the_run_with_its_reason_on_all_ranks() {
    let coordinator = Coordinator::start(patient()).await;
    let job = coordinator.start_placing("job", 2, 0.02).await;
    let pinned = vec![spanning(1, 0, &[(1, 900)]), spanning(1, 1, &[(0, 10), (1, 20)])];
    let error = refused(&coordinator, job, &[unplaced(0, &[70]), pinned]).await;
    assert_eq!(error.kind, ErrorKind::Invalid);
    assert_eq!(
        error.message,
        "job job: step 0: rank 1 is home of 920 tokens of tick 0 already, document 1.0 the most; it may hold 510"
    );
}

#[tokio::test]
async fn ranks_without_servers_of_their_own_hold_tokens_too() {
    let coordinator = Coordinator::start(patient()).await;
    coordinator.register(server(1)).await.unwrap();
    let joins = [0, 1].map(|rank| coordinator.join(join_placing("job", rank, 2, 0.1)));
    let mut job = 0;
    for joined in joins {
        job = joined.await.unwrap().unwrap().job_id;
    }
    step(&coordinator, job, 0, &[unplaced(0, &[70, 5, 40]), Vec::new()], 0.1).await;
}

/// A document as a rank may submit it.
#[derive(Clone, Debug)]
struct Draw {
    tokens: usize,
    tick: u32,
    submitter: Index,
    /// The ranks that it is pinned to, one after the other; none where they are to be chosen.
    pinned: Vec<Index>,
}

impl Draw {
    fn document(&self, rank: u32, index: u32, ranks: usize) -> v1::Document {
        let parts = self.pinned.len().min(self.tokens);
        let border = |n: usize| self.tokens * n / parts;
        let home = |(n, rank): (usize, &Index)| (rank.index(ranks) as u32, border(n + 1) - border(n));
        let homes: Vec<_> = self.pinned.iter().take(parts).enumerate().map(home).collect();
        let document = match homes.is_empty() {
            true => unplaced(rank, &[self.tokens]).remove(0),
            false => spanning(rank, index, &homes),
        };
        v1::Document { tick: self.tick, id: Some(v1::DocumentId { rank, index }), ..document }
    }
}

prop_compose! {
    fn draw()(
        tokens in prop_oneof![1usize..5, 1usize..300, 300usize..3000, 3000usize..30_000],
        tick in 0u32..2,
        submitter in any::<Index>(),
        pinned in prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(any::<Index>(), 1..5)],
    ) -> Draw {
        Draw { tokens, tick, submitter, pinned }
    }
}

fn submissions(draws: &[Draw], ranks: usize) -> Vec<Vec<v1::Document>> {
    let mut submissions = vec![Vec::new(); ranks];
    for draw in draws {
        let rank = draw.submitter.index(ranks);
        let document = draw.document(rank as u32, submissions[rank].len() as u32, ranks);
        submissions[rank].push(document);
    }
    submissions
}

/// Whether some rank is home of more than it may hold, in a tick where homes are to be chosen.
fn exceeds(submitted: &[Vec<v1::Document>], slack: f64) -> bool {
    let ranks = submitted.len();
    (0..2).any(|tick| {
        let here = || submitted.iter().flatten().filter(|document| document.tick == tick);
        let all = here().map(|document| document.tokens as usize).sum();
        let of_rank = |rank: usize| -> u64 {
            let homes = here().flat_map(|document| &document.homes).filter(|home| home.rank == rank as u32);
            homes.map(|home| home.tokens.unwrap().end - home.tokens.unwrap().start).sum()
        };
        let free = here().any(|document| document.homes.is_empty());
        free && (0..ranks).any(|rank| of_rank(rank) as usize > most(all, ranks, slack))
    })
}

/// Rates under which attention is balanced whatever it moves, stays where it is, or something in between.
fn rates() -> impl Strategy<Value = Option<v1::Rates>> {
    let of = |bytes_per_second| Some(v1::Rates { flops_per_second: 1e12, bytes_per_second });
    prop_oneof![Just(None), Just(of(1.0)), Just(of(1e9))]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn all_ranks_get_consistent_parts(
        draws in prop::collection::vec(draw(), 1..16), ranks in 1usize..6, rates in rates(),
        slack in prop_oneof![Just(0.0), Just(0.02), 0.0f64..1.0],
    ) {
        let submitted = submissions(&draws, ranks);
        let join = |rank| v1::JoinJobRequest { rates, ..join_placing("job", rank, ranks as u32, slack) };
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let coordinator = Coordinator::start(patient()).await;
            let job = coordinator.start_with((0..ranks as u32).map(join).collect()).await;
            if exceeds(&submitted, slack) {
                let error = refused(&coordinator, job, &submitted).await;
                assert!(error.message.contains("job job: step 0: rank "), "{error}");
                assert!(error.message.contains("the most; it may hold "), "{error}");
            } else {
                let first = step(&coordinator, job, 0, &submitted, slack).await;
                let second = step(&coordinator, job, 1, &submitted, slack).await;
                assert_eq!(cuts(&first), cuts(&second), "the same documents, the same plan");
            }
        });
    }
}
