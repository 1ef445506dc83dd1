//! What a kernel computes: tasks with their operands and result buffers, and the checks on them.

use super::KernelError;
use crate::{DType, Direction, HeadGeometry, Task, TensorView};

/// Input tensors of a task, shaped as [`Task::shapes`] says: exactly the task's tokens and heads, possibly strided.
#[derive(Clone, Copy, Debug)]
pub enum Operands<'a> {
    /// What O and LSE are computed from.
    Forward {
        /// `[tokens, q heads, head_dim]`.
        q: TensorView<'a>,
        /// `[keys, kv heads, head_dim]`.
        k: TensorView<'a>,
        /// `[keys, kv heads, v_head_dim]`.
        v: TensorView<'a>,
    },
    /// What dQ, dK and dV are computed from.
    Backward {
        /// `[tokens, q heads, head_dim]`.
        q: TensorView<'a>,
        /// `[keys, kv heads, head_dim]`.
        k: TensorView<'a>,
        /// `[keys, kv heads, v_head_dim]`.
        v: TensorView<'a>,
        /// `[tokens, q heads, v_head_dim]`.
        d_o: TensorView<'a>,
        /// Final LSE over all keys of the row, natural log: `[tokens, q heads, 1]`.
        lse: TensorView<'a>,
        /// D = rowsum(dO * O) over the final O: `[tokens, q heads, 1]`.
        d: TensorView<'a>,
    },
}

impl Operands<'_> {
    /// The direction computed.
    pub fn direction(&self) -> Direction {
        match self {
            Operands::Forward { .. } => Direction::Forward,
            Operands::Backward { .. } => Direction::Backward,
        }
    }
}

/// Result tensors of a task, contiguous, f32, shaped as [`Task::shapes`] says.
#[derive(Clone, Debug, PartialEq)]
pub enum Results {
    /// Results of [`Operands::Forward`].
    Forward {
        /// Normalised over the task's own keys: `[tokens, q heads, v_head_dim]`. Zero for a row without keys.
        o: Vec<f32>,
        /// Natural log: `[tokens, q heads]`. `-inf` for a row without keys.
        lse: Vec<f32>,
    },
    /// Results of [`Operands::Backward`]: the task's share, to be added to that of other tasks.
    Backward {
        /// `[tokens, q heads, head_dim]`.
        dq: Vec<f32>,
        /// `[keys, kv heads, head_dim]`.
        dk: Vec<f32>,
        /// `[keys, kv heads, v_head_dim]`.
        dv: Vec<f32>,
    },
}

impl Results {
    /// Buffers of the right lengths, all zero.
    pub fn zeroed(task: &Task, geometry: &HeadGeometry, direction: Direction) -> Results {
        let shapes = task.shapes(geometry);
        let zeros = |shape: [usize; 3]| vec![0.0; shape.iter().product()];
        match direction {
            Direction::Forward => Results::Forward { o: zeros(shapes.o), lse: zeros(shapes.row) },
            Direction::Backward => {
                Results::Backward { dq: zeros(shapes.q), dk: zeros(shapes.k), dv: zeros(shapes.v) }
            }
        }
    }

    /// Bytes of the results of a task in one direction.
    pub fn bytes(task: &Task, geometry: &HeadGeometry, direction: Direction) -> usize {
        let shapes = task.shapes(geometry);
        let elements = |shape: [usize; 3]| shape.iter().product::<usize>();
        size_of::<f32>()
            * match direction {
                Direction::Forward => elements(shapes.o) + elements(shapes.row),
                Direction::Backward => elements(shapes.q) + elements(shapes.k) + elements(shapes.v),
            }
    }

    /// The direction computed.
    pub fn direction(&self) -> Direction {
        match self {
            Results::Forward { .. } => Direction::Forward,
            Results::Backward { .. } => Direction::Backward,
        }
    }
}

/// A task to compute, with everything it needs.
#[derive(Debug)]
pub struct KernelTask<'a> {
    /// The layer's heads.
    pub geometry: HeadGeometry,
    /// What to compute.
    pub task: &'a Task,
    /// What from.
    pub operands: Operands<'a>,
    /// Buffers to write, of the right lengths and any content; their direction is that of the operands.
    pub results: Results,
}

impl KernelTask<'_> {
    /// Checks shapes, lengths and types. `index` is the task's place in the batch, for the error.
    pub(super) fn check(&self, index: usize) -> Result<(), KernelError> {
        let dtype = self.geometry.dtype();
        if dtype != DType::F32 {
            return Err(KernelError::UnsupportedDType { index, dtype });
        }
        let (operands, results) = (self.operands.direction(), self.results.direction());
        if operands != results {
            return Err(KernelError::MixedDirections { index, operands, results });
        }
        let invalid = |source| KernelError::Invalid { index, source };
        self.task.check(&self.geometry).map_err(invalid)?;
        let shapes = self.task.shapes(&self.geometry);
        let expect = |tensor, view: &TensorView<'_>, shape| view.expect(tensor, shape).map_err(invalid);
        match &self.operands {
            Operands::Forward { q, k, v } => {
                expect("q", q, shapes.q)?;
                expect("k", k, shapes.k)?;
                expect("v", v, shapes.v)?;
            }
            Operands::Backward { q, k, v, d_o, lse, d } => {
                expect("q", q, shapes.q)?;
                expect("k", k, shapes.k)?;
                expect("v", v, shapes.v)?;
                expect("d_o", d_o, shapes.o)?;
                expect("lse", lse, shapes.row)?;
                expect("d", d, shapes.row)?;
            }
        }
        let holds = |tensor, buffer: &Vec<f32>, shape: [usize; 3]| {
            let (actual, needed) = (buffer.len(), shape.iter().product());
            if actual == needed {
                Ok(())
            } else {
                Err(KernelError::BadResult { index, tensor, actual, needed })
            }
        };
        match &self.results {
            Results::Forward { o, lse } => {
                holds("o", o, shapes.o)?;
                holds("lse", lse, shapes.row)
            }
            Results::Backward { dq, dk, dv } => {
                holds("dq", dq, shapes.q)?;
                holds("dk", dk, shapes.k)?;
                holds("dv", dv, shapes.v)
            }
        }
    }
}
