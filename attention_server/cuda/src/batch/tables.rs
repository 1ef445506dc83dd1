//! Tables that the device reads, as bytes: what the moving kernels do, and where cuDNN finds its sequences.

use bytemuck::{Pod, Zeroable};

/// Tables start at multiples of this.
const ALIGNMENT: usize = 16;

/// Copies one kv head of a 16-bit tensor into the order of sequences, with dims padded by zeros. Indices count elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Move {
    /// First element among the tensors.
    pub(crate) source: i64,
    /// First element in the work memory.
    pub(crate) target: i64,
    pub(crate) rows: i32,
    /// Elements from one source token to the next.
    pub(crate) stride: i32,
    pub(crate) group: i32,
    pub(crate) dim: i32,
    pub(crate) padded: i32,
    /// 1 when the target runs from the last row to the first.
    pub(crate) reversed: i32,
}

/// Copies one f32 a row and query head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct RowMove {
    pub(crate) source: i64,
    pub(crate) target: i64,
    pub(crate) rows: i32,
    pub(crate) stride: i32,
    pub(crate) group: i32,
    pub(crate) reversed: i32,
}

/// Makes up an O for which `rowsum(dO * O)` is D.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct MadeUp {
    /// First D among the tensors, in f32.
    pub(crate) d: i64,
    /// First element of dO in the work memory, in sequence order.
    pub(crate) d_o: i64,
    /// First element of O in the work memory.
    pub(crate) target: i64,
    pub(crate) rows: i32,
    /// D values from one token to the next.
    pub(crate) stride: i32,
    pub(crate) group: i32,
    pub(crate) padded: i32,
    pub(crate) reversed: i32,
    pub(crate) zero: i32,
}

/// Rows of one kv head of a task, to be merged from pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct RowHead {
    /// First element of the task's O, or dQ, in the output: counted in 16 bits for a narrow O, else in f32.
    pub(crate) values: i64,
    /// First of its LSE, in f32.
    pub(crate) lse: i64,
    pub(crate) rows: i32,
    /// Query heads of the task.
    pub(crate) heads: i32,
    pub(crate) first_head: i32,
    pub(crate) group: i32,
    pub(crate) dim: i32,
    pub(crate) padded: i32,
    /// Index of the head's first block in [`SpanIndex::starts`].
    pub(crate) first_block: i32,
    /// 1 when no row has more than one piece, so that O goes out as it is, in 16 bits.
    pub(crate) narrow: i32,
}

/// Keys of one kv head of a task, to be merged from pieces and query heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct KeyHead {
    pub(crate) dk: i64,
    pub(crate) dv: i64,
    pub(crate) keys: i32,
    /// kv heads of the task.
    pub(crate) heads: i32,
    pub(crate) head: i32,
    pub(crate) group: i32,
    pub(crate) dim: i32,
    pub(crate) v_dim: i32,
    pub(crate) padded: i32,
    pub(crate) first_block: i32,
}

/// Rows or keys of a piece, counted from the task's first, and where its results lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct PieceSpan {
    /// Row, or key, of the results' first.
    pub(crate) place: i64,
    pub(crate) start: i32,
    pub(crate) end: i32,
    pub(crate) reversed: i32,
    pub(crate) zero: i32,
}

/// Which pieces each block of [`BLOCK`] rows or keys of a head meets, in the order of the pieces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SpanIndex {
    /// First of each block's spans; one more entry ends the last.
    pub(crate) starts: Vec<i32>,
    pub(crate) spans: Vec<PieceSpan>,
}

/// Rows or keys that share their entry of a [`SpanIndex`]; the kernels know it too.
pub(crate) const BLOCK: usize = 64;

impl SpanIndex {
    /// Adds a head of `len` rows or keys, and says which its first block is.
    pub(crate) fn push(&mut self, len: usize, spans: &[PieceSpan]) -> i32 {
        let first = self.starts.len().saturating_sub(1);
        self.starts.truncate(first);
        let mut blocks = vec![Vec::new(); len.div_ceil(BLOCK)];
        for span in spans {
            for block in &mut blocks[span.start as usize / BLOCK..(span.end as usize).div_ceil(BLOCK)] {
                block.push(*span);
            }
        }
        for block in blocks {
            self.starts.push(self.spans.len() as i32);
            self.spans.extend(block);
        }
        self.starts.push(self.spans.len() as i32);
        first as i32
    }
}

/// Tables one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table and says where it starts, in bytes.
    pub(crate) fn push<T: Pod>(&mut self, table: &[T]) -> usize {
        let start = self.bytes.len().next_multiple_of(ALIGNMENT);
        self.bytes.resize(start, 0);
        self.bytes.extend_from_slice(bytemuck::cast_slice(table));
        start
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}
