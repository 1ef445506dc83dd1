//! What stays where it is when servers join and leave, as a property of pool, job and placement together.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use outboard_attention::{DType, Document, DocumentId, HeadGeometry, HomeRange, PlannedTask, Span};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use crate::Options;
use crate::job::{Job, JobId};
use crate::placement::{Assignment, weights};
use crate::planning::{PlanInput, PlannedStep, plan_step};
use crate::pool::Pool;
use crate::server::{InPlace, ServerId, ServerSpec};
use crate::slots::SlotSpec;
use crate::terms::{RankSpec, Terms};

const JOB: &str = "job";
const LEASE: Duration = Duration::from_secs(10);

/// What happens to the pool between two steps. Servers are named by their place among those that are there.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// A dedicated server joins.
    Joins,
    /// The lease of a dedicated server, or of one that drains, ends.
    Leaves(usize),
    /// A server is told to drain.
    Drains(usize),
    /// A rank gives a server up.
    IsGivenUp(usize),
    /// All servers that a rank gave up prove themselves alive.
    Return,
}

/// A job and what happens to its pool.
#[derive(Clone, Debug)]
struct Case {
    /// The tokens of each rank's documents.
    lengths: Vec<Vec<usize>>,
    /// Which ranks have an in-place server.
    in_place: Vec<bool>,
    /// Dedicated servers at first.
    dedicated: usize,
    /// Weights of the dedicated slots where the job declares its slots, those of ranks before them.
    declared: Option<Vec<f64>>,
    events: Vec<Event>,
}

/// A pool that comes and goes, and one job that it serves.
struct World {
    pool: Pool,
    job: Job,
    now: Instant,
    options: Options,
    joined: usize,
}

impl World {
    fn new(case: &Case) -> World {
        let (now, options) = (Instant::now(), Options { lease: LEASE, ..Options::default() });
        let ranks = case.in_place.len() as u32;
        let with_server = (0..ranks).filter(|&rank| case.in_place[rank as usize]);
        let slots = case.declared.as_ref().map(|weights| {
            let heavy = |rank: u32| SlotSpec { weight: f64::from(rank + 1), ..SlotSpec::of(Some(rank)) };
            let dedicated = weights.iter().map(|&weight| SlotSpec { weight, ..SlotSpec::of(None) });
            with_server.clone().map(heavy).chain(dedicated).collect()
        });
        let terms = Terms {
            job: JOB.into(),
            ranks,
            geometry: HeadGeometry::standard(8, 2, 64).unwrap(),
            slots: slots.unwrap_or_default(),
            min_servers: 0,
            rates: None,
            placement: None,
        };
        let job = Job::new(JobId(1), terms.clone(), now);
        let mut world = World { pool: Pool::new(LEASE, 1 << 10, 1), job, now, options, joined: 0 };
        with_server.for_each(|rank| world.register(Some(rank)));
        (0..case.dedicated).for_each(|_| world.register(None));
        for rank in 0..ranks {
            world.job.join(&RankSpec::of(rank), &terms, &world.options, now).unwrap();
        }
        world.job.advance(&world.pool, &world.options, now);
        world
    }

    fn register(&mut self, rank: Option<u32>) {
        self.joined += 1;
        let spec = ServerSpec {
            host: String::new(),
            address: format!("host:{}", self.joined),
            socket: String::new(),
            device: "cpu".into(),
            memory_bytes: 1,
            numerics: BTreeMap::from([(DType::F32, "cpu-test".into())]),
            max_head_dim: 128,
            in_place: rank.map(|rank| InPlace { job: JOB.into(), rank }),
        };
        self.pool.register(spec, self.now).unwrap();
    }

