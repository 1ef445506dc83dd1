//! A rank's part of a step's plan, checked against what the rank submitted.

use std::collections::{BTreeMap, BTreeSet};

use outboard_attention::{
    Document, DocumentId, HeadGeometry, HomeRange, Mask, PlannedTask, Span, StepPlan, Task, TickPlan,
};
use outboard_proto::v1::{PlanSummary, ServerInfo, SubmitStepResponse};
use outboard_proto::{AssignedTask, KeyHome};

use crate::{LayerCall, Placed};

/// Tokens of a document that a rank is home of, without a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holding {
    /// The document.
    pub document: DocumentId,
    /// Positions in it.
    pub tokens: Span,
    /// Tokens of the whole document.
    pub length: usize,
    /// Its nano-batch.
    pub tick: u32,
}

/// A task of this rank's rows and the server that computes it.
#[derive(Clone, Debug)]
pub(crate) struct PlacedTask {
    pub(crate) tick: u32,
    pub(crate) planned: PlannedTask,
    pub(crate) task: Task,
    pub(crate) server: u64,
    /// Where its keys lie, when not all of them are here: an index of [`RankPlan::fetches`].
    pub(crate) fetch: Option<usize>,
    /// Tasks of its reduction group, if one server computes them all; else 0.
    pub(crate) group_tasks: u32,
}

/// Keys that tasks read, and which these are.
struct Hull {
    keys: Span,
    tasks: Vec<usize>,
}

/// Keys that a server fetches for tasks of this rank: the hull of what those of one document and kv-head range need.
#[derive(Clone, Debug)]
pub(crate) struct Fetch {
    pub(crate) tick: u32,
    /// The homes of its tokens, in order.
    pub(crate) homes: Vec<KeyHome>,
}

/// A reduction group's share of the gradients of a run of keys that this rank is home of, which servers deliver: as one
/// sum, or each task's alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) document: DocumentId,
    pub(crate) kv_heads: Span,
    /// The run.
    pub(crate) run: Span,
    /// Those of the run's keys that any task reads.
    pub(crate) tokens: Span,
    /// Home of the group's queries, for messages.
    pub(crate) owner: u32,
    /// By position: the keys that a task reads.
    pub(crate) tasks: BTreeMap<u32, Span>,
}

/// Names a share within a tick: its group, and where the run begins.
pub(crate) type ShareKey = (u32, usize);

/// The shares of a rank, by tick.
pub(crate) type Shares = BTreeMap<u32, BTreeMap<ShareKey, Share>>;

/// What a plan is read with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading<'a> {
    pub(crate) rank: u32,
    pub(crate) geometry: &'a HeadGeometry,
    pub(crate) slots: u32,
    /// Where each rank's home listens; none in a job without placement.
    pub(crate) home_addresses: &'a [String],
}

/// Everything a rank needs to know of a step's plan.
#[derive(Clone, Debug)]
pub(crate) struct RankPlan {
    pub(crate) epoch: u64,
    /// What the rank holds, in order of document and token.
    pub(crate) holdings: Vec<Holding>,
    /// Tasks whose queries it holds, in plan order.
    pub(crate) tasks: Vec<PlacedTask>,
    pub(crate) fetches: Vec<Fetch>,
    pub(crate) shares: Shares,
    /// Servers of the plan, and those that may take over.
    pub(crate) servers: BTreeMap<u64, ServerInfo>,
    pub(crate) summary: PlanSummary,
}

/// A document, its mask, and which rank holds what of it.
struct Known {
    document: Document,
    mask: Mask,
    runs: Vec<HomeRange>,
}

impl Known {
    fn new(document: Document, geometry: &HeadGeometry) -> Known {
        let mask = document.mask(geometry.kv_heads());
        let runs = runs(&document);
        Known { document, mask, runs }
    }

    /// The run that all of `tokens` lie in.
    fn run_of(&self, tokens: Span) -> Option<HomeRange> {
        self.runs.iter().find(|run| run.tokens.covers(tokens)).copied()
    }

    fn held_by(&self, rank: u32) -> impl Iterator<Item = Span> {
        self.runs.iter().filter(move |run| run.rank == rank).map(|run| run.tokens)
    }
}

