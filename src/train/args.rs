//! Flags of `outboard train`, and the run they describe.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use outboard_attention::DType;
use outboard_trainer::{Corpus, ModelConfig, TrainConfig};

use super::protocol::{Data, JobRates, Mode, Placement};
use crate::cores;
use crate::cuda::CudaArgs;
use crate::device::Device;

/// What a link is taken to carry where nothing is said of it.
const LINK_BYTES_PER_SECOND: f64 = 1e9;
/// Which rank holds which tokens, where nothing is said of it and every rank has an in-place server.
const PLACEMENT: PlacementKind = PlacementKind::Free;
/// How far above the mean the tokens of a rank may lie, where nothing is said of it.
const TOKEN_SLACK: f64 = 0.02;

/// Arguments of `outboard train`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Steps to train.
    #[arg(long, default_value_t = TrainConfig::default().steps, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Seed of the weights and of the order of documents.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Ranks, each a process on cores of its own.
    #[arg(long, default_value_t = TrainConfig::default().ranks, value_parser = clap::value_parser!(u32).range(1..=256))]
    ranks: u32,
    /// Tokens per rank and step.
    #[arg(long, default_value_t = TrainConfig::default().tokens)]
    tokens: usize,
    /// Decoder layers.
    #[arg(long, default_value_t = ModelConfig::default().layers)]
    layers: usize,
    /// Query heads.
    #[arg(long, default_value_t = ModelConfig::default().q_heads)]
    heads: usize,
    /// Key/value heads; they divide the query heads.
    #[arg(long, default_value_t = ModelConfig::default().kv_heads)]
    kv_heads: usize,
    /// Elements of one head.
    #[arg(long, default_value_t = ModelConfig::default().head_dim)]
    head_dim: usize,
    /// Element type of Q, K, V and dO as they travel and are computed: f32, bf16 or f16. They are rounded to it, for local
    /// attention too; the model itself, outputs and gradients stay f32. Losses are not scaled, so with f16 small
    /// gradients vanish [default: f32, with --device cuda:N bf16].
    #[arg(long)]
    dtype: Option<DType>,
    /// Width of the model.
    #[arg(long, default_value_t = ModelConfig::default().dim)]
    dim: usize,
    /// Width of the gated MLP [default: three times the width of the model].
    #[arg(long)]
    ffn_dim: Option<usize>,
    /// Largest learning rate.
    #[arg(long, default_value_t = TrainConfig::default().learning_rate)]
    learning_rate: f64,
    /// Who computes core attention: each rank its own, the pool, or two trainings of equal weights that alternate step
    /// by step.
    #[arg(long, value_enum, default_value_t = Attention::Both)]
    attention: Attention,
    /// What the pool computes on: cpu, or cuda:N for a dedicated attention server on that GPU. The ranks, and the local
    /// attention that is compared with, stay on the CPU.
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: Device,
    /// Start this many dedicated attention servers instead of the ranks' in-place ones.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=256))]
    pool: Option<u32>,
    /// Let every rank bring an in-place server too [default unless --pool, --coordinator or a GPU is given].
    #[arg(long)]
    in_place: bool,
    /// Use the coordinator at this URL, and the servers of its pool, instead of an embedded one.
    #[arg(long)]
    coordinator: Option<String>,
    /// Name of the job at the coordinator [default: train-PID].
    #[arg(long)]
    job: Option<String>,
    /// Train on the files of this folder, each one document [default: the sources of the packages that this program
    /// was built from].
    #[arg(long)]
    data: Option<PathBuf>,
    #[arg(long, value_enum, help = placement_help())]
    placement: Option<PlacementKind>,
    /// How far above the mean the tokens of a rank may lie with --placement free, as a fraction of it: more room moves
    /// fewer bytes, and the rank with most tokens takes longer outside of attention [default: 0.02].
    #[arg(long, value_name = "FRACTION")]
    token_slack: Option<f64>,
    /// Cores of each rank.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    cores_per_rank: u16,
    /// Memory of each attention server, in MiB: a quarter for its kernel to work in, the rest for task buffers.
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    memory_mib: u64,
    /// FLOPs of attention that a server computes a second. With this and --bytes-per-second steps are planned for the
    /// least time that a layer takes: where links are slow they are less balanced and move fewer bytes, down to none. Both
    /// are declared and never measured, so that plans, and the bits of losses, are the same in every run [default: steps
    /// are balanced, whatever that moves].
    #[arg(long, value_name = "N")]
    flops_per_second: Option<f64>,
    /// Bytes a second that a server's link carries each way, to plan with; see --flops-per-second.
    #[arg(long, value_name = "N")]
    bytes_per_second: Option<f64>,
    /// Bytes a second that a server's link carries each way, for the prediction that is printed before training [default:
    /// what --bytes-per-second says, else 1e9, which is a little less than ten-gigabit Ethernet carries, and less than
    /// the links within one machine do].
    #[arg(long, value_name = "N")]
    link_bytes_per_second: Option<f64>,
    /// Fail when local and pooled losses differ by more than this, relative [default: 1e-4, with --device cuda:N 1e-2].
    #[arg(long)]
    loss_tolerance: Option<f64>,
    /// Write figures as JSON lines to this file; "-" is standard output, and moves everything else to standard error.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    cuda: CudaArgs,
}

