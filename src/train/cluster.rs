//! The processes of a run: an embedded coordinator, dedicated attention servers, and the ranks.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, bail};
use futures::future::{join_all, try_join_all};
use outboard_proto::describe;
use outboard_proto::v1::ListPoolRequest;
use outboard_proto::v1::coordinator_service_client::CoordinatorServiceClient;
use outboard_transport::grpc::server_stats;
use serde::Deserialize;
use tokio::time::timeout;
use tonic::transport::Channel;

use super::args::Run;
use super::child::JsonChild;
use super::probe::Speed;
use super::protocol::{FromRank, Setup, ToRank};
use super::report::Record;
use crate::device::Device;

/// How long a process may take to say that it is ready.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long ranks may take to join the job: longer than the coordinator's and the client's own limits, whose errors say
/// who is missing.
const JOIN_LIMIT: Duration = Duration::from_secs(420);
/// How long a call to the coordinator or to a server may take.
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// How long to wait for other ranks' own words once one has failed.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A running cluster. Dropping it kills its processes.
pub(crate) struct Cluster {
    pub(crate) ranks: Vec<JsonChild>,
    servers: Vec<(JsonChild, Ready)>,
    coordinator: Option<CoordinatorLink>,
    numerics_id: Option<String>,
    in_place: bool,
    cores: Vec<Vec<usize>>,
    /// Where ranks take connections of the gradient exchange.
    addresses: Vec<SocketAddr>,
    /// How fast ranks compute, as far as they have measured it.
    speeds: Vec<Option<Speed>>,
}

/// What a dedicated server says when it is ready.
#[derive(Clone, Debug, Deserialize)]
struct Ready {
    address: SocketAddr,
    pid: u32,
    device: String,
}

/// The run's coordinator, and the counters its servers had before the run.
struct CoordinatorLink {
    url: String,
    client: CoordinatorServiceClient<Channel>,
    before: BTreeMap<u64, u64>,
}

impl Cluster {
    /// Starts all processes, in the order in which each needs the ones before. The job begins with [`Self::begin`].
    pub(crate) async fn start(run: &Run) -> anyhow::Result<Cluster> {
        let coordinator = match run.pooled() {
            true => Some(CoordinatorLink::start(run).await?),
            false => None,
        };
        let mut cluster = Cluster {
            ranks: Vec::new(),
            servers: Vec::new(),
            coordinator,
            numerics_id: None,
            in_place: run.in_place,
            cores: run.rank_cores.clone(),
            addresses: Vec::new(),
            speeds: Vec::new(),
        };
        cluster.start_servers(run).await?;
        cluster.start_ranks(run).await?;
        Ok(cluster)
    }

    async fn start_servers(&mut self, run: &Run) -> anyhow::Result<()> {
        let Some(coordinator) = &self.coordinator else { return Ok(()) };
        for (index, cores) in run.server_cores.iter().enumerate() {
            let (memory, device) = (run.memory_mib.to_string(), run.device.to_string());
            let args = ["attention-server", "--json", "--end-with-stdin", "--coordinator", &coordinator.url];
            let more = ["--memory-mib", &memory, "--device", &device];
            let mut args: Vec<OsString> = args.into_iter().chain(more).map(OsString::from).collect();
            if !cores.is_empty() {
                let cores: Vec<_> = cores.iter().map(usize::to_string).collect();
                args.extend(["--cores".into(), cores.join(",").into()]);
            }
            args.extend(run.cuda.words());
            let mut child = JsonChild::start(format!("attention server {index}"), &args)?;
            let ready = child.expect(START_LIMIT).await?;
            self.servers.push((child, ready));
        }
        Ok(())
    }