/// The homes of a document, with neighbours of one rank as one.
fn runs(document: &Document) -> Vec<HomeRange> {
    let mut runs: Vec<HomeRange> = Vec::new();
    for home in document.homes() {
        match runs.last_mut() {
            Some(run) if run.rank == home.rank => run.tokens = run.tokens.hull(home.tokens),
            _ => runs.push(*home),
        }
    }
    runs
}

impl RankPlan {
    /// Reads a plan. It must compute every cell of the rank's rows, and of the columns of its keys, exactly once, on
    /// servers that it lists.
    pub(crate) fn new(
        response: SubmitStepResponse,
        submitted: Vec<Document>,
        reading: Reading<'_>,
    ) -> Result<RankPlan, String> {
        let SubmitStepResponse { plan_epoch, tasks, servers, summary, documents } = response;
        let documents = known(documents, submitted, reading)?;
        let servers: BTreeMap<_, _> = servers.into_iter().map(|s| (s.id, s)).collect();
        let holdings = documents.values().flat_map(|known| {
            let (document, length, tick) =
                (known.document.id(), known.document.tokens(), known.document.tick());
            known.held_by(reading.rank).map(move |tokens| Holding { document, tokens, length, tick })
        });
        let mut plan = RankPlan {
            epoch: plan_epoch,
            holdings: holdings.collect(),
            tasks: Vec::with_capacity(tasks.len()),
            fetches: Vec::new(),
            shares: Shares::new(),
            servers,
            summary: summary.ok_or("it has no summary")?,
        };
        let mut all = Vec::with_capacity(tasks.len());
        for wire in tasks {
            let assigned = AssignedTask::try_from(wire).map_err(|e| e.message)?;
            plan.take(assigned, &documents, reading)?;
            all.push(assigned);
        }
        let elsewhere = elsewhere(&all, &documents);
        plan.find_fetches(&elsewhere, &documents, reading)?;
        plan.find_shares(&all, &elsewhere, &documents, reading)?;
        check(&all, &documents, reading)?;
        Ok(plan)
    }

    /// Takes a task in, if this rank holds its queries.
    fn take(
        &mut self,
        assigned: AssignedTask,
        documents: &BTreeMap<DocumentId, Known>,
        reading: Reading<'_>,
    ) -> Result<(), String> {
        let AssignedTask { tick, server_id: server, task: planned } = assigned;
        let document = planned.document;
        let known = documents.get(&document).ok_or(format!("document {document} was not submitted"))?;
        if !self.servers.contains_key(&server) {
            return Err(format!("a task of document {document} is on server {server}, which is not listed"));
        }
        let owner = known.run_of(planned.q).ok_or_else(|| {
            format!("queries {} of document {document} are one task, and lie on several ranks", planned.q)
        })?;
        if owner.rank == reading.rank {
            let task = planned.task(&known.mask).map_err(|e| format!("document {document}: {e}"))?;
            self.tasks.push(PlacedTask { tick, planned, task, server, fetch: None, group_tasks: 0 });
        }
        Ok(())
    }

    /// Says for which tasks servers fetch which keys: for those of every group of which some task reads keys that others
    /// hold, so that all of a group's gradients go the same way.
    fn find_fetches(
        &mut self,
        elsewhere: &Elsewhere,
        documents: &BTreeMap<DocumentId, Known>,
        reading: Reading<'_>,
    ) -> Result<(), String> {
        // By tick, server, document and kv heads: the keys, and the tasks that read some of them.
        let mut hulls: BTreeMap<(u32, u64, DocumentId, Span), Hull> = BTreeMap::new();
        let mut servers: BTreeMap<(u32, u32), Vec<u64>> = BTreeMap::new();
        for (n, placed) in self.tasks.iter().enumerate() {
            let PlannedTask { document, kv, kv_heads, group, .. } = placed.planned;
            servers.entry((placed.tick, group)).or_default().push(placed.server);
            if elsewhere.contains(&(placed.tick, group)) {
                let key = (placed.tick, placed.server, document, kv_heads);
                let hull = hulls.entry(key).or_insert_with(|| Hull { keys: kv, tasks: Vec::new() });
                hull.keys = hull.keys.hull(kv);
                hull.tasks.push(n);
            }
        }
        for placed in &mut self.tasks {
            // A sum is that of a whole group, or none: home tells no other sums apart.
            let servers = servers.get(&(placed.tick, placed.planned.group)).map_or(&[][..], |s| s);
            let together = servers.iter().all(|server| *server == placed.server);
            placed.group_tasks = if together { servers.len() as u32 } else { 0 };
        }
        for ((tick, _, document, _), Hull { keys, tasks }) in hulls {
            let home = |run: &HomeRange| {
                let tokens = run.tokens.intersect(keys);
                let address = reading.home_addresses.get(run.rank as usize).ok_or_else(|| {
                    format!("document {document} has a home on rank {}, whose address is not known", run.rank)
                });
                (!tokens.is_empty())
                    .then(|| Ok(KeyHome { tokens, rank: run.rank, address: address?.clone() }))
            };
            let homes = documents[&document].runs.iter().filter_map(home).collect::<Result<_, String>>()?;
            tasks.into_iter().for_each(|n| self.tasks[n].fetch = Some(self.fetches.len()));
            self.fetches.push(Fetch { tick, homes });
        }
        Ok(())
    }

