//! Tasks with their parts of the mask.

use outboard_attention::{Mask, MaskPart, PlannedTask};

/// A task's part of its document's mask, and who computes it.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) slot: usize,
    /// Disjoint, each with a cell.
    pub(crate) parts: Vec<MaskPart>,
}

/// A mask's parts in the order of their first rows, so that a task finds its own without looking at all of them.
#[derive(Clone, Debug)]
pub(crate) struct Shelf {
    parts: Vec<MaskPart>,
    /// Where the rows of each part, or of any before it, end at the latest.
    ends: Vec<usize>,
}

impl Piece {
    /// Cells, each counted once per kv head. Saturates.
    pub(crate) fn cells(&self) -> u64 {
        let cells = |p: &MaskPart| p.slice.cells().saturating_mul(p.kv_heads.len() as u64);
        self.parts.iter().map(cells).fold(0, u64::saturating_add)
    }
}

impl Shelf {
    pub(crate) fn new(mask: &Mask) -> Shelf {
        let mut parts = mask.parts().to_vec();
        parts.sort_by_key(|part| part.slice.q());
        let mut latest = 0;
        let ends = parts.iter().map(|part| {
            latest = part.slice.q().end().max(latest);
            latest
        });
        let ends = ends.collect();
        Shelf { parts, ends }
    }

    /// The task's part of the mask; no parts when it holds no cell.
    pub(crate) fn piece(&self, task: &PlannedTask) -> Piece {
        let first = self.ends.partition_point(|&end| end <= task.q.start());
        let after = self.parts.partition_point(|part| part.slice.q().start() < task.q.end());
        let near = self.parts.iter().take(after).skip(first);
        let clip = |part: &MaskPart| {
            let kv_heads = part.kv_heads.intersect(task.kv_heads);
            let slice = part.slice.clip(task.q, task.kv)?;
            (!kv_heads.is_empty()).then_some(MaskPart { kv_heads, slice })
        };
        Piece { slot: task.slot as usize, parts: near.filter_map(clip).collect() }
    }
}
