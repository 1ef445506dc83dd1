//! Random tasks, and the check of a kernel against the reference.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]

use std::ops::RangeInclusive;
use std::sync::Mutex;

use half::{bf16, f16};
use outboard_attention::kernel::{CpuKernel, Isa, KernelConfig, KernelTask, Operands, Results};
use outboard_attention::merge::row_dots;
use outboard_attention::reference::{self, Inputs, OutputGradient};
use outboard_attention::{
    AnyTensor, BandSlice, DType, Direction, DocumentId, Element, HeadGeometry, HeadShape, Mask, MaskPart,
    Span, Task, TensorView,
};

pub const DOCUMENT: DocumentId = DocumentId { rank: 0, index: 0 };

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    pub fn within(&mut self, range: RangeInclusive<usize>) -> usize {
        range.start() + self.below(range.end() - range.start() + 1)
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// About normal: a sum of four uniforms.
    pub fn value(&mut self) -> f32 {
        let uniform = |bits: u64| (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        (0..4).map(|_| uniform(self.bits())).sum::<f32>() * 0.87
    }

    pub fn span(&mut self, within: Span) -> Span {
        let len = self.within(1..=within.len());
        Span::at(within.start() + self.below(within.len() - len + 1), len)
    }
}

/// An owned tensor with gaps between tokens, of values that its element type holds exactly.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub data: Vec<f32>,
    pub shape: [usize; 3],
    pub stride: usize,
    elements: Elements,
}

/// The same values, as the kernel gets them.
#[derive(Clone, Debug)]
enum Elements {
    F32,
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Tensor {
    pub fn random(random: &mut Random, shape: [usize; 3], gap: usize, size: f32) -> Self {
        let stride = shape[1] * shape[2] + gap;
        let mut data: Vec<f32> = (0..shape[0] * stride).map(|_| random.value() * size).collect();
        // What lies between tokens must never be read.
        for token in data.chunks_mut(stride) {
            token[shape[1] * shape[2]..].fill(f32::NAN);
        }
        Tensor { data, shape, stride, elements: Elements::F32 }
    }

    pub fn of(data: Vec<f32>, shape: [usize; 3]) -> Self {
        Tensor { data, shape, stride: shape[1] * shape[2], elements: Elements::F32 }
    }

    /// Rounded to an element type.
    pub fn rounded(mut self, dtype: DType) -> Self {
        fn round<E: Element>(data: &mut [f32]) -> Vec<E> {
            let elements: Vec<E> = data.iter().map(|x| E::from_f32(*x)).collect();
            data.iter_mut().zip(&elements).for_each(|(x, e)| *x = e.to_f32());
            elements
        }
        self.elements = match dtype {
            DType::Bf16 => Elements::Bf16(round(&mut self.data)),
            DType::F16 => Elements::F16(round(&mut self.data)),
            _ => Elements::F32,
        };
        self
    }

    pub fn any(&self) -> AnyTensor<'_> {
        let (shape, stride) = (self.shape, self.stride);
        match &self.elements {
            Elements::F32 => self.view().into(),
            Elements::Bf16(data) => TensorView::new("tensor", data, shape, stride).unwrap().into(),
            Elements::F16(data) => TensorView::new("tensor", data, shape, stride).unwrap().into(),
        }
    }

    pub fn part(&self, tokens: Span, heads: Span) -> Tensor {
        let dtype = self.any().dtype();
        let part = self.view().part(tokens, heads).unwrap();
        let (shape, stride) = (part.shape(), part.stride());
        Tensor { data: part.data().to_vec(), shape, stride, elements: Elements::F32 }.rounded(dtype)
    }

    pub fn view(&self) -> TensorView<'_> {
        TensorView::new("tensor", &self.data, self.shape, self.stride).unwrap()
    }
}

/// A task with its inputs. LSE and D are those of more keys than the task's own.
#[derive(Clone, Debug)]
pub struct Case {
    pub geometry: HeadGeometry,
    pub task: Task,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub d_o: Tensor,
    pub lse: Tensor,
    pub d: Tensor,
}

impl Case {
    pub fn new(random: &mut Random, geometry: HeadGeometry, task: Task, size: f32) -> Self {
        let shapes = task.shapes(&geometry);
        let gap = random.pick(&[0, 0, 3, 16]);
        let dtype = geometry.dtype();
        let q = Tensor::random(random, shapes.q, gap, size).rounded(dtype);
        let k = Tensor::random(random, shapes.k, gap, size).rounded(dtype);
        let v = Tensor::random(random, shapes.v, gap / 2, 1.0).rounded(dtype);
        let d_o = Tensor::random(random, shapes.o, gap, 1.0).rounded(dtype);
        let inputs = Inputs { q: q.view(), k: k.view(), v: v.view() };
        let out = reference::forward(&geometry, &task, inputs).unwrap();
        let others = random.pick(&[0.0, 0.7]);
        let lse = Tensor::of(out.lse.iter().map(|x| (x + others) as f32).collect(), shapes.row);
        let o: Vec<f32> = out.o.iter().map(|x| *x as f32).collect();
        let o = TensorView::contiguous("o", &o, shapes.o).unwrap();
        // With its own D alone, a row of one key would have a gradient of nothing but rounding.
        let d = row_dots(d_o.view(), o).unwrap().into_iter().map(|d| d + random.value()).collect();
        let d = Tensor::of(d, shapes.row);
        Case { geometry, task, q, k, v, d_o, lse, d }
    }

