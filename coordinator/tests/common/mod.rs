//! A coordinator on a port of its own, and what its clients say.

#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod placed;

use std::net::SocketAddr;
use std::time::Duration;

use outboard_attention::{Document, DocumentId, HeadGeometry, HomeRange, Span};
use outboard_coordinator::{Options, serve};
use outboard_proto::v1::coordinator_service_client::CoordinatorServiceClient;
use outboard_proto::{PROTOCOL_VERSION, TaskError, v1};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Coordinator {
    pub(crate) address: SocketAddr,
    pub(crate) stop: CancellationToken,
    pub(crate) served: JoinHandle<Result<(), TaskError>>,
    client: CoordinatorServiceClient<Channel>,
}

/// Options with timeouts that nothing reaches by itself.
pub(crate) fn patient() -> Options {
    let long = Duration::from_secs(60);
    Options { lease: long, join_timeout: long, step_timeout: long, ..Options::default() }
}

pub(crate) fn geometry() -> HeadGeometry {
    HeadGeometry::standard(8, 2, 64).unwrap()
}

pub(crate) fn join(job: &str, rank: u32, ranks: u32) -> v1::JoinJobRequest {
    v1::JoinJobRequest {
        protocol_version: PROTOCOL_VERSION,
        job: job.into(),
        rank,
        ranks,
        geometry: Some((&geometry()).into()),
        slots: Vec::new(),
        min_servers: 0,
        rates: None,
        placement: None,
        home_address: String::new(),
    }
}

/// The same with placement.
pub(crate) fn join_placing(job: &str, rank: u32, ranks: u32, token_slack: f64) -> v1::JoinJobRequest {
    v1::JoinJobRequest {
        placement: Some(v1::Placement { token_slack }),
        home_address: format!("host-{rank}:7000"),
        ..join(job, rank, ranks)
    }
}

/// Causal documents of these lengths whose homes are to be chosen.
pub(crate) fn unplaced(rank: u32, lengths: &[usize]) -> Vec<v1::Document> {
    let placed = documents(rank, lengths).into_iter();
    placed.map(|document| v1::Document { homes: Vec::new(), ..document }).collect()
}

/// A document on several ranks, `(rank, tokens)` one after the other.
pub(crate) fn spanning(rank: u32, index: u32, homes: &[(u32, usize)]) -> v1::Document {
    let mut at = 0;
    let home = |&(rank, tokens): &(u32, usize)| {
        at += tokens;
        HomeRange { rank, tokens: Span::at(at - tokens, tokens) }
    };
    let homes = homes.iter().map(home).collect();
    v1::Document::from(&Document::new(DocumentId { rank, index }, at, homes).unwrap())
}

/// Causal documents of these lengths on their rank.
pub(crate) fn documents(rank: u32, lengths: &[usize]) -> Vec<v1::Document> {
    let document = |(index, &tokens)| {
        let homes = vec![HomeRange { rank, tokens: Span::to(tokens) }];
        let id = DocumentId { rank, index };
        v1::Document::from(&Document::new(id, tokens, homes).unwrap())
    };
    (0..).zip(lengths).map(document).collect()
}

pub(crate) fn server(port: u32) -> v1::ServerInfo {
    v1::ServerInfo {
        host: "host".into(),
        address: format!("127.0.0.1:{port}"),
        device: "cpu".into(),
        memory_bytes: 1 << 30,
        dtypes: vec![v1::DType::F32 as i32],
        max_head_dim: 256,
        numerics_ids: vec!["cpu-test".into()],
        ..v1::ServerInfo::default()
    }
}

pub(crate) fn in_place(port: u32, job: &str, rank: u32) -> v1::ServerInfo {
    v1::ServerInfo { job: job.into(), rank: Some(rank), ..server(port) }
}

impl Coordinator {
    pub(crate) async fn start(options: Options) -> Coordinator {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let served = tokio::spawn(serve(listener, options, stop.clone().cancelled_owned()));
        let client = CoordinatorServiceClient::connect(format!("http://{address}")).await.unwrap();
        Coordinator { address, stop, served, client }
    }

    pub(crate) fn client(&self) -> CoordinatorServiceClient<Channel> {
        self.client.clone()
    }

    pub(crate) async fn register(&self, server: v1::ServerInfo) -> Result<u64, TaskError> {
        let request = v1::RegisterServerRequest { protocol_version: PROTOCOL_VERSION, server: Some(server) };
        let mut client = self.client();
        soon(client.register_server(request)).await.map(|r| r.server_id)
    }

    pub(crate) async fn heartbeat(&self, server_id: u64) -> Result<bool, TaskError> {
        soon(self.client().heartbeat(v1::HeartbeatRequest { server_id })).await.map(|r| r.drain)
    }

