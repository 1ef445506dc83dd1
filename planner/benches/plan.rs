//! Planning and judging as jobs grow, to compare two builds: `cargo bench -p outboard-planner`.
//!
//! Throughput is servers: Kelem/s reads as thousands of servers planned a second. `outboard bench plan` says what the
//! plans are worth, on steps of two mixes.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use outboard_attention::{DType, Document, DocumentId, HeadGeometry, HomeRange, Span};
use outboard_planner::{Problem, Slot, judge, plan};

const SERVERS: [u32; 3] = [64, 256, 512];
/// Tokens of a rank.
const CONTEXT: usize = 128 * 1024;
/// A long tail: tokens of documents at nine points that are equally far apart by number of documents. Between two of
/// them lengths are drawn evenly on the logarithm; documents longer than a context are cut off there.
const LENGTHS: [f64; 9] = [600.0, 1_100.0, 1_500.0, 2_000.0, 3_000.0, 5_500.0, 10_000.0, 30_000.0, 340_000.0];

/// A step of in-place servers, each filled with a context's worth of documents.
struct Step {
    name: &'static str,
    /// Query heads and kv heads.
    heads: (usize, usize),
}

/// A model of 8B parameters, and one of its tensor-parallel lanes.
const STEPS: [Step; 2] = [Step { name: "whole", heads: (32, 8) }, Step { name: "lane", heads: (4, 1) }];

fn documents(servers: u32) -> Vec<Document> {
    let mut state = u64::from(servers);
    let mut unit = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    let mut documents = Vec::new();
    for rank in 0..servers {
        let (mut left, mut index) = (CONTEXT, 0);
        while left > 0 {
            let at = unit() * (LENGTHS.len() - 1) as f64;
            let (below, above) = (LENGTHS[at as usize], LENGTHS[at as usize + 1]);
            let tokens = (below * (above / below).powf(at.fract())) as usize;
            let tokens = tokens.min(left);
            let home = HomeRange { rank, tokens: Span::to(tokens) };
            documents.push(Document::new(DocumentId { rank, index }, tokens, vec![home]).unwrap());
            left -= tokens;
            index += 1;
        }
    }
    documents
}

impl Step {
    fn problem(&self, servers: u32) -> Problem {
        let (q_heads, kv_heads) = self.heads;
        let geometry = HeadGeometry::standard(q_heads, kv_heads, 128).unwrap().with_dtype(DType::Bf16);
        Problem::new(geometry, documents(servers), (0..servers).map(Slot::in_place).collect())
    }
}

fn planning(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("plan");
    group.sampling_mode(SamplingMode::Flat);
    for (step, servers) in steps() {
        let problem = step.problem(servers);
        group.throughput(Throughput::Elements(u64::from(servers)));
        group.bench_function(BenchmarkId::new(step.name, servers), |bencher| {
            bencher.iter(|| plan(black_box(&problem)).unwrap());
        });
    }
}

fn judging(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("judge");
    group.sampling_mode(SamplingMode::Flat);
    for (step, servers) in steps() {
        let problem = step.problem(servers);
        let planned = plan(&problem).unwrap();
        group.throughput(Throughput::Elements(u64::from(servers)));
        group.bench_function(BenchmarkId::new(step.name, servers), |bencher| {
            bencher.iter(|| judge(black_box(&planned), black_box(&problem)).unwrap());
        });
    }
}

fn steps() -> impl Iterator<Item = (&'static Step, u32)> {
    STEPS.iter().flat_map(|step| SERVERS.map(|servers| (step, servers)))
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    targets = planning, judging
}
criterion_main!(benches);