    /// With the LSE of the task's own keys, after its tensors have changed.
    pub fn with_own_lse(mut self) -> Self {
        let lse = self.reference(Direction::Forward).remove(1);
        self.lse.data = lse.into_iter().map(|x| x as f32).collect();
        self
    }

    pub fn operands(&self, direction: Direction) -> Operands<'_> {
        let (q, k, v) = (self.q.any(), self.k.any(), self.v.any());
        match direction {
            Direction::Forward => Operands::Forward { q: q.into(), k, v },
            Direction::Backward => {
                let (d_o, lse, d) = (self.d_o.any(), self.lse.view(), self.d.view());
                Operands::Backward { q, k, v, d_o: d_o.into(), lse, d }
            }
        }
    }

    /// Ready to compute, into poisoned buffers.
    pub fn kernel_task(&self, direction: Direction) -> KernelTask<'_> {
        let results = poisoned(Results::zeroed(&self.task, &self.geometry, direction));
        KernelTask { geometry: self.geometry, task: &self.task, operands: self.operands(direction), results }
    }

    pub fn reference(&self, direction: Direction) -> Vec<Vec<f64>> {
        let inputs = Inputs { q: self.q.view(), k: self.k.view(), v: self.v.view() };
        match direction {
            Direction::Forward => {
                let out = reference::forward(&self.geometry, &self.task, inputs).unwrap();
                vec![out.o, out.lse]
            }
            Direction::Backward => {
                let widen = |t: &Tensor| t.data.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
                let (lse, d) = (widen(&self.lse), widen(&self.d));
                let gradient = OutputGradient { d_o: self.d_o.view(), lse: &lse, d: &d };
                let out = reference::backward(&self.geometry, &self.task, inputs, gradient).unwrap();
                vec![out.dq, out.dk, out.dv]
            }
        }
    }
}

fn poisoned(mut results: Results) -> Results {
    match &mut results {
        Results::Forward { o, lse } => [o, lse].map(|x| x.fill(f32::NAN)).len(),
        Results::Stage(_) => 0,
        Results::Backward { dq, dk, dv } => [dq, dk, dv].map(|x| x.fill(f32::NAN)).len(),
    };
    results
}

pub fn tensors(results: Results) -> Vec<Vec<f32>> {
    match results {
        Results::Forward { o, lse } => vec![o, lse],
        Results::Stage(_) => panic!("a stage is not the end"),
        Results::Backward { dq, dk, dv } => vec![dq, dk, dv],
    }
}

pub fn bits(tensors: &[Vec<f32>]) -> Vec<Vec<u32>> {
    tensors.iter().map(|t| t.iter().map(|x| x.to_bits()).collect()).collect()
}

/// The instruction sets to test: all that this machine has, or the one that OUTBOARD_TEST_ISA names.
pub fn isas() -> Vec<Isa> {
    match std::env::var("OUTBOARD_TEST_ISA") {
        Ok(name) => vec![name.parse().unwrap()],
        Err(_) => Isa::available(),
    }
}

/// How many random cases to try of `usual`: that many, or as OUTBOARD_TEST_SHARE says, for slow machines and emulators.
pub fn cases(usual: usize) -> usize {
    let share = std::env::var("OUTBOARD_TEST_SHARE").map_or(1.0, |share| share.parse::<f64>().unwrap());
    ((usual as f64 * share).ceil() as usize).max(1)
}

pub fn kernel(isa: Isa, threads: usize) -> CpuKernel {
    CpuKernel::new(KernelConfig::new(isa, threads)).unwrap()
}

/// Computes a batch; the results come in the order of its tasks.
pub fn run(kernel: &mut CpuKernel, batch: Vec<KernelTask<'_>>) -> Vec<Vec<Vec<f32>>> {
    let slots: Mutex<Vec<Option<Results>>> = Mutex::new(batch.iter().map(|_| None).collect());
    let done = |index: usize, results| {
        let before = slots.lock().unwrap()[index].replace(results);
        assert_eq!(before, None, "task {index} was done twice");
    };
    kernel.run(batch, &done).unwrap();
    slots.into_inner().unwrap().into_iter().map(|r| tensors(r.expect("every task is done"))).collect()
}

pub fn run_one(isa: Isa, case: &Case, direction: Direction) -> Vec<Vec<f32>> {
    run(&mut kernel(isa, 1), vec![case.kernel_task(direction)]).remove(0)
}

