//! A batch's tables carried out on the host: the moving kernels as they are in `kernels.cu`, and cuDNN by its
//! definition. What a device would compute must then agree with the reference.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../../../../attention/tests/common/mod.rs"]
mod common;

use bytemuck::Pod;
use common::{Case, Random, check_close, random_geometry, random_task};
use half::bf16;
use outboard_attention::{DType, Direction, HeadShape};

use super::tables::{BLOCK, KeyHead, MadeUp, Move, PieceSpan, RowHead, RowMove};
use super::*;
use crate::copy::{self, Source};
use crate::graph::CallGeometry;

/// Entries of a call's tables beyond its sequences.
const SPARE: usize = 3;
/// Rows that cuDNN writes scratch for at a time.
const TILE: usize = 128;

fn read<T: Pod>(bytes: &[u8], start: usize, len: usize) -> Vec<T> {
    bytes[start..start + len * size_of::<T>()]
        .chunks_exact(size_of::<T>())
        .map(bytemuck::pod_read_unaligned)
        .collect()
}

/// Memory of the device, poisoned: every float of it is NaN at first.
struct Memory(Vec<u8>);

impl Memory {
    fn new(bytes: usize) -> Memory {
        Memory(vec![0xff; bytes])
    }

    fn get<T: Pod>(&self, index: usize) -> T {
        bytemuck::pod_read_unaligned(&self.0[index * size_of::<T>()..][..size_of::<T>()])
    }

    fn set<T: Pod>(&mut self, index: usize, value: T) {
        self.0[index * size_of::<T>()..][..size_of::<T>()].copy_from_slice(bytemuck::bytes_of(&value));
    }

    /// The 16-bit element `index` from byte `region` on.
    fn wide(&self, region: usize, index: usize) -> f64 {
        self.get::<bf16>(region / 2 + index).to_f64()
    }

    fn narrow(&mut self, region: usize, index: usize, value: f64) {
        self.set(region / 2 + index, bf16::from_f64(value));
    }
}

struct Emulated<'a> {
    layout: &'a BatchLayout,
    tables: BatchTables,
    tensors: Memory,
    work: Memory,
    output: Memory,
    scale: f64,
}