    pub(crate) async fn pool(&self) -> Vec<v1::list_pool_response::Entry> {
        soon(self.client().list_pool(v1::ListPoolRequest {})).await.unwrap().servers
    }

    pub(crate) fn join(
        &self,
        request: v1::JoinJobRequest,
    ) -> JoinHandle<Result<v1::JoinJobResponse, TaskError>> {
        let mut client = self.client();
        tokio::spawn(async move { soon(client.join_job(request)).await })
    }

    /// Joins all ranks of a job with no other wishes; returns its id.
    pub(crate) async fn join_all(&self, job: &str, ranks: u32) -> u64 {
        let joins: Vec<_> = (0..ranks).map(|rank| self.join(join(job, rank, ranks))).collect();
        let mut id = 0;
        for joined in joins {
            id = joined.await.unwrap().unwrap().job_id;
        }
        id
    }

    pub(crate) fn submit(
        &self,
        job_id: u64,
        rank: u32,
        step: u64,
        documents: Vec<v1::Document>,
    ) -> JoinHandle<Result<v1::SubmitStepResponse, TaskError>> {
        let mut client = self.client();
        let request = v1::SubmitStepRequest { job_id, rank, step, documents };
        tokio::spawn(async move { soon(client.submit_step(request)).await })
    }

    /// Starts a job whose ranks 0, 1, ... join so and have an in-place server each; returns its id.
    pub(crate) async fn start_with(&self, joins: Vec<v1::JoinJobRequest>) -> u64 {
        for (port, request) in (1..).zip(&joins) {
            self.register(in_place(port, &request.job, request.rank)).await.unwrap();
        }
        let joins: Vec<_> = joins.into_iter().map(|request| self.join(request)).collect();
        let mut id = 0;
        for joined in joins {
            id = joined.await.unwrap().unwrap().job_id;
        }
        id
    }

    /// Starts a job with placement.
    pub(crate) async fn start_placing(&self, job: &str, ranks: u32, token_slack: f64) -> u64 {
        self.start_with((0..ranks).map(|rank| join_placing(job, rank, ranks, token_slack)).collect()).await
    }

    /// Submits for ranks 0, 1, ... these documents; returns each rank's answer.
    pub(crate) async fn try_step(
        &self,
        job_id: u64,
        step: u64,
        documents: &[Vec<v1::Document>],
    ) -> Vec<Result<v1::SubmitStepResponse, TaskError>> {
        let submit =
            |(rank, documents): (u32, &Vec<v1::Document>)| self.submit(job_id, rank, step, documents.clone());
        let calls: Vec<_> = (0..).zip(documents).map(submit).collect();
        let mut answers = Vec::new();
        for call in calls {
            answers.push(call.await.unwrap());
        }
        answers
    }

    /// Submits for ranks 0, 1, ... the documents of these lengths; returns each rank's answer.
    pub(crate) async fn step(
        &self,
        job_id: u64,
        step: u64,
        lengths: &[&[usize]],
    ) -> Vec<v1::SubmitStepResponse> {
        let documents: Vec<_> = (0..).zip(lengths).map(|(rank, lengths)| documents(rank, lengths)).collect();
        let answers = self.try_step(job_id, step, &documents).await;
        answers.into_iter().map(Result::unwrap).collect()
    }

    pub(crate) async fn leave(&self, job_id: u64, rank: u32, reason: &str) -> Result<(), TaskError> {
        let request = v1::LeaveJobRequest { job_id, rank, reason: reason.into() };
        soon(self.client().leave_job(request)).await.map(drop)
    }

    pub(crate) async fn report(
        &self,
        job_id: u64,
        rank: u32,
        step: u64,
        servers: Vec<v1::ServerReport>,
    ) -> Result<(), TaskError> {
        let request =
            v1::ReportStepRequest { job_id, rank, step, seconds: 1.0, exposed_seconds: 0.1, servers };
        soon(self.client().report_step(request)).await.map(drop)
    }
}

async fn soon<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, TaskError> {
    let answer = tokio::time::timeout(PATIENCE, call).await.expect("a call hangs");
    answer.map(tonic::Response::into_inner).map_err(TaskError::from)
}

/// The cuts of a plan: its tasks without the servers that compute them.
pub(crate) fn cuts(answers: &[v1::SubmitStepResponse]) -> Vec<v1::PlannedTask> {
    let tasks = answers.iter().flat_map(|answer| answer.tasks.iter().cloned());
    tasks.map(|task| v1::PlannedTask { server_id: 0, ..task }).collect()
}

/// The servers that a plan's tasks are on.
pub(crate) fn servers(answers: &[v1::SubmitStepResponse]) -> Vec<u64> {
    let mut ids: Vec<u64> =
        answers.iter().flat_map(|answer| answer.tasks.iter().map(|task| task.server_id)).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}
