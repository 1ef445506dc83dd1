//! Documents whose tokens several ranks hold: attention equals that of the whole batch on one device, whoever computes
//! it, and whoever dies.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod cluster;

use std::sync::Arc;
use std::time::Duration;

use cluster::{Cluster, LayerOutput, Random, RankInputs};
use outboard_attention::{DType, Document, DocumentId, Elements, HeadGeometry, HomeRange, Mask, Span};
use outboard_attention_server::{EngineOptions, Service};
use outboard_worker::{
    CoreAttention, Holding, JobOptions, LayerCall, OutputGradient, PackedDocument, Placement, PoolAttention,
    Qkv, StepStats,
};

const JOB: &str = "shared";

/// A document longer than a rank's share, some of usual lengths, and one token alone.
const LENGTHS: [usize; 7] = [2500, 1, 130, 517, 300, 700, 400];

fn geometry() -> HeadGeometry {
    HeadGeometry::standard(8, 2, 32).unwrap()
}

fn id(index: usize) -> DocumentId {
    DocumentId { rank: 0, index: index as u32 }
}

fn unplaced(lengths: &[usize]) -> Vec<Document> {
    lengths.iter().enumerate().map(|(n, &tokens)| Document::unplaced(id(n), tokens).unwrap()).collect()
}

/// Each document cut at random among ranks, in ranges of any length.
fn scattered(lengths: &[usize], ranks: u32, random: &mut Random) -> Vec<Document> {
    let mut below = |n: usize| ((random.next() + 1.0) / 2.0 * n as f32) as usize % n;
    let document = |(n, &tokens): (usize, &usize)| {
        let (mut homes, mut at) = (Vec::new(), 0);
        while at < tokens {
            let end = (at + 1 + below(tokens)).min(tokens);
            homes.push(HomeRange { rank: below(ranks as usize) as u32, tokens: Span::new(at, end).unwrap() });
            at = end;
        }
        Document::new(id(n), tokens, homes).unwrap()
    };
    lengths.iter().enumerate().map(document).collect()
}

/// Ranks of a job with placement, and who computes for them.
struct Setup {
    in_place: bool,
    dedicated: usize,
    engine: EngineOptions,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup { in_place: true, dedicated: 0, engine: EngineOptions::default() }
    }
}

struct Job {
    pools: Vec<PoolAttention>,
    services: Vec<Service>,
    _cluster: Cluster,
}

impl Setup {
    fn start(&self, ranks: u32, geometry: HeadGeometry) -> Job {
        self.start_with(ranks, geometry, |options| options)
    }

    fn start_with(
        &self,
        ranks: u32,
        geometry: HeadGeometry,
        change: impl FnOnce(JobOptions) -> JobOptions,
    ) -> Job {
        let cluster = Cluster::start();
        let homes: Vec<_> = (0..ranks).map(|_| cluster.home()).collect();
        let beside = |rank: usize| {
            let place = Some((JOB, rank as u32));
            cluster.server_beside(place, homes[rank].homes(), self.engine.clone())
        };
        let in_place = if self.in_place { homes.len() } else { 0 };
        let mut services: Vec<Service> = (0..in_place).map(beside).collect();
        services.extend((0..self.dedicated).map(|_| cluster.server_with(None, self.engine.clone())));
        let placement = Some(Placement { token_slack: 0.02 });
        let options = JobOptions::new(cluster.url.clone(), JOB.to_owned(), 0, ranks, geometry);
        let task_timeout = Duration::from_secs(60);
        let min_servers = services.len() as u32;
        let options = change(JobOptions { placement, min_servers, task_timeout, ..options });
        let of_ranks: Vec<_> = services.iter().take(in_place).map(Some).collect();
        let homes = homes.into_iter().map(Some).collect();
        let pools = cluster.join_at_home(&options, &of_ranks, homes);
        Job { pools, services, _cluster: cluster }
    }
}

/// The whole batch of one layer, as one device would hold it.
fn whole(step: u64, layer: u32, geometry: HeadGeometry, documents: &[Document]) -> RankInputs {
    let lengths: Vec<usize> = documents.iter().map(Document::tokens).collect();
    RankInputs::random(step, layer, 0, geometry, &lengths)
}

/// Rows of the whole batch that a rank holds.
fn rows_of(holdings: &[Holding], whole: &LayerCall) -> Vec<usize> {
    let first = |document| whole.documents.iter().find(|d| d.id == document).unwrap().rows.start();
    holdings.iter().flat_map(|h| h.tokens.iter().map(move |t| first(h.document) + t)).collect()
}

