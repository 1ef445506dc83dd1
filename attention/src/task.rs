//! Core-attention tasks: the unit that moves.

use std::fmt;

use crate::{DocumentId, HeadGeometry, InvalidAttention, MAX_TOKENS, Mask, Span};

/// Which half of training a task belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// Q, K, V to O and LSE.
    Forward,
    /// Q, K, V, dO, LSE, D to dQ, dK, dV.
    Backward,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Direction::Forward => "forward",
            Direction::Backward => "backward",
        })
    }
}

/// A piece of one document's mask: queries x keys x kv heads, all query heads of those kv heads with it. Its mask
/// lies within the rectangle and holds at least one cell.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Task {
    document: DocumentId,
    q: Span,
    kv: Span,
    kv_heads: Span,
    mask: Mask,
}

impl Task {
    /// The part of `mask` inside the rectangle.
    ///
    /// # Errors
    /// [`InvalidAttention::EmptySpan`] when a side, or the part of the mask, is empty.
    pub fn new(
        document: DocumentId,
        q: Span,
        kv: Span,
        kv_heads: Span,
        mask: &Mask,
    ) -> Result<Self, InvalidAttention> {
        for (field, span) in [("task.q", q), ("task.kv", kv), ("task.kv_heads", kv_heads)] {
            if span.is_empty() {
                return Err(InvalidAttention::EmptySpan { field, span });
            }
        }
        let mask = mask.clip(q, kv, kv_heads);
        if mask.parts().is_empty() {
            return Err(InvalidAttention::EmptySpan {
                field: "task.mask (no cell within the rectangle) of q",
                span: q,
            });
        }
        Ok(Task { document, q, kv, kv_heads, mask })
    }

    /// Checks the task against the heads it is computed with.
    ///
    /// # Errors
    /// [`InvalidAttention::OutsideSpan`] when its kv heads reach beyond the geometry, [`InvalidAttention::OutOfRange`] when
    /// its positions reach beyond [`MAX_TOKENS`].
    pub fn check(&self, geometry: &HeadGeometry) -> Result<(), InvalidAttention> {
        for (field, span) in [("task.q.end", self.q), ("task.kv.end", self.kv)] {
            let (value, max) = (span.end() as u64, MAX_TOKENS as u64);
            if value > max {
                return Err(InvalidAttention::OutOfRange { field, value, min: 1, max });
            }
        }
        let bound = Span::to(geometry.kv_heads());
        if bound.covers(self.kv_heads) {
            Ok(())
        } else {
            let span = self.kv_heads;
            Err(InvalidAttention::OutsideSpan {
                field: "task.kv_heads",
                span,
                bound_name: "geometry.kv_heads",
                bound,
            })
        }
    }

    /// The document.
    pub fn document(&self) -> DocumentId {
        self.document
    }

    /// Query positions.
    pub fn q(&self) -> Span {
        self.q
    }

    /// Key positions.
    pub fn kv(&self) -> Span {
        self.kv
    }

    /// The kv heads.
    pub fn kv_heads(&self) -> Span {
        self.kv_heads
    }

    /// The cells.
    pub fn mask(&self) -> &Mask {
        &self.mask
    }

    /// Number of cells, each counted once per kv head.
    pub fn cells(&self) -> u64 {
        self.mask.cells()
    }

    /// FLOPs of the task in one direction.
    pub fn flops(&self, geometry: &HeadGeometry, direction: Direction) -> f64 {
        match direction {
            Direction::Forward => geometry.forward_flops(self.cells()),
            Direction::Backward => geometry.backward_flops(self.cells()),
        }
    }

    /// `[tokens, heads, dim]` of the task's tensors in one direction, in wire order.
    pub fn shapes(&self, geometry: &HeadGeometry) -> TaskShapes {
        let (rows, keys) = (self.q.len(), self.kv.len());
        let (q_heads, kv_heads) = (self.kv_heads.len() * geometry.group(), self.kv_heads.len());
        TaskShapes {
            q: [rows, q_heads, geometry.head_dim()],
            k: [keys, kv_heads, geometry.head_dim()],
            v: [keys, kv_heads, geometry.v_head_dim()],
            o: [rows, q_heads, geometry.v_head_dim()],
            row: [rows, q_heads, 1],
        }
    }
}

/// Shapes `[tokens, heads, dim]` of a task's tensors. dQ, dK, dV have the shapes of Q, K, V, and dO that of O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskShapes {
    /// Q and dQ.
    pub q: [usize; 3],
    /// K and dK.
    pub k: [usize; 3],
    /// V and dV.
    pub v: [usize; 3],
    /// O and dO.
    pub o: [usize; 3],
    /// LSE and D: one f32 a row and query head.
    pub row: [usize; 3],
}
