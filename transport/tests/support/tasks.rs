//! Random shipments: pieces of one document that share tensors as a worker's pieces do.

use outboard_attention::{
    DType, Direction, DocumentId, Elements, HeadGeometry, HeadShape, Mask, Span, Task, TensorLayout,
    TensorSlice,
};
use outboard_proto::TaskHeader;
use outboard_transport::{GradientInputs, TaskInputs, TaskRequest};

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Between `low` and `high`, both included.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    fn element(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    }
}

/// How large a shipment is.
#[derive(Clone, Copy)]
pub struct Shape {
    pub tasks: usize,
    pub tokens: usize,
    pub kv_heads: usize,
    pub group: usize,
    pub head_dim: usize,
    pub v_head_dim: usize,
    pub direction: Direction,
    pub dtype: DType,
}

impl Shape {
    pub fn small(direction: Direction) -> Shape {
        let dtype = DType::F32;
        Shape { tasks: 3, tokens: 50, kv_heads: 2, group: 2, head_dim: 16, v_head_dim: 8, direction, dtype }
    }

    pub fn random(rng: &mut Rng) -> Shape {
        let direction = if rng.between(0, 1) == 0 { Direction::Forward } else { Direction::Backward };
        Shape {
            tasks: rng.between(1, 6),
            tokens: rng.between(10, 600),
            kv_heads: rng.between(1, 4),
            group: rng.between(1, 3),
            head_dim: rng.between(1, 70),
            v_head_dim: rng.between(1, 70),
            direction,
            dtype: DType::F32,
        }
    }
}

/// Tasks of one document in one direction, whose tensors are windows on the document's packed rows.
pub fn shipment(rng: &mut Rng, shape: Shape) -> Vec<TaskRequest> {
    drawn(rng, shape).tasks
}

/// A document's tasks, and its keys `[tokens, kv heads, dim]`.
pub struct Drawn {
    pub tasks: Vec<TaskRequest>,
    pub keys: [Elements; 2],
    pub geometry: HeadGeometry,
    pub mask: Mask,
}

/// As [`shipment`], with what it was cut from.
pub fn drawn(rng: &mut Rng, shape: Shape) -> Drawn {
    let Shape { tasks, tokens, kv_heads, group, head_dim, v_head_dim, direction, dtype } = shape;
    let q_heads = kv_heads * group;
    let heads = HeadShape { q_heads, kv_heads, head_dim, v_head_dim, scale: 0.125, dtype, softcap: None };
    let geometry = HeadGeometry::try_from(heads).unwrap();
    let mut storage = |row: usize, dtype| Elements::rounded(dtype, (0..tokens * row).map(|_| rng.element()));
    let q = storage(q_heads * head_dim, dtype);
    let (k, v) = (storage(kv_heads * head_dim, dtype), storage(kv_heads * v_head_dim, dtype));
    let d_o = storage(q_heads * v_head_dim, dtype);
    let (lse, d) = (storage(q_heads, DType::F32), storage(q_heads, DType::F32));
    let mask = Mask::causal(tokens, kv_heads);
    let piece = |rng: &mut Rng, n: usize| {
        let start = rng.between(0, tokens - 1);
        let rows = Span::new(start, rng.between(start + 1, tokens)).unwrap();
        let first = rng.between(0, kv_heads - 1);
        let heads = Span::new(first, rng.between(first + 1, kv_heads)).unwrap();
        let task =
            Task::new(DocumentId { rank: 0, index: 3 }, rows, Span::to(rows.end()), heads, &mask).unwrap();
        // Some clients name just what the task needs, some the whole document.
        let whole = rng.between(0, 1) == 0;
        let window = |storage: &Elements, all: usize, heads: Span, dim: usize, needed: Span| {
            let tokens = if whole { Span::to(tokens) } else { needed };
            let stride = all * dim;
            let offset = tokens.start() * stride + heads.start() * dim;
            let layout = TensorLayout { offset, stride, tokens, heads: heads.len(), dim };
            TensorSlice::new("window", storage.clone(), layout).unwrap()
        };
        let (q_window, kv) = (geometry.q_heads_of(heads), task.kv());
        let inputs = TaskInputs {
            q: window(&q, q_heads, q_window, head_dim, rows),
            k: window(&k, kv_heads, heads, head_dim, kv),
            v: window(&v, kv_heads, heads, v_head_dim, kv),
            gradient: (direction == Direction::Backward).then(|| GradientInputs {
                d_o: window(&d_o, q_heads, q_window, v_head_dim, rows),
                lse: window(&lse, q_heads, q_window, 1, rows),
                d: window(&d, q_heads, q_window, 1, rows),
            }),
        };
        let header = TaskHeader {
            job: "test".to_owned(),
            step: 5,
            plan_epoch: 0,
            layer: 1,
            direction,
            tick: 0,
            attempt: 0,
            slot: 2,
            group: n as u32,
            position: 0,
            numerics_id: None,
            geometry,
            task,
            result_dtype: DType::F32,
            deadline: None,
            key_homes: Vec::new(),
            group_tasks: 0,
        };
        TaskRequest::new(header, inputs)
    };
    let tasks = (0..tasks).map(|n| piece(rng, n)).collect();
    Drawn { tasks, keys: [k, v], geometry, mask }
}