    async fn start_ranks(&mut self, run: &Run) -> anyhow::Result<()> {
        let in_place = if run.in_place { run.train.ranks } else { 0 };
        for (rank, cores) in run.rank_cores.iter().enumerate() {
            let setup = Setup {
                job: run.job.clone(),
                model: run.model,
                train: outboard_trainer::TrainConfig { rank: rank as u32, ..run.train },
                modes: run.modes.clone(),
                coordinator: self.coordinator.as_ref().map(|c| c.url.clone()),
                in_place: run.in_place,
                min_servers: (in_place + run.dedicated).max(1),
                rates: run.rates,
                placement: run.placement,
                cores: cores.clone(),
                probe: run.pooled() && run.unlike_servers().is_none(),
                memory_bytes: run.memory_mib << 20,
                data: run.data.clone(),
            };
            let mut child = JsonChild::start(format!("rank {rank}"), &["train-rank".into()])?;
            child.send(&ToRank::Setup(Box::new(setup))).await?;
            self.ranks.push(child);
        }
        for message in self.next_of_each(START_LIMIT).await? {
            match message {
                FromRank::Listening { address, speed } => {
                    self.addresses.push(address);
                    self.speeds.push(speed);
                }
                other => bail!("a rank said {other:?} before it was listening"),
            }
        }
        Ok(())
    }

    /// How fast each rank computes; `None` unless all of them have measured it.
    pub(crate) fn speeds(&self) -> Option<Vec<Speed>> {
        self.speeds.iter().copied().collect()
    }

    /// Lets the ranks meet, join the job and begin.
    pub(crate) async fn begin(&mut self, run: &Run) -> anyhow::Result<()> {
        for rank in &mut self.ranks {
            rank.send(&ToRank::Exchange { addresses: self.addresses.clone() }).await?;
        }
        if self.coordinator.is_some() {
            for message in self.next_of_each(JOIN_LIMIT).await? {
                match message {
                    FromRank::Started { numerics_id } => self.numerics_id = Some(numerics_id),
                    other => bail!("a rank said {other:?} before it had joined the job"),
                }
            }
        }
        if let (Device::Cuda(_), Some(id)) = (run.device, &self.numerics_id)
            && !id.starts_with("cuda-")
        {
            bail!(
                "the job computes with {id}, for which the pool has more servers than for {}; take them out of \
                 the pool, or use another",
                run.device
            );
        }
        if let Some(coordinator) = &mut self.coordinator {
            // In-place servers have joined by now; the first step may have begun on them, but on no other.
            let now = coordinator.task_counters().await?;
            for id in now.into_keys() {
                coordinator.before.entry(id).or_insert(0);
            }
        }
        Ok(())
    }

    /// What runs where, for people.
    pub(crate) fn describe(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let numerics = self.numerics_id.as_deref().map_or(String::new(), |id| format!(", numerics id {id}"));
        if let Some(coordinator) = &self.coordinator {
            lines.push(format!("coordinator {}{numerics}", coordinator.url));
        }
        for (child, ready) in &self.servers {
            let Ready { address, pid, device } = ready;
            lines.push(format!("{} ready at {address}, pid {pid} on {device}", child.name));
        }
        for (rank, cores) in self.ranks.iter().zip(&self.cores) {
            let server = if self.in_place { " with an attention server in place" } else { "" };
            let pid = rank.pid().map_or("gone".to_owned(), |pid| pid.to_string());
            lines.push(format!("{} on cores {cores:?}, pid {pid}{server}", rank.name));
        }
        lines
    }

    /// The next message of every rank, in rank order. When a rank fails, the error holds what each of them said.
    pub(crate) async fn next_of_each(&mut self, limit: Duration) -> anyhow::Result<Vec<FromRank>> {
        // The scope ends the borrow that a failed wait still holds.
        let first = { try_join_all(self.ranks.iter_mut().map(|rank| next_message(rank, limit))).await };
        let Err(error) = first else { return first };
        // The rank that failed first may have failed because of another, whose own words say why.
        let others = self.ranks.iter_mut().map(|rank| async {
            let name = rank.name.clone();
            let failed = async {
                while let Ok(Some(message)) = rank.receive().await {
                    if let FromRank::Failed { message } = message {
                        return Some(format!("{name}: {message}"));
                    }
                }
                None
            };
            timeout(LAST_WORDS, failed).await.ok().flatten()
        });
        let others: Vec<String> = join_all(others).await.into_iter().flatten().collect();
        match others.is_empty() {
            true => Err(error),
            false => bail!("{}\n{}", describe(error.as_ref()), others.join("\n")),
        }
    }