/// Choice of trainings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Attention {
    Local,
    Pool,
    Both,
}

/// Who decides which rank holds which tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum PlacementKind {
    /// Every rank holds the documents that it is dealt.
    Fixed,
    /// The planner.
    Free,
}

fn placement_help() -> String {
    let default = if PLACEMENT == PlacementKind::Fixed { "fixed" } else { "free, without --in-place fixed" };
    format!(
        "Which rank holds which tokens in the pooled training: fixed, those of the documents that it is dealt, or free, \
         as the planner chooses for each step, so that little has to move. Only attention connects the tokens of a \
         document, so a rank may hold any ranges of the step's documents, and loss and gradients stay those of whole \
         ones; the local training still holds what ranks are dealt. free needs ranks with in-place servers. Beside the \
         bytes that moved, the report has what the plans predicted, in all layers and both directions, and with free \
         placement what they would have been with fixed. More moves than is predicted, since results and gradients \
         travel in f32 whatever --dtype is, and since Q, K and V are sent again for the backward pass, which the plans \
         take servers to keep [default: {default}]"
    )
}

/// A run, checked.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) job: String,
    pub(crate) model: ModelConfig,
    /// As of rank 0.
    pub(crate) train: TrainConfig,
    pub(crate) modes: Vec<Mode>,
    pub(crate) data: Data,
    /// Its documents.
    pub(crate) corpus: Arc<Corpus>,
    /// An outside coordinator, or none for an embedded one.
    pub(crate) coordinator: Option<String>,
    pub(crate) in_place: bool,
    /// Dedicated servers to start.
    pub(crate) dedicated: u32,
    /// What these compute on.
    pub(crate) device: Device,
    pub(crate) cuda: CudaArgs,
    /// Cores of each rank.
    pub(crate) rank_cores: Vec<Vec<usize>>,
    /// Cores of each dedicated server, or none for all.
    pub(crate) server_cores: Vec<Vec<usize>>,
    /// Whether cores are shared, so that speed says nothing.
    pub(crate) cores_shared: bool,
    pub(crate) memory_mib: u64,
    /// What steps are planned with; `None` to balance them.
    pub(crate) rates: Option<JobRates>,
    /// How the planner places tokens; `None` to leave documents where they are dealt to.
    pub(crate) placement: Option<Placement>,
    /// What the prediction takes links to carry.
    pub(crate) link_bytes_per_second: f64,
    pub(crate) loss_tolerance: f64,
    pub(crate) json: Option<PathBuf>,
}

