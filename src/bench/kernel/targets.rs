//! What the kernel must reach, as rows of one table.

use outboard_attention::DType::{self, Bf16, F32};
use outboard_attention::Direction::{self, Backward, Forward};
use outboard_attention::kernel::Isa;
use outboard_simulator::Random;

use super::args::MaskKind;

/// Query heads of every row but those of accuracy, and elements of each head.
pub(super) const HEADS: usize = 8;
pub(super) const HEAD_DIM: usize = 128;
/// Key/value heads where query heads share them by four.
pub(super) const SHARED_BY_FOUR: usize = 2;
/// Cells of a query head in the mixed batch.
const MIXED_CELLS: u64 = 30_000_000;
/// A shard of fewer rows, of all query heads that share a kv head, is small.
const SMALL_ROWS: usize = 256;

/// One row: what is measured, and what it must reach.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) goal: Goal,
    pub(super) work: Work,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Goal {
    /// A fraction of the peak, or a ratio of speeds.
    AtLeast(f64),
    /// A ratio of times, or an error.
    AtMost(f64),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Work {
    /// A shape's fraction of the peak.
    Speed(Shape, Direction),
    /// The speed of a batch of many shapes over that of one causal document of as many cells.
    Mixed(Direction),
    /// The time of a sliding window over what its cells take in [`CAUSAL_16K`].
    Window(Direction),
    /// The distance of O, forward, or of the gradients, backward, from the reference.
    Accuracy(Arithmetic, Direction),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Shape {
    pub(super) dtype: DType,
    /// Instead of the suite's own.
    pub(super) simd: Option<Isa>,
    pub(super) mask: MaskKind,
    pub(super) kv_heads: usize,
    pub(super) queries: usize,
    pub(super) tokens: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Arithmetic {
    F32,
    /// Products of bf16 pairs: by the instruction where there is one, else by the portable path, which models it.
    Bf16Pairs,
    /// bf16 operands computed in f32.
    Bf16InF32,
}

pub(super) const CAUSAL_16K: Shape = causal(F32, 16 * 1024);
pub(super) const WINDOW: Shape = Shape { mask: MaskKind::Window(1024), ..causal(F32, 32 * 1024) };
/// The causal documents whose accuracy is measured, of one head.
pub(super) const ACCURACY_TOKENS: usize = 2048;

const fn causal(dtype: DType, tokens: usize) -> Shape {
    Shape { dtype, simd: None, mask: MaskKind::Causal, kv_heads: HEADS, queries: tokens, tokens }
}

impl Goal {
    pub(super) fn is_met(self, reached: f64) -> bool {
        match self {
            Goal::AtLeast(least) => reached >= least,
            Goal::AtMost(most) => reached <= most,
        }
    }

    pub(super) fn value(self) -> f64 {
        let (Goal::AtLeast(value) | Goal::AtMost(value)) = self;
        value
    }
}

/// Everything there is a target for.
pub(super) fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut speed = |name: &str, shape: Shape, targets: &[(Direction, f64)]| {
        rows.extend(targets.iter().map(|&(direction, least)| Row {
            name: format!("{} {name} {direction}", shape.dtype),
            goal: Goal::AtLeast(least),
            work: Work::Speed(shape, direction),
        }));
    };
    let four_k = causal(F32, 4096);
    let shard = |dtype, queries, kv_heads| Shape { queries, kv_heads, ..causal(dtype, 16 * 1024) };
    speed("causal 4k", four_k, &[(Forward, 0.84), (Backward, 0.84)]);
    speed("causal 16k", CAUSAL_16K, &[(Forward, 0.84), (Backward, 0.84)]);
    speed("causal 4k", causal(Bf16, 4096), &[(Forward, 0.83), (Backward, 0.78)]);
    speed("causal 16k", causal(Bf16, 16 * 1024), &[(Forward, 0.83), (Backward, 0.78)]);
    let avx2 = Shape { simd: Some(Isa::Avx2), ..four_k };
    speed("causal 4k by avx2", avx2, &[(Forward, 0.80), (Backward, 0.75)]);
    let name = "128 queries, 16k keys, GQA 4";
    speed(name, shard(F32, 128, SHARED_BY_FOUR), &[(Forward, 0.86), (Backward, 0.79)]);
    speed(name, shard(Bf16, 128, SHARED_BY_FOUR), &[(Forward, 0.84), (Backward, 0.75)]);
    speed("16 queries, 16k keys, GQA 4", shard(F32, 16, SHARED_BY_FOUR), &[(Forward, 0.66)]);
    speed("16 queries, 16k keys, MHA", shard(F32, 16, HEADS), &[(Forward, 0.45)]);
    for direction in [Forward, Backward] {
        rows.push(Row {
            name: format!("f32 mixed batch to causal, GQA 4 {direction}"),
            goal: Goal::AtLeast(0.93),
            work: Work::Mixed(direction),
        });
    }
    for direction in [Forward, Backward] {
        rows.push(Row {
            name: format!("f32 window 1k at 32k to its cells {direction}"),
            goal: Goal::AtMost(1.15),
            work: Work::Window(direction),
        });
    }
    for (arithmetic, name, o, gradients) in [
        (Arithmetic::F32, "f32", 1e-6, 2e-6),
        (Arithmetic::Bf16Pairs, "bf16", 3e-3, 3e-3),
        (Arithmetic::Bf16InF32, "bf16 computed in f32", 3e-3, 3e-3),
    ] {
        for (direction, part, most) in [(Forward, "O", o), (Backward, "gradients", gradients)] {
            rows.push(Row {
                name: format!("{name} error of {part}"),
                goal: Goal::AtMost(most),
                work: Work::Accuracy(arithmetic, direction),
            });
        }
    }
    rows
}

/// Queries and keys of the mixed batch: lengths of even spread by their logarithm, as many as fit [`MIXED_CELLS`], the
/// queries a document's last. No task is more than a third, and small ones are a tenth at most.
pub(super) fn mixed_batch() -> Vec<(usize, usize)> {
    let group = HEADS / SHARED_BY_FOUR;
    let mut noise = Random::new(7);
    let mut between = |least: f64, most: f64| (least * (most / least).powf(noise.unit())) as usize;
    let (mut tasks, mut cells, mut small_cells) = (Vec::new(), 0, 0);
    // Bounded, since what still fits may be rare.
    for _ in 0..1000 {
        let (queries, keys) = (between(16.0, 8192.0), between(128.0, 65536.0));
        let keys = keys.max(queries);
        let more = causal_cells(queries, keys);
        let small = if queries * group < SMALL_ROWS { more } else { 0 };
        let fits = more <= MIXED_CELLS / 3 && cells + more <= MIXED_CELLS;
        if fits && small_cells + small <= MIXED_CELLS / 12 {
            tasks.push((queries, keys));
            cells += more;
            small_cells += small;
        }
        if cells >= MIXED_CELLS / 10 * 9 {
            break;
        }
    }
    tasks
}

/// Cells of the last queries of a causal document.
fn causal_cells(queries: usize, keys: usize) -> u64 {
    let (queries, keys) = (queries as u64, keys as u64);
    queries * keys - queries * queries.saturating_sub(1) / 2
}

/// The causal document of about as many cells as tasks of these queries and keys.
pub(super) fn equal_document(tasks: &[(usize, usize)]) -> usize {
    let cells: u64 = tasks.iter().map(|&(queries, keys)| causal_cells(queries, keys)).sum();
    (((8.0 * cells as f64 + 1.0).sqrt() - 1.0) / 2.0).round().max(1.0) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_rows_apart() {
        let mut names: Vec<_> = rows().into_iter().map(|row| row.name).collect();
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    #[test]
    fn goals_are_met_from_their_own_side() {
        assert!(Goal::AtLeast(0.8).is_met(0.8) && !Goal::AtLeast(0.8).is_met(0.79));
        assert!(Goal::AtMost(1.1).is_met(1.1) && !Goal::AtMost(1.1).is_met(1.2));
        assert!(!Goal::AtLeast(0.8).is_met(f64::NAN) && !Goal::AtMost(0.8).is_met(f64::NAN));
    }

    #[test]
    fn the_mixed_batch_keeps_its_promises() {
        let tasks = mixed_batch();
        let cells = |tasks: &mut dyn Iterator<Item = &(usize, usize)>| -> u64 {
            tasks.map(|&(queries, keys)| causal_cells(queries, keys)).sum()
        };
        let all = cells(&mut tasks.iter());
        let small = cells(&mut tasks.iter().filter(|(queries, _)| 4 * queries < SMALL_ROWS));
        assert!((MIXED_CELLS / 10 * 9..=MIXED_CELLS).contains(&all), "{all}");
        assert!(small > 0 && 10 * small <= all, "{small} of {all}");
        assert!(tasks.len() >= 5, "{tasks:?}");
        for (queries, keys) in &tasks {
            assert!((16..=8192).contains(queries) && (128..=65536).contains(keys) && queries <= keys);
        }
        let n = equal_document(&tasks);
        assert!(causal_cells(n, n).abs_diff(all) <= n as u64);
    }

    #[test]
    fn a_document_equals_itself() {
        for tokens in [1, 2, 1000, 65536] {
            assert_eq!(equal_document(&[(tokens, tokens)]), tokens);
        }
    }
}
