//! The step barrier of one run: who has submitted what, and which plans are waited for. Pure; time comes in.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outboard_attention::Document;
use outboard_proto::ErrorKind;

use crate::Error;
use crate::planning::PlannedStep;
use crate::text::{listed, ranks};
use crate::verdict::{Awaited, Verdict};

/// Calls that may wait for one step, for each rank: the rank's own and its retries.
const CALLS_PER_RANK: usize = 4;

/// What a run's ranks may ask for, and how long they wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// How many steps a rank may submit ahead of the oldest one that some rank has not received.
    pub(crate) ahead: u32,
    /// How long a step waits for its last rank, or for its plan.
    pub(crate) timeout: Duration,
    /// Most documents of a step, whoever submits them.
    pub(crate) documents: usize,
}

/// The steps of one run that are not over.
#[derive(Debug)]
pub(crate) struct Steps {
    bounds: Bounds,
    /// The step that the run began with.
    first: Option<u64>,
    speakers: Vec<Speaker>,
    /// How many ranks have left.
    left: usize,
    open: BTreeMap<u64, Step>,
    /// When the last step had all its submissions.
    last_complete: Option<Instant>,
}

/// What a rank has said so far.
#[derive(Clone, Copy, Debug, Default)]
struct Speaker {
    last: Option<u64>,
    left: bool,
}

#[derive(Debug)]
struct Step {
    said: BTreeMap<u32, Said>,
    /// How many documents that is.
    documents: usize,
    stage: Stage,
    since: Instant,
    unfetched: usize,
    verdict: Verdict<PlannedStep>,
}

#[derive(Debug)]
struct Said {
    documents: Arc<Vec<Document>>,
    fetched: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Some rank has not spoken.
    Gathering,
    /// All have; to be planned.
    Complete,
    /// Being planned.
    Planning,
    /// Its plan is there.
    Planned,
}

impl Steps {
    pub(crate) fn new(ranks: u32, bounds: Bounds) -> Steps {
        let speakers = vec![Speaker::default(); ranks as usize];
        let (first, left, open, last_complete) = Default::default();
        Steps { bounds, first, speakers, left, open, last_complete }
    }

    /// Takes a rank's documents of a step. The same once more gets the same answer.
    pub(crate) fn submit(
        &mut self,
        rank: u32,
        step: u64,
        documents: Arc<Vec<Document>>,
        now: Instant,
    ) -> Result<Awaited<PlannedStep>, Error> {
        if let Some(open) = self.open.get(&step)
            && let Some(said) = open.said.get(&rank)
        {
            check_same(&said.documents, &documents)?;
            if open.verdict.waiting() >= CALLS_PER_RANK * self.speakers.len() {
                return Err(Error::new(
                    ErrorKind::Busy,
                    "too many calls wait for it already; await one of them",
                ));
            }
            return Ok(open.verdict.awaited());
        }
        self.check_turn(rank, step)?;
        self.make_room(step)?;
        self.check_total(step, documents.len())?;
        let all = self.speakers.len();
        let gathering = || Step {
            said: BTreeMap::new(),
            documents: 0,
            stage: Stage::Gathering,
            since: now,
            unfetched: all,
            verdict: Verdict::new(),
        };
        let open = self.open.entry(step).or_insert_with(gathering);
        open.documents += documents.len();
        open.said.insert(rank, Said { documents, fetched: false });
        if open.said.len() == all {
            (open.stage, open.since) = (Stage::Complete, now);
            self.last_complete = Some(now);
        }
        let awaited = open.verdict.awaited();
        self.first.get_or_insert(step);
        if let Some(speaker) = self.speakers.get_mut(rank as usize) {
            speaker.last = Some(step);
        }
        Ok(awaited)
    }

    /// Every rank submits every step once, in order, from the step that the run began with.
    fn check_turn(&self, rank: u32, step: u64) -> Result<(), Error> {
        if step == u64::MAX {
            return Err(Error::invalid(format!("step is {step}; that is no training step")));
        }
        let last = self.speakers.get(rank as usize).and_then(|s| s.last);
        let Some(expected) = last.map(|last| last + 1).or(self.first) else { return Ok(()) };
        if step < expected && last.is_some() {
            return Err(Error::invalid(format!(
                "the step is over and its plan forgotten; rank {rank} submits step {expected} next"
            )));
        }
        if step != expected {
            let message = format!(
                "rank {rank} submits step {expected} next; steps are submitted in order, the same by all ranks"
            );
            return Err(Error::invalid(message));
        }
        Ok(())
    }

