//! Requests and answers, wire <-> domain. From the wire everything is checked; an error names the field and its values.

use std::collections::BTreeMap;

use outboard_attention::{DType, Document, HeadGeometry};
use outboard_planner::Rates;
use outboard_proto::{AssignedTask, v1};

use crate::Error;
use crate::documents::Facts;
use crate::gathering::Joined;
use crate::handle::{RankPlan, Submission};
use crate::job::JobId;
use crate::planning::Summary;
use crate::pool::{Candidate, PoolEntry};
use crate::report::{ServerReport, StepReport};
use crate::server::{InPlace, ServerId, ServerSpec};
use crate::slots::SlotSpec;
use crate::terms::{Placement, RankSpec, Terms};

/// Most mask slices of one document, and of a rank's documents of one step.
const MAX_SLICES: usize = 1 << 16;

fn required<T>(field: &str, value: Option<T>) -> Result<T, Error> {
    value.ok_or_else(|| Error::invalid(format!("{field} is missing; it must be given")))
}

fn dtype(field: &str, value: i32) -> Result<DType, Error> {
    let known = v1::DType::try_from(value);
    let known = known.map_err(|_| {
        Error::invalid(format!("{field} is {value}, which is no DType of this protocol version"))
    })?;
    DType::try_from(known).map_err(|error| error.context(field))
}

pub(crate) fn server_spec(server: Option<v1::ServerInfo>) -> Result<ServerSpec, Error> {
    let server = required("server", server)?;
    let in_place = match (server.job.is_empty(), server.rank) {
        (true, None) => None,
        (false, Some(rank)) => Some(InPlace { job: server.job, rank }),
        (true, Some(rank)) => {
            let message = format!(
                "server.rank is {rank} and server.job empty; give both for an in-place server, or neither"
            );
            return Err(Error::invalid(message));
        }
        (false, None) => {
            let message = format!(
                "server.job is {:?} and server.rank missing; give both for an in-place server, or neither",
                server.job
            );
            return Err(Error::invalid(message));
        }
    };
    Ok(ServerSpec {
        numerics: numerics(&server.dtypes, server.numerics_ids)?,
        host: server.host,
        address: server.address,
        socket: server.socket,
        device: server.device,
        memory_bytes: server.memory_bytes,
        max_head_dim: server.max_head_dim,
        in_place,
    })
}

fn numerics(dtypes: &[i32], ids: Vec<String>) -> Result<BTreeMap<DType, String>, Error> {
    if dtypes.len() != ids.len() {
        let message = format!(
            "server.numerics_ids holds {} entries and server.dtypes {}; give one id for each element type",
            ids.len(),
            dtypes.len()
        );
        return Err(Error::invalid(message));
    }
    let mut numerics = BTreeMap::new();
    for (n, (&value, id)) in dtypes.iter().zip(ids).enumerate() {
        let dtype = dtype(&format!("server.dtypes[{n}]"), value)?;
        if numerics.insert(dtype, id).is_some() {
            return Err(Error::invalid(format!("server.dtypes[{n}] is {dtype} again; name each once")));
        }
    }
    Ok(numerics)
}

fn server_info((id, spec): &Candidate) -> v1::ServerInfo {
    let place = spec.in_place.as_ref();
    v1::ServerInfo {
        id: id.0,
        host: spec.host.clone(),
        address: spec.address.clone(),
        device: spec.device.clone(),
        memory_bytes: spec.memory_bytes,
        dtypes: spec.numerics.keys().map(|dtype| v1::DType::from(dtype) as i32).collect(),
        max_head_dim: spec.max_head_dim,
        numerics_ids: spec.numerics.values().cloned().collect(),
        job: place.map_or_else(String::new, |p| p.job.clone()),
        rank: place.map(|p| p.rank),
        socket: spec.socket.clone(),
    }
}

pub(crate) fn pool_entry(entry: &PoolEntry) -> v1::list_pool_response::Entry {
    let state = if entry.draining { v1::ServerState::Draining } else { v1::ServerState::Live };
    v1::list_pool_response::Entry {
        server: Some(server_info(&(entry.id, entry.spec.clone()))),
        state: state as i32,
        lease_left_ms: u32::try_from(entry.lease_left.as_millis()).unwrap_or(u32::MAX),
    }
}

pub(crate) fn rank_spec(request: &v1::JoinJobRequest) -> RankSpec {
    RankSpec { rank: request.rank, home_address: request.home_address.clone() }
}

