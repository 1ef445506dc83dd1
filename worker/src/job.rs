//! A rank's place in a job: it joins, submits its documents, and gets its part of each step's plan.

use std::sync::Arc;
use std::time::Duration;

use outboard_attention::Document;
use outboard_proto::v1::coordinator_service_client::CoordinatorServiceClient;
use outboard_proto::v1::{
    JoinJobRequest, LeaveJobRequest, ReportStepRequest, ServerReport, SubmitStepRequest,
};
use outboard_proto::{ErrorKind, PROTOCOL_VERSION, TaskError, describe};
use tonic::transport::{Channel, Endpoint};

use crate::plan::{RankPlan, Reading};
use crate::{JobOptions, WorkerError};

/// Largest answer taken from the coordinator, in bytes: far above the part of any plan that a rank may submit for.
const MAX_ANSWER_BYTES: usize = 256 << 20;

/// How long a call may take that waits for nobody else.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the coordinator is pinged during a call, and how long the answer may take.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A joined job. Clones share the connection.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    client: CoordinatorServiceClient<Channel>,
    options: JobOptions,
    id: u64,
    numerics_id: String,
    slots: u32,
    /// Where each rank's home listens; none without placement.
    home_addresses: Arc<[String]>,
}

/// What a rank reports of a finished step.
#[derive(Clone, Debug, Default)]
pub(crate) struct StepReport {
    pub(crate) step: u64,
    pub(crate) seconds: f64,
    pub(crate) exposed_seconds: f64,
    pub(crate) servers: Vec<ServerReport>,
}

impl Job {
    /// Joins; returns when all ranks have.
    pub(crate) async fn join(options: JobOptions, home_address: String) -> Result<Job, WorkerError> {
        let failed = |source: TaskError| error(&options, "joining the job".into(), source);
        let endpoint = Endpoint::from_shared(options.coordinator.clone())
            .map_err(|e| failed(TaskError::invalid(format!("{e}; give it as http://host:port"))))?
            .connect_timeout(options.connect_timeout)
            .tcp_nodelay(true)
            // A host that falls silent ends the calls that wait on it.
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE);
        let channel = endpoint.connect().await.map_err(|e| {
            let why = describe(&e);
            failed(TaskError::unavailable(format!("{why}; is `outboard coordinator` running there?")))
        })?;
        // The part of a plan grows with the number of documents; the library refuses answers above 4 MiB by default.
        let mut client = CoordinatorServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
        let request = JoinJobRequest {
            protocol_version: PROTOCOL_VERSION,
            job: options.job.clone(),
            rank: options.rank,
            ranks: options.ranks,
            geometry: Some((&options.geometry).into()),
            slots: Vec::new(),
            min_servers: options.min_servers,
            rates: options.rates,
            placement: options.placement,
            home_address,
        };
        let joined = bounded(options.barrier_timeout, client.join_job(request)).await.map_err(failed)?;
        let (homes, ranks) = (joined.home_addresses, options.ranks as usize);
        if options.placement.is_some() && homes.len() != ranks {
            let message = format!(
                "the coordinator named the homes of {} of {ranks} ranks; run one version of Outboard on both sides",
                homes.len()
            );
            return Err(failed(TaskError::new(ErrorKind::Unsupported, message)));
        }
        let (slots, numerics_id) = (joined.slots.len() as u32, joined.numerics_id);
        Ok(Job { client, options, id: joined.job_id, numerics_id, slots, home_addresses: homes.into() })
    }

    pub(crate) fn options(&self) -> &JobOptions {
        &self.options
    }

    /// The numerics id that the job started with, and keeps.
    pub(crate) fn numerics_id(&self) -> &str {
        &self.numerics_id
    }

    /// Submits this rank's documents; returns when the step is planned.
    pub(crate) async fn submit(&self, step: u64, documents: Vec<Document>) -> Result<RankPlan, WorkerError> {
        let request = SubmitStepRequest {
            job_id: self.id,
            rank: self.options.rank,
            step,
            documents: documents.iter().map(Into::into).collect(),
        };
        let mut client = self.client.clone();
        let response = bounded(self.options.barrier_timeout, client.submit_step(request)).await;
        let response = response.map_err(|e| error(&self.options, format!("submitting step {step}"), e))?;
        let (geometry, slots, rank) = (self.options.geometry, self.slots, self.options.rank);
        let homes = Arc::clone(&self.home_addresses);
        // Checking a long plan would hold up transfers on this runtime's few threads.
        let checked = tokio::task::spawn_blocking(move || {
            let reading = Reading { rank, geometry: &geometry, slots, home_addresses: &homes };
            RankPlan::new(response, documents, reading)
        })
        .await;
        checked.unwrap_or_else(|e| Err(format!("checking it failed: {e}"))).map_err(|message| {
            WorkerError::BadPlan { job: self.options.job.clone(), rank: self.options.rank, step, message }
        })
    }

    /// Reports a finished step.
    pub(crate) async fn report(&self, report: StepReport) -> Result<(), WorkerError> {
        let step = report.step;
        let request = ReportStepRequest {
            job_id: self.id,
            rank: self.options.rank,
            step,
            seconds: report.seconds,
            exposed_seconds: report.exposed_seconds,
            servers: report.servers,
        };
        let mut client = self.client.clone();
        let outcome = bounded(CALL_TIMEOUT, client.report_step(request)).await;
        outcome.map(drop).map_err(|e| error(&self.options, format!("reporting step {step}"), e))
    }

    /// Leaves; `reason` is empty when the rank's work is done.
    pub(crate) async fn leave(&self, reason: String) -> Result<(), WorkerError> {
        let request = LeaveJobRequest { job_id: self.id, rank: self.options.rank, reason };
        let mut client = self.client.clone();
        let outcome = bounded(CALL_TIMEOUT, client.leave_job(request)).await;
        outcome.map(drop).map_err(|e| error(&self.options, "leaving the job".into(), e))
    }
}

async fn bounded<T>(
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, TaskError> {
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner).map_err(TaskError::from),
        Err(_) => Err(TaskError::deadline("the call", limit)),
    }
}

fn error(options: &JobOptions, doing: String, source: TaskError) -> WorkerError {
    let JobOptions { job, rank, coordinator, .. } = options;
    WorkerError::Coordinator { job: job.clone(), rank: *rank, doing, url: coordinator.clone(), source }
}