    /// Forgets steps that all ranks have received, when they are old enough that no rank will ask again.
    fn make_room(&mut self, step: u64) -> Result<(), Error> {
        let ahead = u64::from(self.bounds.ahead);
        self.open.retain(|&n, open| open.unfetched > 0 || n.saturating_add(ahead) > step);
        let oldest = self.open.iter().find(|(_, open)| open.unfetched > 0);
        let Some((&oldest, open)) = oldest.filter(|&(&n, _)| step >= n.saturating_add(ahead)) else {
            return Ok(());
        };
        let slow = self.numbered().filter(|(rank, _)| open.said.get(rank).is_none_or(|said| !said.fetched));
        let slow: Vec<u32> = slow.map(|(rank, _)| rank).collect();
        let message = format!(
            "it is {ahead} or more steps ahead of step {oldest}, whose plan has not reached {}; submit it later",
            ranks(&slow)
        );
        Err(Error::new(ErrorKind::Busy, message))
    }

    /// No step has more documents than the run's ranks may submit together.
    fn check_total(&self, step: u64, documents: usize) -> Result<(), Error> {
        let others = self.open.get(&step).map_or(0, |open| open.documents);
        let most = self.bounds.documents;
        if others.saturating_add(documents) <= most {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "{documents} documents come to {others} of other ranks; a step holds at most {most} in all"
        )))
    }

    /// The submissions of the next step to plan, in order of rank; it counts as being planned from now on.
    pub(crate) fn next_complete(&mut self, now: Instant) -> Option<(u64, Vec<Arc<Vec<Document>>>)> {
        let (&step, open) = self.open.iter_mut().find(|(_, open)| open.stage == Stage::Complete)?;
        (open.stage, open.since) = (Stage::Planning, now);
        Some((step, open.said.values().map(|said| said.documents.clone()).collect()))
    }

    /// True when a step waits to be planned.
    pub(crate) fn has_complete(&self) -> bool {
        self.open.values().any(|open| open.stage == Stage::Complete)
    }

    /// Answers all who wait for a step.
    pub(crate) fn planned(&mut self, step: u64, plan: Arc<PlannedStep>) {
        if let Some(open) = self.open.get_mut(&step) {
            open.stage = Stage::Planned;
            open.verdict.give(Ok(plan));
        }
    }

    /// Notes that a rank has received its part.
    pub(crate) fn fetched(&mut self, rank: u32, step: u64) {
        if let Some(open) = self.open.get_mut(&step)
            && let Some(said) = open.said.get_mut(&rank)
            && !std::mem::replace(&mut said.fetched, true)
        {
            open.unfetched -= 1;
        }
    }

    /// Answers all who wait for any step.
    pub(crate) fn fail(&self, error: &Error) {
        self.open.values().for_each(|open| open.verdict.give(Err(error.clone())));
    }

    /// Takes a rank out. True when it was the last one.
    pub(crate) fn leave(&mut self, rank: u32) -> bool {
        if let Some(speaker) = self.speakers.get_mut(rank as usize)
            && !std::mem::replace(&mut speaker.left, true)
        {
            self.left += 1;
        }
        self.left == self.speakers.len()
    }

    /// True when the rank has left.
    pub(crate) fn has_left(&self, rank: u32) -> bool {
        self.speakers.get(rank as usize).is_some_and(|speaker| speaker.left)
    }

    /// Why the oldest step that some rank waits for can never be planned, or is overdue.
    pub(crate) fn stuck(&self, numerics_id: &str, now: Instant) -> Option<Error> {
        let (&step, open) = self.open.iter().find(|(_, open)| open.stage != Stage::Planned)?;
        let limit = self.bounds.timeout.as_secs_f64();
        if open.stage == Stage::Gathering {
            let since = self.last_complete.map_or(open.since, |last| last.max(open.since));
            let late = now.saturating_duration_since(since) >= self.bounds.timeout;
            // Who is missing takes a look at every rank, so it is not asked at every submission.
            return if late || self.left > 0 { self.waits_for(step, open, late) } else { None };
        }
        let late = now.saturating_duration_since(open.since) >= self.bounds.timeout;
        late.then(|| match open.stage {
            Stage::Complete => Error::unavailable(format!(
                "step {step}: no server with numerics id {numerics_id} took its tasks for {limit:.1} s; start some"
            )),
            _ => Error::new(ErrorKind::DeadlineExceeded, format!("step {step}: it was not planned within {limit:.1} s")),
        })
    }

    /// The error that names the ranks a step waits for, if it waits in vain.
    fn waits_for(&self, step: u64, open: &Step, late: bool) -> Option<Error> {
        let missing: Vec<(u32, Speaker)> =
            self.numbered().filter(|(rank, _)| !open.said.contains_key(rank)).collect();
        let message = if let Some((rank, gone)) = missing.iter().find(|(_, speaker)| speaker.left) {
            format!("step {step} cannot be planned: rank {rank} has left the job; it {}", said(gone.last))
        } else if late {
            let names: Vec<u32> = missing.iter().map(|&(rank, _)| rank).collect();
            let lasts =
                listed(missing.iter().map(|(rank, speaker)| format!("rank {rank} {}", said(speaker.last))));
            let (names, limit) = (ranks(&names), self.bounds.timeout.as_secs_f64());
            format!(
                "step {step}: {names} did not submit it within {limit:.1} s ({lasts}); see whether it is lost or stuck"
            )
        } else {
            return None;
        };
        Some(Error::new(ErrorKind::Aborted, message))
    }

    fn numbered(&self) -> impl Iterator<Item = (u32, Speaker)> {
        (0..).zip(self.speakers.iter().copied())
    }
}