impl Emulated<'_> {
    fn table<T: Pod>(&self, table: MoveTable) -> Vec<T> {
        read(self.tables.tables.bytes(), table.start, table.entries)
    }

    fn bring_in(&mut self) {
        for m in self.table::<Move>(self.tables.moves) {
            for row in 0..m.rows as usize {
                let to = if m.reversed == 1 { m.rows as usize - 1 - row } else { row };
                for i in 0..(m.group * m.padded) as usize {
                    let (head, e) = (i / m.padded as usize, i % m.padded as usize);
                    let from = m.source as usize + row * m.stride as usize + head * m.dim as usize + e;
                    let x = if e < m.dim as usize { self.tensors.get::<u16>(from) } else { 0 };
                    self.work.set(m.target as usize + to * (m.group * m.padded) as usize + i, x);
                }
            }
        }
        for m in self.table::<RowMove>(self.tables.row_moves) {
            for row in 0..m.rows as usize {
                let to = if m.reversed == 1 { m.rows as usize - 1 - row } else { row };
                for g in 0..m.group as usize {
                    let x: f32 = self.tensors.get(m.source as usize + row * m.stride as usize + g);
                    self.work.set(m.target as usize + to * m.group as usize + g, x);
                }
            }
        }
        for m in self.table::<MadeUp>(self.tables.made_up) {
            for row in 0..m.rows as usize {
                let to = if m.reversed == 1 { m.rows as usize - 1 - row } else { row };
                for g in 0..m.group as usize {
                    let at = (to * m.group as usize + g) * m.padded as usize;
                    let d: f32 = self.tensors.get(m.d as usize + row * m.stride as usize + g);
                    let from = m.d_o as usize + (row * m.stride as usize + g) * m.dim as usize;
                    let x =
                        |e: usize| if e < m.dim as usize { self.tensors.get(from + e) } else { bf16::ZERO };
                    let d_o: Vec<bf16> = (0..m.padded as usize).map(x).collect();
                    let wide: Vec<f64> = d_o.iter().map(|x| x.to_f64()).collect();
                    for (e, (o, d_o)) in made_up(&wide, f64::from(d)).into_iter().zip(d_o).enumerate() {
                        self.work.set(m.o as usize + at + e, o);
                        self.work.set(m.moved as usize + at + e, d_o);
                    }
                }
            }
        }
    }

    /// One call, as cuDNN sees it: lengths, offsets and regions.
    fn call(&mut self, call: &Call, tables: &CallTables) {
        let capacity = call.sequences.len() + SPARE;
        let bytes = self.tables.tables.bytes();
        let [rows, keys] = [tables.rows, tables.keys].map(|start| read::<i32>(bytes, start, capacity));
        let offsets = [
            tables.q_offsets,
            tables.k_offsets,
            tables.v_offsets,
            tables.row_offsets,
            tables.lse_offsets,
            tables.key_offsets,
        ];
        let offsets = offsets.map(|start| read::<i64>(bytes, start, capacity + 1));
        assert!(rows[call.sequences.len()..].iter().chain(&keys[call.sequences.len()..]).all(|n| *n == 0));
        let heads = match call.tensors {
            Tensors::Slabs => None,
            Tensors::InPlace(heads) => Some(heads),
        };
        let sequences = |b: usize| Lengths {
            rows: rows[b] as usize,
            keys: keys[b] as usize,
            at: std::array::from_fn(|i| offsets[i][b] as usize),
            heads,
        };
        match self.layout.direction {
            Direction::Forward => (0..capacity).for_each(|b| self.forward(call.shape, &sequences(b))),
            Direction::Backward => {
                // Scratch of all sequences first, in whole tiles: what it spoils must be nobody's.
                (0..capacity).for_each(|b| self.sums(&sequences(b)));
                (0..capacity).for_each(|b| self.backward(call.shape, &sequences(b)));
            }
        }
    }

    /// Element `e` of query head `g` of a row of Q.
    fn q(&self, s: &Lengths, row: usize, g: usize, e: usize) -> f64 {
        let CallGeometry { group, dim, .. } = self.layout.geometry;
        match (self.layout.direction, s.heads) {
            (Direction::Forward, Some(heads)) => {
                self.tensors.wide(0, s.at[0] + (row * heads * group + g) * dim + e)
            }
            _ => self.work.wide(self.layout.regions.q, s.at[0] + (row * group + g) * dim + e),
        }
    }

    /// Element `e` of a key, or of a value.
    fn kv(&self, s: &Lengths, value: bool, key: usize, e: usize) -> f64 {
        let CallGeometry { dim, .. } = self.layout.geometry;
        let regions = &self.layout.regions;
        let (at, region) = if value { (s.at[2], regions.v) } else { (s.at[1], regions.k) };
        match s.heads {
            Some(heads) => self.tensors.wide(0, at + key * heads * dim + e),
            None => self.work.wide(region, at + key * dim + e),
        }
    }

    /// Scores of a row that count.
    fn scores(&self, shape: Shape, s: &Lengths, row: usize, g: usize) -> Vec<f64> {
        let CallGeometry { dim, .. } = self.layout.geometry;
        let seen = match shape {
            Shape::Full => s.keys,
            Shape::Triangle => row + 1,
            Shape::Causal => s.keys - (s.rows - 1 - row),
        };
        let score =
            |key: usize| (0..dim).map(|e| self.q(s, row, g, e) * self.kv(s, false, key, e)).sum::<f64>();
        (0..seen).map(|key| self.scale * score(key)).collect()
    }

    fn forward(&mut self, shape: Shape, s: &Lengths) {
        let CallGeometry { group, dim, .. } = self.layout.geometry;
        let regions = self.layout.regions;
        let of_rows = s.heads.unwrap_or(1) * group;
        for row in 0..s.rows {
            for g in 0..group {
                let scores = self.scores(shape, s, row, g);
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let lse = max + scores.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
                let at = s.at[3] + (row * of_rows + g) * dim;
                for e in 0..dim {
                    let o = scores
                        .iter()
                        .enumerate()
                        .map(|(key, x)| (x - lse).exp() * self.kv(s, true, key, e))
                        .sum();
                    match s.heads {
                        Some(_) => self.output.narrow(0, at + e, o),
                        None => self.work.narrow(regions.o, at + e, o),
                    }
                }
                let at = s.at[4] + row * of_rows + g;
                match s.heads {
                    Some(_) => self.output.set(at, lse as f32),
                    None => self.work.set(regions.lse / 4 + at, lse as f32),
                }
            }
        }
    }

    fn sums(&mut self, s: &Lengths) {
        let CallGeometry { group, dim, .. } = self.layout.geometry;
        let regions = self.layout.regions;
        for row in 0..s.rows.next_multiple_of(TILE) {
            for g in 0..group {
                let mut sum = f64::NAN;
                if row < s.rows {
                    let at = s.at[0] + (row * group + g) * dim;
                    let product =
                        |e: usize| self.work.wide(regions.d_o, at + e) * self.work.wide(regions.o, at + e);
                    sum = (0..dim).map(product).sum();
                }
                self.work.set(regions.d / 4 + s.at[4] + row * group + g, sum as f32);
            }
        }
    }

    fn backward(&mut self, shape: Shape, s: &Lengths) {
        let CallGeometry { group, dim, .. } = self.layout.geometry;
        let regions = self.layout.regions;
        for g in 0..group {
            let (mut dk, mut dv) = (vec![0.0; s.keys * dim], vec![0.0; s.keys * dim]);
            for row in 0..s.rows {
                let at = s.at[0] + (row * group + g) * dim;
                let lse: f32 = self.work.get(regions.lse / 4 + s.at[4] + row * group + g);
                let d: f32 = self.work.get(regions.d / 4 + s.at[4] + row * group + g);
                let mut dq = vec![0.0; dim];
                for (key, score) in self.scores(shape, s, row, g).into_iter().enumerate() {
                    let p = (score - f64::from(lse)).exp();
                    let d_o = |e: usize| self.work.wide(regions.d_o, at + e);
                    let dp: f64 = (0..dim).map(|e| d_o(e) * self.kv(s, true, key, e)).sum();
                    let ds = p * (dp - f64::from(d)) * self.scale;
                    for e in 0..dim {
                        dq[e] += ds * self.kv(s, false, key, e);
                        dk[key * dim + e] += ds * self.q(s, row, g, e);
                        dv[key * dim + e] += p * d_o(e);
                    }
                }
                for (e, x) in dq.into_iter().enumerate() {
                    self.work.narrow(regions.dq, s.at[3] + (row * group + g) * dim + e, x);
                }
            }
            for key in 0..s.keys {
                for e in 0..dim {
                    // cuDNN multiplies these offsets by the group.
                    let at = s.at[5] * group + (key * group + g) * dim + e;
                    self.work.narrow(regions.dk, at, dk[key * dim + e]);
                    self.work.narrow(regions.dv, at, dv[key * dim + e]);
                }
            }
        }
    }

    /// Places of the results of a row or key, by the index.
    fn places(&self, [starts, spans]: [usize; 2], first_block: i32, row: usize) -> Vec<usize> {
        let bytes = self.tables.tables.bytes();
        let range = match usize::try_from(first_block) {
            Ok(first) => read::<i32>(bytes, starts + (first + row / BLOCK) * 4, 2),
            Err(_) => vec![-1 - first_block, -first_block],
        };
        let spans: Vec<PieceSpan> =
            read(bytes, spans + range[0] as usize * size_of::<PieceSpan>(), (range[1] - range[0]) as usize);
        let inside = spans.iter().filter(|s| (s.start..s.end).contains(&(row as i32)));
        let place = |s: &PieceSpan| {
            let row = row as i32;
            s.place as usize + if s.reversed == 1 { s.end - 1 - row } else { row - s.start } as usize
        };
        inside.map(place).collect()
    }

    fn merge(&mut self) {
        let regions = self.layout.regions;
        for h in self.table::<RowHead>(self.tables.row_heads) {
            let [group, dim, padded] = [h.group, h.dim, h.padded].map(|n| n as usize);
            for row in 0..h.rows as usize {
                let places = self.places(self.tables.row_index, h.first_block, row);
                for g in 0..group {
                    let place = row * h.heads as usize + h.first_head as usize + g;
                    let of = |at: &usize, e: usize| (at * group + g) * padded + e;
                    if self.layout.direction == Direction::Backward {
                        for e in 0..dim {
                            let sum: f64 =
                                places.iter().map(|at| self.work.wide(regions.dq, of(at, e))).sum();
                            self.output.set(h.values as usize + place * dim + e, sum as f32);
                        }
                        continue;
                    }
                    let lse = |at: &usize| self.work.get::<f32>(regions.lse / 4 + at * group + g);
                    let max = places.iter().map(lse).fold(f32::NEG_INFINITY, f32::max);
                    let total: f32 = places.iter().map(|at| (lse(at) - max).exp()).sum();
                    for e in 0..dim {
                        let part = |at: &usize| {
                            f64::from((lse(at) - max).exp()) * self.work.wide(regions.o, of(at, e))
                        };
                        let sum = places.iter().map(part).sum::<f64>();
                        let o = if places.is_empty() { 0.0 } else { sum / f64::from(total) };
                        match h.narrow {
                            1 => self.output.set(h.values as usize + place * dim + e, bf16::from_f64(o)),
                            _ => self.output.set(h.values as usize + place * dim + e, o as f32),
                        }
                    }
                    self.output.set(h.lse as usize + place, max + total.ln());
                }
            }
        }
        for h in self.table::<KeyHead>(self.tables.key_heads) {
            let [group, padded] = [h.group, h.padded].map(|n| n as usize);
            for key in 0..h.keys as usize {
                let places = self.places(self.tables.key_index, h.first_block, key);
                let place = key * h.heads as usize + h.head as usize;
                for (region, out, dim) in [(regions.dk, h.dk, h.dim), (regions.dv, h.dv, h.v_dim)] {
                    for e in 0..dim as usize {
                        let of_piece = |at: &usize| {
                            (0..group)
                                .map(|g| self.work.wide(region, (at * group + g) * padded + e))
                                .sum::<f64>()
                        };
                        let sum: f64 = places.iter().map(of_piece).sum();
                        self.output.set(out as usize + place * dim as usize + e, sum as f32);
                    }
                }
            }
        }
    }
}

