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

/// Copies one kv head of dO into the order of sequences, as [`Move`] does, and makes up an O for which `rowsum(dO * O)` is D.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct MadeUp {
    /// First D among the tensors, in f32.
    pub(crate) d: i64,
    /// First element of dO among the tensors.
    pub(crate) d_o: i64,
    /// First element of dO in the work memory.
    pub(crate) moved: i64,
    /// First element of O in the work memory.
    pub(crate) o: i64,
    pub(crate) rows: i32,
    /// Query heads from one source token to the next.
    pub(crate) stride: i32,
    pub(crate) group: i32,
    pub(crate) dim: i32,
    pub(crate) padded: i32,
    pub(crate) reversed: i32,
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
    /// As [`SpanIndex::push`] gave it.
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

// kernels.cu checks the same.
const _: () = {
    assert!(size_of::<Move>() == 40 && size_of::<RowMove>() == 32 && size_of::<MadeUp>() == 56);
    assert!(size_of::<RowHead>() == 48 && size_of::<KeyHead>() == 48 && size_of::<PieceSpan>() == 24);
};

/// Which pieces each block of [`BLOCK`] rows or keys of a head meets, in the order of the pieces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SpanIndex {
    /// First of each block's spans; one more entry ends the last of a head.
    pub(crate) starts: Vec<i32>,
    pub(crate) spans: Vec<PieceSpan>,
}

/// Rows or keys that share their entry of a [`SpanIndex`]; the kernels know it too.
pub(crate) const BLOCK: usize = 64;

impl SpanIndex {
    /// Adds a head of `len` rows or keys, and says which its first block is. A head of one piece has no blocks, but -1 less
    /// the index of its span: most heads are such, and long.
    pub(crate) fn push(&mut self, len: usize, spans: &[PieceSpan]) -> i32 {
        if let [only] = spans {
            self.spans.push(*only);
            return -(self.spans.len() as i32);
        }
        let (first, first_span) = (self.starts.len(), self.spans.len());
        let blocks = |span: &PieceSpan| span.start as usize / BLOCK..(span.end as usize).div_ceil(BLOCK);
        // How many spans each block meets, then where each block's next one goes, which ends as where the block after starts.
        let mut next = vec![0; len.div_ceil(BLOCK)];
        for block in spans.iter().flat_map(blocks) {
            next[block] += 1;
        }
        let mut total = first_span;
        for place in &mut next {
            self.starts.push(total as i32);
            (*place, total) = (total, total + *place);
        }
        self.starts.push(total as i32);
        self.spans.resize(total, PieceSpan::zeroed());
        for span in spans {
            for block in blocks(span) {
                self.spans[next[block]] = *span;
                next[block] += 1;
            }
        }
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