fn picked<T: Copy>(values: &[T], rows: &[usize], width: usize) -> Vec<T> {
    rows.iter().flat_map(|&row| &values[row * width..][..width]).copied().collect()
}

/// What of the whole batch a rank holds.
fn part_of(whole: &RankInputs, holdings: &[Holding], rows: &[usize]) -> RankInputs {
    let geometry = whole.call.geometry;
    let pick = |elements: &Elements, heads: usize, dim: usize| {
        Elements::rounded(geometry.dtype(), picked(&elements.values(), rows, heads * dim))
    };
    let (q_heads, kv_heads) = (geometry.q_heads(), geometry.kv_heads());
    let mut at = 0;
    let packed = holdings.iter().map(|held| {
        let rows = Span::at(at, held.tokens.len());
        at += rows.len();
        PackedDocument { id: held.document, rows, first_token: held.tokens.start(), length: held.length }
    });
    RankInputs {
        call: LayerCall { documents: packed.collect(), ..whole.call.clone() },
        qkv: Qkv {
            q: pick(&whole.qkv.q, q_heads, geometry.head_dim()),
            k: pick(&whole.qkv.k, kv_heads, geometry.head_dim()),
            v: pick(&whole.qkv.v, kv_heads, geometry.v_head_dim()),
        },
        gradient_of_o: pick(&whole.gradient_of_o, q_heads, geometry.v_head_dim()),
    }
}

/// Puts a rank's rows of a layer's tensors in their places; whatever nobody fills stays a NaN.
fn put(into: &mut LayerOutput, part: &LayerOutput, rows: &[usize], all: usize) {
    let pairs = [
        (&mut into.o, &part.o),
        (&mut into.lse, &part.lse),
        (&mut into.dq, &part.dq),
        (&mut into.dk, &part.dk),
        (&mut into.dv, &part.dv),
    ];
    for (into, part) in pairs {
        let width = if rows.is_empty() { 0 } else { part.len() / rows.len() };
        assert_eq!(part.len(), rows.len() * width);
        into.resize(into.len().max(all * width), f32::NAN);
        for (&row, values) in rows.iter().zip(part.chunks(width.max(1))) {
            into[row * width..][..width].copy_from_slice(values);
        }
    }
}

/// Layers that a step of these tests has: all forward, then all backward, as in a model.
const LAYERS: u32 = 2;

struct Outcome {
    layers: Vec<LayerOutput>,
    stats: Vec<StepStats>,
}