/// An O for which `rowsum(dO * O)` is D but for rounding of the second order.
fn made_up(d_o: &[f64], d: f64) -> Vec<bf16> {
    let largest = d_o.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
    let candidates = (0..d_o.len()).filter(|e| d_o[*e].abs() > 0.0 && d_o[*e].abs() >= largest / 256.0);
    let Some(own) = candidates.min_by(|a, b| d_o[*a].abs().total_cmp(&d_o[*b].abs())) else {
        return vec![bf16::ZERO; d_o.len()];
    };
    let sum: f64 = d_o.iter().map(|x| x * x).sum();
    let mut made: Vec<bf16> = d_o.iter().map(|x| bf16::from_f64(x * d / sum)).collect();
    let others: f64 = (0..d_o.len()).filter(|e| *e != own).map(|e| d_o[e] * made[e].to_f64()).sum();
    made[own] = bf16::from_f64((d - others) / d_o[own]);
    made
}

/// A sequence as cuDNN sees it. Offsets are those of Q, K, V, results by row, LSE, and results by key.
struct Lengths {
    rows: usize,
    keys: usize,
    at: [usize; 6],
    /// kv heads of a token, where tensors are used in place.
    heads: Option<usize>,
}

/// Checks a batch, and says how many of its sequences were in place.
fn check(cut: Cut, cases: &[Case]) -> usize {
    let geometry = call_geometry(&cases[0].geometry);
    let tasks: Vec<LaidTask<'_>> =
        cases.iter().map(|case| LaidTask { geometry: &case.geometry, task: &case.task }).collect();
    let layout = BatchLayout::new(cut, geometry, &tasks).unwrap();
    let capacities: Vec<usize> = layout.calls.iter().map(|call| call.sequences.len() + SPARE).collect();
    let mut operands = vec![0xff; layout.operand_bytes];
    let mut sources = Vec::new();
    for (case, places) in cases.iter().zip(&layout.operands) {
        let all = [
            (places.q, Source::from(case.q.any())),
            (places.k, Source::from(case.k.any())),
            (places.v, Source::from(case.v.any())),
            (places.d_o, Source::from(case.d_o.any())),
            (places.lse, Source::from(case.lse.any())),
            (places.d, Source::from(case.d.any())),
        ];
        sources.extend(all.into_iter().filter_map(|(place, source)| Some((source, place?))));
    }
    copy::gather(sources, &mut operands, 1);
    let mut emulated = Emulated {
        tables: layout.tables(&capacities),
        tensors: Memory(operands),
        work: Memory::new(layout.work_bytes),
        output: Memory::new(layout.result_bytes),
        scale: f64::from(cases[0].geometry.scale()),
        layout: &layout,
    };
    emulated.bring_in();
    let calls = emulated.tables.calls.clone();
    for (call, tables) in layout.calls.iter().zip(&calls) {
        emulated.call(call, tables);
    }
    emulated.merge();
    for (case, place) in cases.iter().zip(&layout.results) {
        for (i, expected) in case.reference(cut.direction).iter().enumerate() {
            let narrow = place.narrow && i == 0;
            let (start, len) = (place.starts[i], place.lens[i]);
            let actual: Vec<f32> = match narrow {
                true => (0..len).map(|n| emulated.output.get::<bf16>(start / 2 + n).to_f32()).collect(),
                false => (0..len).map(|n| emulated.output.get(start / 4 + n)).collect(),
            };
            check_close(&format!("result {i} of {cut:?} {:?}", case.task), &actual, expected, 1e-2);
        }
    }
    let in_place = layout.calls.iter().filter(|call| call.tensors != Tensors::Slabs);
    in_place.map(|call| call.sequences.len()).sum()
}