impl Args {
    /// Checks the flags before anything is started.
    pub(crate) fn into_run(self) -> anyhow::Result<Run> {
        let modes = match self.attention {
            Attention::Local => vec![Mode::Local],
            Attention::Pool => vec![Mode::Pool],
            Attention::Both => vec![Mode::Local, Mode::Pool],
        };
        let pooled = modes.contains(&Mode::Pool);
        if !pooled && (self.pool.is_some() || self.in_place || self.coordinator.is_some()) {
            bail!("--attention local uses no pool; leave out --pool, --in-place and --coordinator");
        }
        let on_gpu = self.device != Device::Cpu;
        let (usual_dtype, usual_tolerance) = match on_gpu {
            // Two kernels that round P and dS of 16 bits in their own ways.
            true => (DType::Bf16, 1e-2),
            false => (ModelConfig::default().attention_dtype, 1e-4),
        };
        let dtype = self.dtype.unwrap_or(usual_dtype);
        let loss_tolerance = self.loss_tolerance.unwrap_or(usual_tolerance);
        if !(loss_tolerance.is_finite() && loss_tolerance >= 0.0) {
            bail!("--loss-tolerance is {loss_tolerance}; it must be finite and at least 0");
        }
        let rates = self.rates(pooled)?;
        let links = self.link_bytes_per_second.or(rates.map(|rates| rates.bytes_per_second));
        let links = above_zero("--link-bytes-per-second", links.unwrap_or(LINK_BYTES_PER_SECOND))?;
        if on_gpu {
            self.check_gpu(pooled, dtype)?;
        }
        let dedicated = self.pool.unwrap_or(u32::from(on_gpu));
        let in_place = pooled && (self.in_place || (dedicated == 0 && self.coordinator.is_none()));
        let placement = self.placement(pooled, in_place)?;
        let model = ModelConfig {
            layers: self.layers,
            dim: self.dim,
            q_heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            attention_dtype: dtype,
            ffn_dim: self.ffn_dim.unwrap_or(self.dim.saturating_mul(3)),
            ..ModelConfig::default()
        };
        model.validate()?;
        let train = TrainConfig {
            seed: self.seed,
            steps: self.steps,
            tokens: self.tokens,
            ranks: self.ranks,
            learning_rate: self.learning_rate,
            ..TrainConfig::default()
        };
        train.validate()?;
        let data = match self.data {
            Some(folder) => Data::Folder(folder),
            None => Data::Cargo(cargo_home()?),
        };
        // An empty folder should be known before processes are started.
        let corpus = Arc::new(data.corpus()?);

        let cores = cores::available()?;
        let each = usize::from(self.cores_per_rank);
        let ranks = self.ranks as usize;
        let share = |index| cores::share(&cores, index, each);
        let owners = ranks + dedicated as usize;
        let server_cores = match on_gpu {
            // Cores only bring a GPU its work: those that the ranks leave, or all.
            true => vec![cores.get(ranks * each..).unwrap_or_default().to_vec(); dedicated as usize],
            false => (ranks..owners).map(share).collect(),
        };
        Ok(Run {
            job: self.job.unwrap_or_else(|| format!("train-{}", std::process::id())),
            model,
            train,
            modes,
            data,
            corpus,
            in_place,
            coordinator: self.coordinator,
            dedicated,
            device: self.device,
            cuda: self.cuda,
            rank_cores: (0..ranks).map(share).collect(),
            server_cores,
            cores_shared: owners * each > cores.len(),
            memory_mib: self.memory_mib,
            rates,
            placement,
            link_bytes_per_second: links,
            loss_tolerance,
            json: self.json,
        })
    }
}

impl Run {
    /// Whether any training is served by the pool.
    pub(crate) fn pooled(&self) -> bool {
        self.modes.contains(&Mode::Pool)
    }

    /// Why it is not known that every server computes as fast as a rank does, without which nothing is predicted of a
    /// plan.
    pub(crate) fn unlike_servers(&self) -> Option<&'static str> {
        if self.device != Device::Cpu {
            Some("how fast the GPU computes is not known before")
        } else if self.coordinator.is_some() {
            Some("how fast the servers of an outside pool compute is not known")
        } else {
            self.cores_shared.then_some("ranks and servers share cores")
        }
    }
}