/// Computes one step on all ranks at once. `between` runs on rank 0 between forward and backward.
fn step(job: &Job, documents: &[Document], step: u64, between: impl FnOnce() + Send) -> Outcome {
    for (rank, pool) in job.pools.iter().enumerate() {
        let submitted = if rank == 0 { documents.to_vec() } else { Vec::new() };
        pool.submit_step(step, submitted).unwrap();
    }
    let geometry = geometry_of(job);
    let batch: Vec<RankInputs> = (0..LAYERS).map(|layer| whole(step, layer, geometry, documents)).collect();
    let mut between = Some(between);
    let barrier = std::sync::Barrier::new(job.pools.len());
    let parts: Vec<_> = std::thread::scope(|scope| {
        let computing: Vec<_> = job
            .pools
            .iter()
            .enumerate()
            .map(|(rank, pool)| {
                let between = if rank == 0 { between.take() } else { None };
                let (batch, barrier) = (&batch, &barrier);
                scope.spawn(move || {
                    let parts = attend(pool, batch, step, between);
                    // As after a sum of gradients.
                    barrier.wait();
                    (parts, pool.finish_step(step, 0.1).unwrap())
                })
            })
            .collect();
        computing.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let all = batch[0].call.rows();
    let empty = || LayerOutput { o: vec![], lse: vec![], dq: vec![], dk: vec![], dv: vec![] };
    let mut layers: Vec<LayerOutput> = batch.iter().map(|_| empty()).collect();
    let mut held = vec![0; all];
    for ((rows, outputs), _) in &parts {
        rows.iter().for_each(|&row| held[row] += 1);
        for (into, output) in layers.iter_mut().zip(outputs) {
            put(into, output, rows, all);
        }
    }
    assert!(held.iter().all(|&n| n == 1), "every token has one home");
    Outcome { layers, stats: parts.into_iter().map(|(_, stats)| stats).collect() }
}

fn geometry_of(job: &Job) -> HeadGeometry {
    let dtype = DType::ALL.into_iter().find(|d| job.pools[0].numerics_id().contains(&format!("-{d}-")));
    geometry().with_dtype(dtype.unwrap())
}

/// A rank's rows, and what its layers gave.
fn attend(
    pool: &PoolAttention,
    batch: &[RankInputs],
    step: u64,
    between: Option<impl FnOnce()>,
) -> (Vec<usize>, Vec<LayerOutput>) {
    let holdings = pool.holdings(step).unwrap();
    let rows = rows_of(&holdings, &batch[0].call);
    let parts: Vec<_> = batch.iter().map(|whole| part_of(whole, &holdings, &rows)).collect();
    let forward = |part: &RankInputs| pool.forward(&part.call, &part.qkv).unwrap();
    let attended: Vec<_> = parts.iter().map(forward).collect();
    if let Some(between) = between {
        between();
    }
    let mut outputs = Vec::new();
    for (part, attended) in parts.iter().zip(attended).rev() {
        let dim = part.call.geometry.v_head_dim();
        let d_o = part.gradient_of_o.values();
        let dots = d_o.chunks(dim).zip(attended.o.chunks(dim));
        let d: Vec<f32> = dots.map(|(a, b)| a.iter().zip(b).map(|(a, b)| a * b).sum()).collect();
        let (d_o, lse) = (part.gradient_of_o.clone(), Arc::clone(&attended.lse));
        let gradient = OutputGradient { d_o, lse, d: Arc::new(d) };
        let sums = pool.backward(&part.call, &part.qkv, &gradient).unwrap();
        let lse = attended.lse.to_vec();
        outputs.push(LayerOutput { o: attended.o, lse, dq: sums.dq, dk: sums.dk, dv: sums.dv });
    }
    outputs.reverse();
    (rows, outputs)
}

/// Checks a step against the whole batch on this thread, and returns its bits.
fn check(job: &Job, documents: &[Document], n: u64) -> (Vec<Vec<u32>>, Vec<StepStats>) {
    checked(job, documents, n, || {})
}

fn checked(
    job: &Job,
    documents: &[Document],
    n: u64,
    between: impl FnOnce() + Send,
) -> (Vec<Vec<u32>>, Vec<StepStats>) {
    let outcome = step(job, documents, n, between);
    for (layer, output) in (0..).zip(&outcome.layers) {
        let alone = whole(n, layer, geometry_of(job), documents).compute_locally();
        let distance = output.distance(&alone);
        assert!(distance < 2e-6, "layer {layer} is {distance:e} from that of one device");
    }
    (outcome.layers.iter().map(LayerOutput::bits).collect(), outcome.stats)
}

#[test]
fn placed_documents_attend_as_on_one_device() {
    let job = Setup::default().start(3, geometry());
    for n in 0..3 {
        let (_, stats) = check(&job, &unplaced(&LENGTHS), n);
        let summary = &stats[0].summary;
        assert!(summary.imbalance_after < 1.05 && summary.tokens_imbalance <= 1.02, "{summary:?}");
        let tasks: u64 = stats.iter().map(|s| s.tasks).sum();
        assert_eq!(
            tasks,
            2 * u64::from(LAYERS) * summary.tasks,
            "each task is computed forward and backward"
        );
        let moved: u64 = stats.iter().map(|s| s.bytes_moved).sum();
        // Backward, Q, K and V travel again: the planner assumes servers that keep them. And a server that computes for two
        // homes of one document delivers gradients of its keys for each.
        let least = u64::from(LAYERS) * (summary.forward_bytes + summary.backward_bytes);
        let most = 2 * least;
        assert!(moved >= least && moved <= most, "{moved} bytes moved, {least} to {most} planned");
    }
}

#[test]
fn documents_scattered_over_ranks_attend_as_on_one_device() {
    let mut random = Random(3);
    for dtype in DType::ALL {
        let setup = Setup { dedicated: 1, ..Setup::default() };
        let job = setup.start(4, geometry().with_dtype(dtype));
        for n in 0..2 {
            check(&job, &scattered(&[700, 1, 64, 333, 257], 4, &mut random), n);
        }
    }
}

#[test]
fn a_dedicated_pool_serves_documents_that_ranks_share() {
    let job = Setup { in_place: false, dedicated: 2, ..Setup::default() }.start(3, geometry());
    check(&job, &scattered(&LENGTHS, 3, &mut Random(5)), 0);
    check(&job, &unplaced(&LENGTHS), 1);
}

#[test]
fn masks_of_shared_documents_hold() {
    let masked = |document: Document| {
        let (tokens, heads) = (document.tokens(), Span::to(2));
        let mask = match document.id().index {
            0 => Mask::full(tokens, heads),
            1 => Mask::sliding_window(tokens, 100, heads),
            _ => Mask::shifted_sparse(tokens, 64, heads),
        };
        document.with_mask(mask.unwrap()).unwrap()
    };
    let lengths = [400, 700, 512];
    let shared: Vec<_> = scattered(&lengths, 3, &mut Random(8)).into_iter().map(masked).collect();
    let job = Setup::default().start(3, geometry());
    let outcome = step(&job, &shared, 0, || {});
    let alone: Vec<_> = scattered(&lengths, 1, &mut Random(8)).into_iter().map(masked).collect();
    let job = Setup::default().start(1, geometry());
    for (output, alone) in outcome.layers.iter().zip(step(&job, &alone, 0, || {}).layers) {
        let distance = output.distance(&alone);
        assert!(distance < 2e-6, "{distance:e} from one rank");
    }
}

#[test]
fn two_runs_and_a_server_that_dies_in_mid_step_give_the_same_bits() {
    let bits_with = |kill: Option<u64>| {
        let setup = Setup { dedicated: 2, ..Setup::default() };
        let mut job = setup.start(3, geometry());
        let mut bits = Vec::new();
        for n in 0..3 {
            let victim = (kill == Some(n)).then(|| job.services.remove(4));
            let dies = victim.is_some();
            let (layers, stats) = checked(&job, &unplaced(&LENGTHS), n, || drop(victim));
            bits.push(layers);
            let resent: u64 = stats.iter().map(|s| s.tasks_resent).sum();
            assert_eq!(resent > 0, dies, "step {n}: {resent} tasks resent");
        }
        bits
    };
    let undisturbed = bits_with(None);
    assert_eq!(undisturbed, bits_with(None));
    assert_eq!(undisturbed, bits_with(Some(1)));
}

#[test]
fn little_memory_takes_longer_and_nothing_hangs() {
    let engine = EngineOptions { memory_bytes: 16 << 20, ..EngineOptions::default() };
    let job = Setup { engine, dedicated: 1, ..Setup::default() }.start(3, geometry());
    check(&job, &unplaced(&LENGTHS), 0);
}

#[test]
fn a_rank_that_falls_behind_is_named() {
    let short = |options| JobOptions { task_timeout: Duration::from_millis(500), ..options };
    let job = Setup::default().start_with(2, geometry(), short);
    let documents = [Document::new(
        id(0),
        600,
        vec![
            HomeRange { rank: 0, tokens: Span::to(300) },
            HomeRange { rank: 1, tokens: Span::new(300, 600).unwrap() },
        ],
    )
    .unwrap()];
    job.pools[0].submit_step(0, documents.to_vec()).unwrap();
    job.pools[1].submit_step(0, Vec::new()).unwrap();
    let batch = whole(0, 0, geometry(), &documents);
    let holdings = job.pools[1].holdings(0).unwrap();
    let part = part_of(&batch, &holdings, &rows_of(&holdings, &batch.call));
    // Rank 0 never computes the layer whose keys rank 1 needs.
    let error = job.pools[1].forward(&part.call, &part.qkv).unwrap_err().to_string();
    for words in ["job shared, rank 1, step 0, layer 0", "rank 0, home of keys at", "did not reach", "0.5 s"]
    {
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_call_of_other_tokens_than_placed_is_refused() {
    let job = Setup::default().start(2, geometry());
    job.pools[0].submit_step(0, unplaced(&[400, 100])).unwrap();
    job.pools[1].submit_step(0, Vec::new()).unwrap();
    let documents = unplaced(&[400, 100]);
    let batch = whole(0, 0, geometry(), &documents);
    let mut holdings = job.pools[0].holdings(0).unwrap();
    holdings[0].tokens = Span::at(holdings[0].tokens.start(), holdings[0].tokens.len() - 1);
    let part = part_of(&batch, &holdings, &rows_of(&holdings, &batch.call));
    let error = job.pools[0].forward(&part.call, &part.qkv).unwrap_err().to_string();
    assert!(error.contains("this rank holds"), "{error}");
}
