//! Where operands, results and sequences of a batch lie: the words that the other parts speak in. Pure.

use outboard_attention::{Direction, HeadGeometry, Task};

use super::pieces::Shape;
use crate::graph::{Bounds, CallGeometry};
use crate::plan::MAX_SEQUENCES;

/// A task to be laid out. All tasks of a batch have one direction, [`CallGeometry`] and scale.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LaidTask<'a> {
    pub(crate) geometry: &'a HeadGeometry,
    pub(crate) task: &'a Task,
}

/// An operand of a task among the tensors of a batch: `[tokens, heads, dim]` without gaps, from byte `start` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OperandPlace {
    pub(crate) start: usize,
    pub(crate) bytes: usize,
}

/// Operands of a task: Q, K, V and backward dO, LSE, D.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TaskOperands {
    pub(crate) q: Option<OperandPlace>,
    pub(crate) k: Option<OperandPlace>,
    pub(crate) v: Option<OperandPlace>,
    pub(crate) d_o: Option<OperandPlace>,
    pub(crate) lse: Option<OperandPlace>,
    pub(crate) d: Option<OperandPlace>,
}

/// Results of a task in the output: O and LSE, or dQ, dK and dV.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ResultPlace {
    /// First bytes.
    pub(crate) starts: [usize; 3],
    /// Elements.
    pub(crate) lens: [usize; 3],
    /// True when the first, O, is in the call's element type. All else is f32.
    pub(crate) narrow: bool,
}

/// A piece of one kv head of one task, as a sequence of a call. Offsets count elements: from the memory's start for
/// tensors that are used in place, from the region's otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sequence {
    pub(crate) rows: usize,
    pub(crate) keys: usize,
    /// In Q, and backward in dO and O.
    pub(crate) q: usize,
    pub(crate) k: usize,
    pub(crate) v: usize,
    /// In O forward, in dQ backward.
    pub(crate) row_result: usize,
    pub(crate) lse: usize,
    /// In dK and dV, divided by the group.
    pub(crate) key_result: usize,
}

/// Where the tensors of a call lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Tensors {
    /// In slabs.
    Slabs,
    /// K and V, and forward Q, O and LSE, in place: among the operands and results, with so many kv heads in each token.
    InPlace(usize),
}

/// Sequences of one shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) shape: Shape,
    pub(crate) tensors: Tensors,
    pub(crate) sequences: Vec<Sequence>,
}

/// Regions of the work memory: byte offsets. What a direction has no use for is empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Regions {
    pub(crate) q: usize,
    pub(crate) k: usize,
    pub(crate) v: usize,
    /// A result forward, made up backward.
    pub(crate) o: usize,
    /// A result forward, an operand backward.
    pub(crate) lse: usize,
    pub(crate) d_o: usize,
    pub(crate) d: usize,
    pub(crate) dq: usize,
    /// What dQ is summed in: scratch.
    pub(crate) dq_sums: usize,
    pub(crate) dk: usize,
    pub(crate) dv: usize,
}

/// Head dims that calls are padded to.
const DIMS: [usize; 4] = [64, 128, 192, 256];

/// The geometry of the calls that compute a task: all but the number of its kv heads.
pub(crate) fn call_geometry(geometry: &HeadGeometry) -> CallGeometry {
    let largest = geometry.head_dim().max(geometry.v_head_dim());
    let dim = DIMS.into_iter().find(|dim| *dim >= largest).unwrap_or(largest.next_multiple_of(64));
    CallGeometry { dtype: geometry.dtype(), group: geometry.group(), dim, heads: 1 }
}

/// Sequences by shape and where their tensors lie. Forward, those with the most keys come first: each block of rows runs
/// through all its keys, so whatever starts last should end soon. Backward, offsets ascend.
pub(super) fn calls(direction: Direction, mut sequences: Vec<((Shape, Tensors), Sequence)>) -> Vec<Call> {
    match direction {
        Direction::Forward => sequences.sort_by_key(|(kind, s)| (*kind, std::cmp::Reverse(s.keys))),
        Direction::Backward => sequences.sort_by_key(|(kind, _)| *kind),
    }
    let of_kind = sequences.chunk_by(|(a, _), (b, _)| a == b);
    of_kind
        .flat_map(|of_kind| of_kind.chunks(MAX_SEQUENCES))
        .map(|chunk| {
            let (shape, tensors) = chunk[0].0;
            Call { shape, tensors, sequences: chunk.iter().map(|(_, s)| *s).collect() }
        })
        .collect()
}

impl Call {
    /// The call's geometry, where that of its batch's slabs is `slabs`.
    pub(crate) fn geometry(&self, slabs: CallGeometry) -> CallGeometry {
        match self.tensors {
            Tensors::Slabs => slabs,
            Tensors::InPlace(heads) => CallGeometry { heads, ..slabs },
        }
    }

    /// What a plan for the call must cover.
    pub(crate) fn bounds(&self) -> Bounds {
        let most = |len: fn(&Sequence) -> usize| self.sequences.iter().map(len).max().unwrap_or(1);
        Bounds { sequences: self.sequences.len(), rows: most(|s| s.rows), keys: most(|s| s.keys) }
    }
}