    /// Waits until every rank has said that it is done.
    pub(crate) async fn expect_done(&mut self, limit: Duration) -> anyhow::Result<()> {
        for message in self.next_of_each(limit).await? {
            if !matches!(message, FromRank::Done) {
                bail!("a rank said {message:?} after its last step");
            }
        }
        Ok(())
    }

    /// Asks the servers how many tasks they have computed since the run began.
    pub(crate) async fn count_tasks(&mut self, record: &mut Record) -> anyhow::Result<()> {
        let Some(coordinator) = &mut self.coordinator else { return Ok(()) };
        let now = coordinator.task_counters().await?;
        let before = &coordinator.before;
        record.tasks_computed =
            now.iter().map(|(id, count)| count - before.get(id).unwrap_or(&0).min(count)).sum();
        record.counters_complete = before.keys().all(|id| now.contains_key(id));
        Ok(())
    }

    /// Ends all processes, ranks first.
    pub(crate) async fn finish(mut self) -> anyhow::Result<()> {
        for rank in &mut self.ranks {
            rank.send(&ToRank::Finish).await?;
        }
        for rank in std::mem::take(&mut self.ranks) {
            rank.end().await?;
        }
        for (server, _) in std::mem::take(&mut self.servers) {
            let name = server.name.clone();
            if let Err(error) = server.end().await {
                // A server may have been lost on the way, which the summary has told.
                eprintln!("outboard: {name}: {error:#}");
            }
        }
        Ok(())
    }
}

async fn next_message(rank: &mut JsonChild, limit: Duration) -> anyhow::Result<FromRank> {
    match rank.expect(limit).await? {
        FromRank::Failed { message } => bail!("{}: {message}", rank.name),
        message => Ok(message),
    }
}

impl CoordinatorLink {
    /// The coordinator the run names, or one started in this process.
    async fn start(run: &Run) -> anyhow::Result<CoordinatorLink> {
        let url = match &run.coordinator {
            Some(url) => url.clone(),
            None => {
                let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
                let url = format!("http://{}", listener.local_addr()?);
                let options = outboard_coordinator::Options::default();
                let serving = outboard_coordinator::serve(listener, options, std::future::pending());
                // It ends with the runtime of this process.
                tokio::spawn(async move {
                    if let Err(error) = serving.await {
                        tracing::error!(%error, "the embedded coordinator ended");
                    }
                });
                url
            }
        };
        let endpoint = tonic::transport::Endpoint::from_shared(url.clone())
            .with_context(|| format!("--coordinator {url} is no URL; give it as http://host:port"))?
            .connect_timeout(CALL_LIMIT)
            .timeout(CALL_LIMIT);
        let channel = endpoint.connect().await.map_err(|error| {
            let why = describe(&error);
            anyhow::anyhow!("no coordinator answers at {url} ({why}); start one with `outboard coordinator`")
        })?;
        let mut link =
            CoordinatorLink { url, client: CoordinatorServiceClient::new(channel), before: BTreeMap::new() };
        link.before = link.task_counters().await?;
        if link.before.is_empty() && run.coordinator.is_some() && run.dedicated == 0 && !run.in_place {
            bail!(
                "the coordinator at {} has no attention server; start some with `outboard attention-server --coordinator \
                 {}`, or add --in-place or --pool N",
                link.url,
                link.url
            );
        }
        Ok(link)
    }

    /// Tasks computed so far by each server of the pool.
    async fn task_counters(&mut self) -> anyhow::Result<BTreeMap<u64, u64>> {
        let pool =
            self.client.list_pool(ListPoolRequest {}).await.context("cannot list the pool")?.into_inner();
        let mut counters = BTreeMap::new();
        for server in pool.servers.into_iter().filter_map(|entry| entry.server) {
            match server_stats(&server.address, CALL_LIMIT).await {
                Ok(stats) => {
                    counters.insert(server.id, stats.forward_tasks + stats.backward_tasks);
                }
                // A server that has just died stays listed until its lease ends.
                Err(error) => tracing::warn!(server = server.id, %error, "no counters"),
            }
        }
        Ok(counters)
    }
}
