//! A few shapes on one thread, short enough to compare two builds in CI: `cargo bench -p outboard-attention`.
//!
//! Throughput is FLOPs of useful work: Gelem/s reads as GFLOP/s. `outboard bench kernel` measures beside the machine's
//! peak.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::sync::Mutex;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use outboard_attention::kernel::{CpuKernel, Isa, KernelConfig, KernelTask, Operands, Results};
use outboard_attention::merge::row_dots;
use outboard_attention::{Direction, DocumentId, HeadGeometry, Mask, Span, Task, TensorView};

struct Shape {
    name: &'static str,
    queries: usize,
    tokens: usize,
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

struct Tensors {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_o: Vec<f32>,
}

const SHAPES: [Shape; 3] = [
    Shape { name: "causal 1k", queries: 1024, tokens: 1024, q_heads: 4, kv_heads: 4, head_dim: 128 },
    Shape { name: "causal 2k GQA 4", queries: 2048, tokens: 2048, q_heads: 4, kv_heads: 1, head_dim: 64 },
    Shape {
        name: "last 128 of 8k GQA 4",
        queries: 128,
        tokens: 8192,
        q_heads: 4,
        kv_heads: 1,
        head_dim: 128,
    },
];

fn noise(shape: [usize; 3]) -> Vec<f32> {
    let mut state = 1u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(shape.iter().product()).collect()
}

fn compute(kernel: &mut CpuKernel, task: KernelTask<'_>) -> Results {
    let finished = Mutex::new(None);
    kernel.run(vec![task], &|_, results| *finished.lock().unwrap() = Some(results)).unwrap();
    finished.into_inner().unwrap().unwrap()
}

fn kernel(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("kernel f32");
    group.sampling_mode(SamplingMode::Flat);
    let mut kernel = CpuKernel::new(KernelConfig::new(Isa::detect(), 1)).unwrap();
    for shape in &SHAPES {
        let geometry = HeadGeometry::standard(shape.q_heads, shape.kv_heads, shape.head_dim).unwrap();
        let queries = Span::at(shape.tokens - shape.queries, shape.queries);
        let (keys, kv_heads) = (Span::to(shape.tokens), Span::to(shape.kv_heads));
        let mask = Mask::causal(shape.tokens, shape.kv_heads);
        let task = &Task::new(DocumentId { rank: 0, index: 0 }, queries, keys, kv_heads, &mask).unwrap();

        let shapes = task.shapes(&geometry);
        let Tensors { q, k, v, d_o } =
            &Tensors { q: noise(shapes.q), k: noise(shapes.k), v: noise(shapes.v), d_o: noise(shapes.o) };
        let q = TensorView::contiguous("q", q, shapes.q).unwrap();
        let k = TensorView::contiguous("k", k, shapes.k).unwrap();
        let v = TensorView::contiguous("v", v, shapes.v).unwrap();
        let d_o = TensorView::contiguous("d_o", d_o, shapes.o).unwrap();

        let forward = || Operands::Forward { q: q.into(), k: k.into(), v: v.into() };
        let results = Results::zeroed(task, &geometry, Direction::Forward);
        let task_of = |operands, results| KernelTask { geometry, task, operands, results };
        let Results::Forward { o, lse } = compute(&mut kernel, task_of(forward(), results)) else { continue };
        let d = row_dots(d_o, TensorView::contiguous("o", &o, shapes.o).unwrap()).unwrap();
        let lse = TensorView::contiguous("lse", &lse, shapes.row).unwrap();
        let d = TensorView::contiguous("d", &d, shapes.row).unwrap();
        let backward =
            || Operands::Backward { q: q.into(), k: k.into(), v: v.into(), d_o: d_o.into(), lse, d };

        for direction in [Direction::Forward, Direction::Backward] {
            group.throughput(Throughput::Elements(task.flops(&geometry, direction) as u64));
            group.bench_function(BenchmarkId::new(shape.name, direction), |bencher| {
                let mut results = Some(Results::zeroed(task, &geometry, direction));
                bencher.iter(|| {
                    let operands = match direction {
                        Direction::Forward => forward(),
                        Direction::Backward => backward(),
                    };
                    let taken = results.take().unwrap();
                    results = Some(compute(&mut kernel, task_of(operands, taken)));
                });
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    targets = kernel
}
criterion_main!(benches);