pub(crate) fn terms(request: v1::JoinJobRequest) -> Result<Terms, Error> {
    let slot = |slot: v1::Slot| SlotSpec {
        rank: slot.rank,
        weight: slot.weight,
        memory_bytes: slot.memory_bytes,
        bytes_per_second: slot.bytes_per_second,
    };
    let geometry = required("geometry", request.geometry)?;
    Ok(Terms {
        job: request.job,
        ranks: request.ranks,
        geometry: HeadGeometry::try_from(geometry).map_err(|error| error.context("geometry"))?,
        slots: request.slots.into_iter().map(slot).collect(),
        min_servers: request.min_servers,
        rates: request.rates.map(rates),
        placement: request.placement.map(|v1::Placement { token_slack }| Placement { token_slack }),
    })
}

fn rates(rates: v1::Rates) -> Rates {
    let v1::Rates { flops_per_second, bytes_per_second } = rates;
    Rates { flops_per_second, bytes_per_second }
}

pub(crate) fn joined(joined: &Joined) -> v1::JoinJobResponse {
    let slot = |slot: &SlotSpec| v1::Slot {
        rank: slot.rank,
        weight: slot.weight,
        memory_bytes: slot.memory_bytes,
        bytes_per_second: slot.bytes_per_second,
    };
    v1::JoinJobResponse {
        job_id: joined.job.0,
        slots: joined.slots.iter().map(slot).collect(),
        numerics_id: joined.numerics_id.clone(),
        home_addresses: joined.home_addresses.clone(),
    }
}

/// How many mask slices a request holds: the cost of converting it grows with their square in each document.
pub(crate) fn slices(request: &v1::SubmitStepRequest) -> usize {
    request.documents.iter().map(|document| document.mask.len()).sum()
}

pub(crate) fn submission(request: v1::SubmitStepRequest, facts: &Facts) -> Result<Submission, Error> {
    let v1::SubmitStepRequest { job_id, rank, step, .. } = request;
    let place = |error: Error| error.context(format_args!("job {}, step {step}, rank {rank}", facts.name));
    let (count, most) = (slices(&request), facts.most(MAX_SLICES));
    if count > most {
        let message = format!("documents hold {count} mask slices; at most {most} fit in one submission");
        return Err(place(Error::invalid(message)));
    }
    let documents = request.documents.into_iter().enumerate().map(|(n, wire)| {
        document(wire).map_err(|error| place(error.context(format_args!("documents[{n}]"))))
    });
    let documents = documents.collect::<Result<_, _>>()?;
    Ok(Submission { job: JobId(job_id), rank, step, documents })
}

fn document(document: v1::Document) -> Result<Document, Error> {
    let count = document.mask.len();
    if count > MAX_SLICES {
        let message = format!("mask holds {count} slices; at most {MAX_SLICES} fit in one document");
        return Err(Error::invalid(message));
    }
    Document::try_from(document)
}

pub(crate) fn rank_plan(plan: &RankPlan) -> v1::SubmitStepResponse {
    let task = |placed: &crate::PlacedTask| {
        v1::PlannedTask::from(&AssignedTask {
            tick: placed.tick,
            server_id: placed.server.0,
            task: placed.task,
        })
    };
    v1::SubmitStepResponse {
        plan_epoch: plan.whole.plan_epoch,
        tasks: plan.tasks().map(task).collect(),
        servers: plan.whole.servers.iter().map(server_info).collect(),
        summary: Some(summary(&plan.whole.summary)),
        documents: plan.documents().map(v1::Document::from).collect(),
    }
}

fn summary(summary: &Summary) -> v1::PlanSummary {
    v1::PlanSummary {
        imbalance_before: summary.imbalance_before,
        imbalance_after: summary.imbalance_after,
        tasks: summary.tasks,
        cells: summary.cells,
        plan_seconds: summary.plan_seconds,
        forward_bytes: summary.forward_bytes,
        backward_bytes: summary.backward_bytes,
        tokens_imbalance: summary.tokens_imbalance,
    }
}

pub(crate) fn step_report(request: v1::ReportStepRequest) -> StepReport {
    let server = |server: v1::ServerReport| ServerReport {
        server: ServerId(server.server_id),
        tasks: server.tasks,
        compute_seconds: server.compute_seconds,
        lost: server.lost,
    };
    StepReport {
        job: JobId(request.job_id),
        rank: request.rank,
        step: request.step,
        seconds: request.seconds,
        exposed_seconds: request.exposed_seconds,
        servers: request.servers.into_iter().map(server).collect(),
    }
}