    fn happens(&mut self, event: Event) {
        let servers = self.pool.list(self.now);
        let at = |n: usize| (!servers.is_empty()).then(|| &servers[n % servers.len()]);
        match event {
            Event::Joins => self.register(None),
            Event::Drains(n) => {
                at(n).into_iter().for_each(|server| self.pool.drain(server.id).unwrap());
            }
            Event::IsGivenUp(n) => {
                at(n).into_iter().for_each(|server| self.pool.suspect(server.id, self.now));
            }
            Event::Leaves(n) => {
                // A job whose rank is lost is over.
                let gone = at(n).filter(|server| server.draining || server.spec.in_place.is_none());
                self.half_a_lease_passes(gone.map(|server| server.id));
                self.half_a_lease_passes(gone.map(|server| server.id));
            }
            Event::Return => {
                self.half_a_lease_passes(None);
                self.half_a_lease_passes(None);
            }
        }
    }

    /// All servers but one renew their leases.
    fn half_a_lease_passes(&mut self, but: Option<ServerId>) {
        self.now += LEASE / 2;
        for server in self.pool.list(self.now) {
            if Some(server.id) != but {
                self.pool.heartbeat(server.id, self.now).unwrap();
            }
        }
        for gone in self.pool.expire(self.now) {
            self.job.server_gone(&gone, self.now);
        }
    }

    /// What the next step would be planned with; none while nobody takes its tasks.
    fn next_plan(&mut self, step: u64, lengths: &[Vec<usize>]) -> Option<PlanInput> {
        for (rank, lengths) in (0..).zip(lengths) {
            self.job.submit(rank, step, documents(rank, lengths), self.now).unwrap();
        }
        self.job.next_plan(&self.pool, &self.options, self.now)
    }

    fn planned(&mut self, step: u64, plan: PlannedStep) {
        self.job.planned(step, Ok(plan), self.now);
        (0..self.job.facts().ranks).for_each(|rank| self.job.fetched(rank, step));
    }
}

fn documents(rank: u32, lengths: &[usize]) -> Arc<Vec<Document>> {
    let document = |(index, &tokens)| {
        let home = HomeRange { rank, tokens: Span::to(tokens) };
        Document::new(DocumentId { rank, index }, tokens, vec![home]).unwrap()
    };
    Arc::new((0..).zip(lengths).map(document).collect())
}

/// Plans a step after each event and checks it against the one before.
fn check(case: &Case) -> Result<(), TestCaseError> {
    let mut world = World::new(case);
    let (mut before, mut epoch) = (Assignment::default(), 0);
    let mut cuts: Option<Vec<PlannedTask>> = None;
    let mut step = 0;
    for event in [None].into_iter().chain(case.events.iter().copied().map(Some)) {
        event.into_iter().for_each(|event| world.happens(event));
        let Some(input) = world.next_plan(step, &case.lengths) else { continue };
        let plan = plan_step(&input).unwrap();
        check_slots(&before, &input)?;
        check_tasks(&input, &plan)?;
        let now: Vec<PlannedTask> = plan.tasks.iter().map(|placed| placed.task).collect();
        prop_assert_eq!(cuts.get_or_insert_with(|| now.clone()), &now, "cuts follow the pool");
        let grows = before != Assignment::default() && before != input.assignment;
        prop_assert_eq!(plan.plan_epoch, epoch + u64::from(grows));
        (before, epoch) = (input.assignment.clone(), plan.plan_epoch);
        world.planned(step, plan);
        step += 1;
    }
    prop_assert!(step > 0, "nothing was planned");
    Ok(())
}