    /// Lists the shares of gradients that servers will deliver here: of every group that reads keys which others than the
    /// home of its queries hold, for each run of this rank's keys among them.
    fn find_shares(
        &mut self,
        tasks: &[AssignedTask],
        elsewhere: &Elsewhere,
        documents: &BTreeMap<DocumentId, Known>,
        reading: Reading<'_>,
    ) -> Result<(), String> {
        let shared =
            tasks.iter().filter(|assigned| elsewhere.contains(&(assigned.tick, assigned.task.group)));
        for AssignedTask { tick, task, .. } in shared {
            let PlannedTask { document, q, kv, kv_heads, group, position, .. } = *task;
            let known = &documents[&document];
            let Some(owner) = known.run_of(q).map(|run| run.rank) else { continue };
            for run in known.held_by(reading.rank) {
                let tokens = run.intersect(kv);
                if tokens.is_empty() {
                    continue;
                }
                let new = Share { document, kv_heads, run, tokens, owner, tasks: BTreeMap::new() };
                let shares = self.shares.entry(*tick).or_default();
                let share = shares.entry((group, run.start())).or_insert_with(|| new.clone());
                share.tokens = share.tokens.hull(tokens);
                let same = (share.document, share.kv_heads, share.owner) == (document, kv_heads, owner);
                if !same || share.tasks.insert(position, tokens).is_some() {
                    return Err(format!(
                        "tasks of group {group} in tick {tick} are not of one kind and number"
                    ));
                }
            }
        }
        Ok(())
    }

    /// How much of it each server has, in order of server.
    pub(crate) fn placed(&self) -> Vec<Placed> {
        let mut cells: BTreeMap<u64, u64> = BTreeMap::new();
        for placed in &self.tasks {
            *cells.entry(placed.server).or_default() += placed.task.cells();
        }
        let rank = |server: u64| self.servers.get(&server).and_then(|info| info.rank);
        cells.into_iter().map(|(server, cells)| Placed { server, rank: rank(server), cells }).collect()
    }

    /// Checks that a call asks for what the rank holds, no more and no less: then the plan computes all of it.
    pub(crate) fn check_call(&self, call: &LayerCall) -> Result<(), String> {
        let asked: BTreeMap<(DocumentId, usize), usize> =
            call.documents.iter().map(|d| ((d.id, d.first_token), d.rows.len())).collect();
        if asked.len() != call.documents.len() {
            return Err("the call names tokens twice".to_owned());
        }
        let of_tick = self.holdings.iter().filter(|held| held.tick == call.tick);
        let held: BTreeMap<(DocumentId, usize), usize> =
            of_tick.map(|held| ((held.document, held.tokens.start()), held.tokens.len())).collect();
        let differs = |&(at, tokens): &(&(DocumentId, usize), &usize)| asked.get(at) != Some(tokens);
        if let Some(((id, first), tokens)) = held.iter().find(differs) {
            let asked = asked.get(&(*id, *first)).map_or("none".to_owned(), usize::to_string);
            return Err(format!(
                "this rank holds {tokens} tokens of document {id} from token {first} in tick {}, the call has {asked}",
                call.tick
            ));
        }
        match asked.keys().find(|at| !held.contains_key(at)) {
            Some((id, first)) => Err(format!(
                "the call has document {id} from token {first}, which this rank does not hold in tick {}",
                call.tick
            )),
            None => Ok(()),
        }
    }
}