/// Checks both directions of a task against the reference.
pub fn check(isa: Isa, case: &Case) {
    let tolerance = tolerance(isa, case.geometry.dtype());
    for direction in [Direction::Forward, Direction::Backward] {
        let actual = run_one(isa, case, direction);
        let names: &[_] = if direction == Direction::Forward { &["o", "lse"] } else { &["dq", "dk", "dv"] };
        for ((name, actual), expected) in names.iter().zip(actual).zip(case.reference(direction)) {
            check_close(
                &format!("{name} on {isa} of {:?} {:?}", case.geometry, case.task),
                &actual,
                &expected,
                tolerance,
            );
        }
    }
}

/// Compares by relative Frobenius norm, and each element by the largest; infinite and zero rows must agree exactly.
pub fn check_close(what: &str, actual: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let (mut error, mut norm, mut worst, mut largest) = (0.0f64, 0.0f64, 0.0f64, 0.0f64);
    for (index, (a, e)) in actual.iter().zip(expected).enumerate() {
        if e.is_infinite() {
            assert_eq!(f64::from(*a), *e, "{what} at {index}");
            continue;
        }
        let difference = (f64::from(*a) - e).abs();
        assert!(difference.is_finite(), "{what} at {index}: {a} instead of {e}");
        error += difference * difference;
        norm += e * e;
        worst = worst.max(difference);
        largest = largest.max(e.abs());
    }
    assert!(error.sqrt() <= tolerance * norm.sqrt(), "{what}: off by {:e}", error.sqrt() / norm.sqrt());
    assert!(worst <= 20.0 * tolerance * largest, "{what}: an element is off by {worst:e} of {largest:e}");
}

pub fn random_geometry(random: &mut Random) -> HeadGeometry {
    const DIMS: [usize; 9] = [8, 12, 16, 24, 40, 64, 80, 128, 256];
    let kv_heads = random.pick(&[1, 1, 2, 3]);
    let q_heads = kv_heads * random.pick(&[1, 1, 2, 3, 4, 8]);
    let head_dim = random.pick(&DIMS);
    let v_head_dim = if random.below(2) == 0 { head_dim } else { random.pick(&DIMS) };
    let scale = 1.0 / (head_dim as f32).sqrt();
    let softcap = if random.below(4) == 0 { Some(random.pick(&[0.7, 3.0, 50.0])) } else { None };
    let dtype = random.pick(&[DType::F32, DType::F32, DType::Bf16, DType::F16]);
    HeadShape { q_heads, kv_heads, head_dim, v_head_dim, scale, dtype, softcap }.try_into().unwrap()
}

/// What an element type and instruction set may be off by, relative to the norm of an exact result.
pub fn tolerance(isa: Isa, dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 if matches!(isa, Isa::Portable | Isa::Avx512Bf16) => 8e-3,
        _ => 3e-6,
    }
}

/// Causal, window, full, or several disjoint slices, possibly others for some kv heads.
pub fn random_mask(random: &mut Random, tokens: usize, kv_heads: usize) -> Mask {
    let all = Span::to(tokens);
    let split = random.within(0..=kv_heads);
    let mut parts = Vec::new();
    for heads in [Span::to(split), Span::at(split, kv_heads - split)] {
        if heads.is_empty() {
            continue;
        }
        let window = random.within(1..=tokens) as i64;
        let bands =
            [(None, Some(0)), (Some(-window), Some(0)), (None, None), (Some(-window), Some(window / 2))];
        if random.below(2) == 0 {
            let (lo, hi) = random.pick(&bands);
            parts.push(MaskPart { kv_heads: heads, slice: BandSlice::new(all, all, lo, hi).unwrap() });
            continue;
        }
        let mut own = Vec::new();
        for _ in 0..8 {
            let (q, kv) = (random.span(all), random.span(all));
            let (lo, hi) = random.pick(&bands);
            let shift = random.below(tokens) as i64 - tokens as i64 / 2;
            let (lo, hi) = (lo.map(|x: i64| x + shift), hi.map(|x: i64| x + shift));
            own.push(MaskPart { kv_heads: heads, slice: BandSlice::new(q, kv, lo, hi).unwrap() });
            if Mask::new(own.clone()).is_err() {
                own.pop();
            }
        }
        parts.extend(own);
    }
    Mask::new(parts).unwrap()
}

/// A task of a random document, either all of it or a random rectangle.
pub fn random_task(random: &mut Random, geometry: &HeadGeometry, tokens: usize) -> Task {
    let heads = Span::to(geometry.kv_heads());
    loop {
        let mask = random_mask(random, tokens, geometry.kv_heads());
        let all = Span::to(tokens);
        let task = if random.below(3) == 0 {
            Task::new(DOCUMENT, all, all, heads, &mask)
        } else {
            Task::new(DOCUMENT, random.span(all), random.span(all), random.span(heads), &mask)
        };
        if let Ok(task) = task {
            return task;
        }
    }
}

pub fn causal_task(tokens: usize, kv_heads: usize) -> Task {
    let all = Span::to(tokens);
    Task::new(DOCUMENT, all, all, Span::to(kv_heads), &Mask::causal(tokens, kv_heads)).unwrap()
}
