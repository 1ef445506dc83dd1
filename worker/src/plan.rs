//! A rank's part of a step's plan, checked against what the rank submitted.

use std::collections::BTreeMap;

use outboard_attention::{Document, DocumentId, HeadGeometry, Mask, PlannedTask, StepPlan, Task, TickPlan};
use outboard_proto::AssignedTask;
use outboard_proto::v1::{PlanSummary, ServerInfo, SubmitStepResponse};

use crate::{LayerCall, Placed};

/// A task of this rank's documents and the server that computes it.
#[derive(Clone, Debug)]
pub(crate) struct PlacedTask {
    pub(crate) tick: u32,
    pub(crate) planned: PlannedTask,
    pub(crate) task: Task,
    pub(crate) server: u64,
}

/// Everything a rank needs to know of a step's plan.
#[derive(Clone, Debug)]
pub(crate) struct RankPlan {
    pub(crate) epoch: u64,
    /// What the rank submitted.
    pub(crate) documents: Vec<Document>,
    /// In plan order.
    pub(crate) tasks: Vec<PlacedTask>,
    /// Servers of the plan, and those that may take over.
    pub(crate) servers: BTreeMap<u64, ServerInfo>,
    pub(crate) summary: PlanSummary,
}

impl RankPlan {
    /// Reads a plan. It must compute every cell of `documents` exactly once, on servers that it lists.
    pub(crate) fn new(
        response: SubmitStepResponse,
        documents: Vec<Document>,
        geometry: &HeadGeometry,
        slots: u32,
    ) -> Result<RankPlan, String> {
        let servers: BTreeMap<_, _> = response.servers.into_iter().map(|s| (s.id, s)).collect();
        let masks: BTreeMap<DocumentId, Mask> =
            documents.iter().map(|d| (d.id(), d.mask(geometry.kv_heads()))).collect();
        let mut tasks = Vec::with_capacity(response.tasks.len());
        let mut ticks: BTreeMap<u32, TickPlan> = BTreeMap::new();
        for wire in response.tasks {
            let assigned = AssignedTask::try_from(wire).map_err(|e| e.message)?;
            let AssignedTask { tick, server_id: server, task: planned } = assigned;
            let document = planned.document;
            let mask = masks.get(&document).ok_or(format!("document {document} was not submitted"))?;
            let task = planned.task(mask).map_err(|e| format!("document {document}: {e}"))?;
            if !servers.contains_key(&server) {
                return Err(format!(
                    "a task of document {document} is on server {server}, which is not listed"
                ));
            }
            ticks.entry(tick).or_insert(TickPlan { tick, tasks: Vec::new() }).tasks.push(planned);
            tasks.push(PlacedTask { tick, planned, task, server });
        }
        let plan = StepPlan { ticks: ticks.into_values().collect(), slots };
        plan.check(&documents, geometry).map_err(|e| e.to_string())?;
        let summary = response.summary.ok_or("it has no summary")?;
        Ok(RankPlan { epoch: response.plan_epoch, documents, tasks, servers, summary })
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

    /// Checks that a call asks for what was submitted, no more and no less: then the plan computes all of it.
    pub(crate) fn check_call(&self, call: &LayerCall) -> Result<(), String> {
        let asked: BTreeMap<DocumentId, usize> =
            call.documents.iter().map(|d| (d.id, d.rows.len())).collect();
        if asked.len() != call.documents.len() {
            return Err("the call names a document twice".to_owned());
        }
        let of_tick = self.documents.iter().filter(|d| d.tick() == call.tick);
        let submitted: BTreeMap<DocumentId, usize> = of_tick.map(|d| (d.id(), d.tokens())).collect();
        let differs = |&(id, tokens): &(&DocumentId, &usize)| asked.get(id) != Some(tokens);
        if let Some((id, tokens)) = submitted.iter().find(differs) {
            let asked = asked.get(id).map_or("none".to_owned(), usize::to_string);
            return Err(format!(
                "document {id} was submitted with {tokens} tokens for tick {}, the call has {asked}",
                call.tick
            ));
        }
        match asked.keys().find(|id| !submitted.contains_key(id)) {
            Some(id) => {
                Err(format!("the call has document {id}, which was not submitted for tick {}", call.tick))
            }
            None => Ok(()),
        }
    }
}