#[test]
fn batches_of_random_tasks_are_computed_by_their_tables() {
    let mut random = Random(31);
    let mut in_place_sequences = 0;
    for _ in 0..25 {
        let mut first = random_geometry(&mut random).shape();
        // Half of them can be used in place.
        if random.below(2) == 0 {
            (first.head_dim, first.v_head_dim) = (64, 64);
        }
        let group = random.pick(&[1, 2, 4]);
        let cases: Vec<Case> = (0..random.within(1..=4))
            .map(|_| {
                let kv_heads = random.within(1..=3);
                let shape = HeadShape {
                    dtype: DType::Bf16,
                    softcap: None,
                    kv_heads,
                    q_heads: kv_heads * group,
                    ..first
                };
                let geometry = shape.try_into().unwrap();
                let tokens = random.within(1..=90);
                let task = random_task(&mut random, &geometry, tokens);
                Case::new(&mut random, geometry, task, 1.0)
            })
            .collect();
        for (direction, ordered) in
            [(Direction::Forward, false), (Direction::Backward, false), (Direction::Backward, true)]
        {
            for in_place in [false, true] {
                in_place_sequences += check(Cut { direction, ordered, in_place }, &cases);
            }
        }
    }
    assert!(in_place_sequences > 50, "{in_place_sequences}");
}