/// No slot leaves a server that still takes tasks, and no more of the others get one than there are servers without.
fn check_slots(before: &Assignment, input: &PlanInput) -> Result<(), TestCaseError> {
    let (slots, after) = (&input.footing.slots, &input.assignment.slots);
    let takes: BTreeSet<ServerId> = input.servers.iter().map(|(id, _)| *id).collect();
    let in_place = |id: &ServerId| input.footing.in_place.values().any(|other| other == id);
    let mut idle: BTreeSet<ServerId> = takes.iter().copied().filter(|id| !in_place(id)).collect();
    let mut open = Vec::new();
    for (n, slot) in slots.iter().enumerate() {
        let was = before.slots.get(n).copied().flatten();
        match (slot.rank, was.filter(|id| takes.contains(id))) {
            (Some(rank), _) => {
                let own = input.footing.in_place.get(&rank).copied().filter(|id| takes.contains(id));
                prop_assert_eq!(after[n], own, "slot {} belongs to rank {}", n, rank);
            }
            (None, Some(id)) => {
                prop_assert_eq!(after[n], Some(id), "slot {} must not move", n);
                prop_assert!(idle.remove(&id), "{id} has two slots");
            }
            (None, None) => open.push(n),
        }
    }
    let filled: Vec<ServerId> = open.iter().filter_map(|&n| after[n]).collect();
    prop_assert_eq!(filled.len(), open.len().min(idle.len()));
    for id in filled {
        prop_assert!(idle.remove(&id), "{id} takes no tasks, or has a slot already");
    }
    let spread = match after.contains(&None) {
        true => takes.into_iter().collect(),
        false => Vec::new(),
    };
    prop_assert_eq!(&input.assignment.spread, &spread);
    Ok(())
}

/// Tasks are on their slot's server, and those of slots without one go where they even the loads out, and no further.
fn check_tasks(input: &PlanInput, plan: &PlannedStep) -> Result<(), TestCaseError> {
    let assignment = &input.assignment;
    let masks: BTreeMap<DocumentId, _> = (input.submissions.iter())
        .flat_map(|documents| documents.iter())
        .map(|document| (document.id(), document.mask(input.geometry.kv_heads())))
        .collect();
    let weights = weights(assignment.spread.iter().copied(), &input.footing.slots, assignment);
    let mut cells: BTreeMap<ServerId, u64> = BTreeMap::new();
    let mut least_spread: BTreeMap<ServerId, u64> = BTreeMap::new();
    for placed in &plan.tasks {
        let task = &placed.task;
        let size = masks[&task.document].clip(task.q, task.kv, task.kv_heads).cells();
        *cells.entry(placed.server).or_default() += size;
        match assignment.slots[task.slot as usize] {
            Some(owner) => prop_assert_eq!(placed.server, owner, "slot {}", task.slot),
            None => {
                prop_assert!(weights.contains_key(&placed.server), "{} takes no tasks", placed.server);
                let least = least_spread.entry(placed.server).or_insert(size);
                *least = size.min(*least);
            }
        }
    }
    let level = |id: &ServerId, less: u64| (cells.get(id).copied().unwrap_or(0) - less) as f64 / weights[id];
    for (id, &least) in &least_spread {
        for other in weights.keys() {
            // Without the last that it got, it was no busier than anybody.
            prop_assert!(level(id, least) <= level(other, 0) * (1.0 + 1e-9), "{id} has more than {other}");
        }
    }
    Ok(())
}

prop_compose! {
    fn cases()(ranks in 1usize..5)(
        lengths in prop::collection::vec(prop::collection::vec(1usize..400, 0..4), ranks),
        in_place in prop::collection::vec(any::<bool>(), ranks),
        dedicated in 0usize..5,
        weights in prop::option::of(prop::collection::vec(0.25f64..4.0, 1..6)),
        events in prop::collection::vec(
            prop_oneof![
                3 => Just(Event::Joins),
                2 => (0usize..16).prop_map(Event::Leaves),
                2 => (0usize..16).prop_map(Event::Drains),
                2 => (0usize..16).prop_map(Event::IsGivenUp),
                1 => Just(Event::Return),
            ],
            1..10,
        ),
    ) -> Case {
        let nobody = dedicated == 0 && !in_place.contains(&true);
        let dedicated = if nobody || weights.is_some() { dedicated.max(1) } else { dedicated };
        Case { lengths, in_place, dedicated, declared: weights, events }
    }
}

proptest! {
    #[test]
    fn nothing_moves_that_need_not(case in cases()) {
        check(&case)?;
    }
}