/// Groups, by tick and number, that read keys which others than the home of their queries hold.
type Elsewhere = BTreeSet<(u32, u32)>;

fn elsewhere(tasks: &[AssignedTask], documents: &BTreeMap<DocumentId, Known>) -> Elsewhere {
    let reads = |assigned: &&AssignedTask| {
        let PlannedTask { document, q, kv, .. } = assigned.task;
        let run = documents.get(&document).and_then(|known| known.run_of(q));
        run.is_some_and(|run| !run.tokens.covers(kv))
    };
    tasks.iter().filter(reads).map(|assigned| (assigned.tick, assigned.task.group)).collect()
}

/// The documents of a plan: as submitted, or, where the planner chooses homes, as it sent them.
fn known(
    documents: Vec<outboard_proto::v1::Document>,
    submitted: Vec<Document>,
    reading: Reading<'_>,
) -> Result<BTreeMap<DocumentId, Known>, String> {
    let known = |document: Document| (document.id(), Known::new(document, reading.geometry));
    if reading.home_addresses.is_empty() {
        return Ok(submitted.into_iter().map(known).collect());
    }
    let submitted: BTreeMap<DocumentId, Document> = submitted.into_iter().map(|d| (d.id(), d)).collect();
    let placed = |wire| {
        let document = Document::try_from(wire).map_err(|e: outboard_proto::TaskError| e.message)?;
        let id = document.id();
        if !document.is_placed() {
            return Err(format!("document {id} came back without homes"));
        }
        let mine = id.rank == reading.rank;
        let same = match submitted.get(&id) {
            Some(before) => before.clone().with_homes(document.homes().to_vec()).is_ok_and(|b| b == document),
            None => !mine,
        };
        if same {
            Ok(known(document))
        } else {
            Err(format!("document {id} is not as this rank submitted it"))
        }
    };
    documents.into_iter().map(placed).collect()
}

/// Checks that tasks compute every cell of the rank's rows once, and every cell of the columns of its keys.
fn check(
    tasks: &[AssignedTask],
    documents: &BTreeMap<DocumentId, Known>,
    reading: Reading<'_>,
) -> Result<(), String> {
    let spans = documents.values().flat_map(|known| {
        let all = Span::to(known.document.tokens());
        let runs: Vec<Span> = known.held_by(reading.rank).collect();
        let rows = runs.iter().map(|run| (known, *run, all)).collect::<Vec<_>>();
        // Whoever holds all rows has checked all columns.
        let columns = runs.into_iter().filter(|run| *run != all).map(|run| (known, all, run));
        rows.into_iter().chain(columns.collect::<Vec<_>>())
    });
    let mut by_document: BTreeMap<DocumentId, Vec<&AssignedTask>> = BTreeMap::new();
    tasks.iter().for_each(|task| by_document.entry(task.task.document).or_default().push(task));
    for (known, q, kv) in spans {
        let heads = Span::to(reading.geometry.kv_heads());
        let document = known.document.clone().with_mask(known.mask.clip(q, kv, heads));
        let document = document.map_err(|e| e.to_string())?;
        let mut ticks: BTreeMap<u32, Vec<PlannedTask>> = BTreeMap::new();
        for assigned in by_document.get(&document.id()).into_iter().flatten() {
            let PlannedTask { q: rows, kv: keys, kv_heads, .. } = assigned.task;
            let (q, kv) = (rows.intersect(q), keys.intersect(kv));
            if known.mask.clip(q, kv, kv_heads).cells() > 0 {
                ticks.entry(assigned.tick).or_default().push(PlannedTask { q, kv, ..assigned.task });
            }
        }
        let ticks = ticks.into_iter().map(|(tick, tasks)| TickPlan { tick, tasks }).collect();
        let plan = StepPlan { ticks, slots: reading.slots };
        plan.check(&[document], reading.geometry).map_err(|e| e.to_string())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