#[test]
fn long_tasks_are_computed_by_their_tables() {
    let mut random = Random(32);
    let shape = HeadShape {
        q_heads: 1,
        kv_heads: 1,
        head_dim: 8,
        v_head_dim: 8,
        scale: 0.3,
        dtype: DType::Bf16,
        softcap: None,
    };
    let geometry = shape.try_into().unwrap();
    let cases = vec![Case::new(&mut random, geometry, common::causal_task(2300, 1), 1.0)];
    for ordered in [false, true] {
        check(Cut { direction: Direction::Backward, ordered, in_place: false }, &cases);
    }
}

/// Offsets count elements, and go beyond 32 bits long before memory ends.
#[test]
fn offsets_are_64_bit() {
    let geometry = HeadShape {
        q_heads: 32,
        kv_heads: 1,
        head_dim: 128,
        v_head_dim: 128,
        scale: 0.1,
        dtype: DType::Bf16,
        softcap: None,
    };
    let geometry = geometry.try_into().unwrap();
    let task = common::causal_task(600_000, 1);
    let layout = BatchLayout::new(
        Cut { direction: Direction::Forward, ordered: false, in_place: false },
        call_geometry(&geometry),
        &[LaidTask { geometry: &geometry, task: &task }],
    )
    .unwrap();
    let tables = layout.tables(&[layout.calls[0].sequences.len()]);
    let offsets: Vec<i64> =
        read(tables.tables.bytes(), tables.calls[0].q_offsets, layout.calls[0].sequences.len() + 1);
    let last = layout.calls[0].sequences.iter().map(|s| s.q as i64).max().unwrap();
    assert!(last > i64::from(i32::MAX) && offsets.contains(&last));
}