impl Args {
    /// What steps are planned with.
    fn rates(&self, pooled: bool) -> anyhow::Result<Option<JobRates>> {
        let (flops_per_second, bytes_per_second) = match (self.flops_per_second, self.bytes_per_second) {
            (None, None) => return Ok(None),
            (Some(flops), Some(bytes)) => (flops, bytes),
            (Some(flops), None) => bail!(
                "--flops-per-second is {flops} and --bytes-per-second is not given; plans weigh one by the other: give \
                 both, or neither to balance every step"
            ),
            (None, Some(bytes)) => bail!(
                "--bytes-per-second is {bytes} and --flops-per-second is not given; plans weigh one by the other: give \
                 both, or neither to balance every step"
            ),
        };
        if !pooled {
            bail!("--attention local plans nothing; leave out --flops-per-second and --bytes-per-second");
        }
        Ok(Some(JobRates {
            flops_per_second: above_zero("--flops-per-second", flops_per_second)?,
            bytes_per_second: above_zero("--bytes-per-second", bytes_per_second)?,
        }))
    }

    /// How the planner places tokens, if it does.
    fn placement(&self, pooled: bool, in_place: bool) -> anyhow::Result<Option<Placement>> {
        if self.placement == Some(PlacementKind::Free) && !pooled {
            bail!("--placement is free, and --attention local plans nothing; leave one of them out");
        }
        if self.placement == Some(PlacementKind::Free) && !in_place {
            bail!(
                "--placement is free, and no rank has an in-place server, by whose work tokens are placed; add --in-place, or \
                 leave out --placement"
            );
        }
        // Ranks listen on this machine alone, and servers elsewhere would have to fetch keys from them.
        let reachable = self.coordinator.as_deref().is_none_or(is_local);
        if self.placement == Some(PlacementKind::Free) && !reachable {
            let url = self.coordinator.as_deref().unwrap_or_default();
            bail!(
                "--placement is free, and the coordinator {url} may have servers on other hosts, which could not fetch keys from \
                 ranks here; give --placement fixed"
            );
        }
        let free = self.placement.unwrap_or(PLACEMENT) == PlacementKind::Free && in_place && reachable;
        match self.token_slack {
            Some(slack) if !free => {
                bail!(
                    "--token-slack is {slack}, and tokens are not placed; give --placement free, or leave it out"
                )
            }
            Some(slack) if !(0.0..=1.0).contains(&slack) => {
                bail!("--token-slack is {slack}; it must be between 0 and 1")
            }
            slack => Ok(free.then(|| Placement { token_slack: slack.unwrap_or(TOKEN_SLACK) })),
        }
    }

    /// Refuses what does not go with a GPU.
    fn check_gpu(&self, pooled: bool, dtype: DType) -> anyhow::Result<()> {
        let device = self.device;
        if !pooled {
            bail!(
                "--device {device} is for the pool, and --attention local uses none; leave one of them out"
            );
        }
        if self.in_place {
            bail!(
                "--device {device} starts dedicated servers; leave out --in-place, whose servers compute on the CPU"
            );
        }
        if let Some(servers) = self.pool.filter(|servers| *servers > 1) {
            bail!(
                "--pool is {servers}, and --device {device} is one GPU, which one server uses whole; leave out --pool"
            );
        }
        if dtype == DType::F32 {
            bail!("--dtype is f32, and --device {device} computes bf16 and f16");
        }
        Ok(())
    }
}

/// True for a URL of this host, which nobody elsewhere uses.
fn is_local(url: &str) -> bool {
    let authority = url.split_once("://").map_or(url, |(_, rest)| rest).split('/').next().unwrap_or_default();
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host).trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn above_zero(flag: &str, rate: f64) -> anyhow::Result<f64> {
    if !(rate.is_finite() && rate > 0.0) {
        bail!("{flag} is {rate}; it must be finite and above zero");
    }
    Ok(rate)
}

fn cargo_home() -> anyhow::Result<PathBuf> {
    if let Some(home) = std::env::var_os("CARGO_HOME") {
        return Ok(home.into());
    }
    let home =
        std::env::home_dir().context("neither CARGO_HOME nor HOME is set; name a folder with --data")?;
    Ok(home.join(".cargo"))
}