/// What a rank has said last, for people.
fn said(last: Option<u64>) -> String {
    last.map_or_else(|| "submitted no step".to_owned(), |step| format!("submitted step {step} last"))
}

fn check_same(before: &[Document], now: &[Document]) -> Result<(), Error> {
    if before.len() != now.len() {
        let message =
            format!("the rank submitted it before with {} documents, now with {}", before.len(), now.len());
        return Err(Error::invalid(message));
    }
    match before.iter().zip(now).position(|(a, b)| a != b) {
        Some(n) => Err(Error::invalid(format!("documents[{n}] differs from what the rank submitted before"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use outboard_attention::DocumentId;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);

    fn steps(ranks: u32, ahead: u32) -> (Steps, Instant) {
        (Steps::new(ranks, Bounds { ahead, timeout: TIMEOUT, documents: 2 }), Instant::now())
    }

    fn none() -> Arc<Vec<Document>> {
        Arc::new(Vec::new())
    }

    fn some(rank: u32, count: u32) -> Arc<Vec<Document>> {
        let document = |index| Document::unplaced(DocumentId { rank, index }, 8).unwrap();
        Arc::new((0..count).map(document).collect())
    }

    #[test]
    fn a_step_holds_so_many_documents_and_no_more() {
        let (mut steps, now) = steps(3, 4);
        steps.submit(0, 0, some(0, 1), now).unwrap();
        let error = steps.submit(1, 0, some(1, 2), now).unwrap_err();
        assert!(
            error.message.contains("2 documents come to 1 of other ranks; a step holds at most 2"),
            "{error}"
        );
        // What was refused can be said better, and a repeated submission counts once.
        steps.submit(1, 0, some(1, 1), now).unwrap();
        steps.submit(1, 0, some(1, 1), now).unwrap();
        steps.submit(2, 0, none(), now).unwrap();
        steps.submit(0, 1, some(0, 2), now).unwrap();
    }

    fn plan_all(steps: &mut Steps, now: Instant) {
        while let Some((step, _)) = steps.next_complete(now) {
            steps.planned(step, Arc::new(PlannedStep::default()));
        }
    }

    #[test]
    fn a_step_is_complete_when_all_ranks_have_spoken() {
        let (mut steps, now) = steps(2, 4);
        let _first = steps.submit(1, 5, none(), now).unwrap();
        assert!(steps.next_complete(now).is_none());
        let _second = steps.submit(0, 5, none(), now).unwrap();
        assert_eq!(steps.next_complete(now).unwrap().0, 5);
        assert!(steps.next_complete(now).is_none(), "it is planned once");
    }

    #[test]
    fn steps_come_in_order_and_bounded() {
        let (mut steps, now) = steps(2, 2);
        steps.submit(0, 3, none(), now).unwrap();
        let error = steps.submit(1, 4, none(), now).unwrap_err();
        assert!(error.message.contains("rank 1 submits step 3 next"), "{error}");
        steps.submit(0, 4, none(), now).unwrap();
        let error = steps.submit(0, 5, none(), now).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Busy);
        assert!(error.message.contains("step 3, whose plan has not reached ranks 0, 1"), "{error}");
        steps.submit(1, 3, none(), now).unwrap();
        plan_all(&mut steps, now);
        (0..2).for_each(|rank| steps.fetched(rank, 3));
        steps.submit(0, 5, none(), now).unwrap();
        assert!(steps.submit(0, u64::MAX, none(), now).is_err());
    }

    #[test]
    fn a_received_step_is_kept_for_retries_for_a_while() {
        let (mut steps, now) = steps(1, 2);
        for step in 0..10 {
            steps.submit(0, step, none(), now).unwrap();
            plan_all(&mut steps, now);
            steps.fetched(0, step);
            assert!(steps.open.len() <= 2);
        }
        steps.submit(0, 8, none(), now).unwrap();
        let error = steps.submit(0, 7, none(), now).unwrap_err();
        assert!(error.message.contains("over"), "{error}");
    }

    #[test]
    fn missing_ranks_are_named_with_their_last_step() {
        let (mut steps, now) = steps(3, 4);
        (0..3).for_each(|rank| drop(steps.submit(rank, 0, none(), now).unwrap()));
        plan_all(&mut steps, now);
        let later = now + TIMEOUT;
        assert!(steps.stuck("id", later).is_none(), "nobody waits");
        steps.submit(0, 1, none(), later).unwrap();
        assert!(steps.stuck("id", later + TIMEOUT / 2).is_none());
        let error = steps.stuck("id", later + TIMEOUT).unwrap();
        assert_eq!(error.kind, ErrorKind::Aborted);
        assert!(error.message.contains("step 1: ranks 1, 2 did not submit it within 10.0 s"), "{error}");
        assert!(error.message.contains("rank 1 submitted step 0 last"), "{error}");
    }

    #[test]
    fn a_step_submitted_early_is_not_late_while_earlier_ones_go_on() {
        let (mut steps, now) = steps(2, 4);
        for step in 0..4 {
            steps.submit(0, step, none(), now).unwrap();
        }
        let slow = now + TIMEOUT * 9 / 10;
        steps.submit(1, 0, none(), slow).unwrap();
        plan_all(&mut steps, slow);
        assert!(steps.stuck("id", now + TIMEOUT * 3 / 2).is_none());
        assert!(steps.stuck("id", slow + TIMEOUT).is_some());
    }

    #[test]
    fn a_rank_that_left_is_named_at_once_when_a_step_needs_it() {
        let (mut steps, now) = steps(2, 4);
        (0..2).for_each(|rank| drop(steps.submit(rank, 0, none(), now).unwrap()));
        assert!(!steps.leave(1));
        assert!(steps.stuck("id", now).is_none(), "it has said all that step 0 needs");
        steps.submit(0, 1, none(), now).unwrap();
        plan_all(&mut steps, now);
        let error = steps.stuck("id", now).unwrap();
        assert!(error.message.contains("rank 1 has left the job; it submitted step 0 last"), "{error}");
        assert!(steps.leave(0));
    }

    #[test]
    fn a_step_that_nobody_takes_fails_in_time() {
        let (mut steps, now) = steps(1, 4);
        steps.submit(0, 0, none(), now).unwrap();
        assert!(steps.stuck("id", now).is_none());
        let error = steps.stuck("id", now + TIMEOUT).unwrap();
        assert_eq!(error.kind, ErrorKind::Unavailable);
    }
}
