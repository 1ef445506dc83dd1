//! What a kernel computes: tasks with their operands and result buffers, and the checks on them.

use super::stream::ForwardState;
use super::{Isa, KernelError};
use crate::{AnyTensor, DType, Direction, Element, HeadGeometry, Span, Task, TensorView};

/// A tensor with the rows of Q or dO.
#[derive(Clone, Copy, Debug)]
pub enum QueryInput<'a> {
    /// A tensor of the caller's, which stays as it is.
    View(AnyTensor<'a>),
    /// The result that the kernel writes over it: O holds Q, or dQ holds dO. Only for f32, and equal dims of Q/K and V.
    InPlace,
}

/// Input tensors of a task, shaped as [`Task::shapes`] says: exactly the task's tokens and heads, possibly strided, of
/// the geometry's element type.
#[derive(Debug)]
pub enum Operands<'a> {
    /// What O and LSE are computed from.
    Forward {
        /// `[tokens, q heads, head_dim]`.
        q: QueryInput<'a>,
        /// `[keys, kv heads, head_dim]`.
        k: AnyTensor<'a>,
        /// `[keys, kv heads, v_head_dim]`.
        v: AnyTensor<'a>,
    },
    /// Some of what O and LSE are computed from: the next of the task's keys.
    Stage {
        /// `[tokens, q heads, head_dim]`, the same in each stage.
        q: AnyTensor<'a>,
        /// Positions of the stage's keys: from where the stage before ended, or the task's first, to a multiple of
        /// [`KEY_BLOCK`](super::KEY_BLOCK) or the task's end.
        keys: Span,
        /// `[keys of the stage, kv heads, head_dim]`.
        k: AnyTensor<'a>,
        /// `[keys of the stage, kv heads, v_head_dim]`.
        v: AnyTensor<'a>,
    },
    /// What dQ, dK and dV are computed from.
    Backward {
        /// `[tokens, q heads, head_dim]`.
        q: AnyTensor<'a>,
        /// `[keys, kv heads, head_dim]`.
        k: AnyTensor<'a>,
        /// `[keys, kv heads, v_head_dim]`.
        v: AnyTensor<'a>,
        /// `[tokens, q heads, v_head_dim]`.
        d_o: QueryInput<'a>,
        /// Final LSE over all keys of the row, natural log: `[tokens, q heads, 1]`.
        lse: TensorView<'a>,
        /// D = rowsum(dO * O) over the final O: `[tokens, q heads, 1]`.
        d: TensorView<'a>,
    },
}

impl<'a, T: Element> From<TensorView<'a, T>> for QueryInput<'a> {
    fn from(view: TensorView<'a, T>) -> Self {
        QueryInput::View(view.into())
    }
}

impl<'a> From<AnyTensor<'a>> for QueryInput<'a> {
    fn from(tensor: AnyTensor<'a>) -> Self {
        QueryInput::View(tensor)
    }
}

impl Operands<'_> {
    /// The direction computed.
    pub fn direction(&self) -> Direction {
        match self {
            Operands::Forward { .. } | Operands::Stage { .. } => Direction::Forward,
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
    /// Results of [`Operands::Stage`]. After the last stage they become [`Results::Forward`].
    Stage(ForwardState),
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
            Results::Forward { .. } | Results::Stage(_) => Direction::Forward,
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
    /// Positions of the keys that the operands hold.
    pub(super) fn keys(&self) -> Span {
        match &self.operands {
            Operands::Stage { keys, .. } => *keys,
            _ => self.task.kv(),
        }
    }

    /// Checks shapes, lengths and types. `index` is the task's place in the batch, for the error.
    pub(super) fn check(&self, isa: Isa, index: usize) -> Result<(), KernelError> {
        self.check_tensors(index)?;
        match (&self.operands, &self.results) {
            (Operands::Stage { keys, .. }, Results::Stage(state)) => {
                if !state.is_of(isa, &self.geometry, self.task) {
                    return Err(KernelError::OtherStage { index });
                }
                state.check_keys(*keys).map_err(|expected| {
                    let task = self.task.kv();
                    KernelError::BadStage { index, keys: *keys, expected, task }
                })
            }
            (Operands::Stage { .. }, _) | (_, Results::Stage(_)) => Err(KernelError::MixedStages { index }),
            _ => Ok(()),
        }
    }

    /// Checks that operands and results fit the task and the geometry: shapes, lengths and types. `index` is the task's
    /// place in the batch, for the error.
    ///
    /// # Errors
    /// [`KernelError`] naming the tensor at fault.
    pub fn check_tensors(&self, index: usize) -> Result<(), KernelError> {
        let (geometry, task) = (&self.geometry, self.task);
        let (operands, results) = (self.operands.direction(), self.results.direction());
        if operands != results {
            return Err(KernelError::MixedDirections { index, operands, results });
        }
        let invalid = |source| KernelError::Invalid { index, source };
        task.check(geometry).map_err(invalid)?;
        let dtype = geometry.dtype();
        let shapes = task.shapes(geometry);
        let expect = |tensor, view: &AnyTensor<'_>, shape| view.expect(tensor, shape, dtype).map_err(invalid);
        let expect_query = |tensor, input: &QueryInput<'_>, shape| match input {
            QueryInput::View(view) => expect(tensor, view, shape),
            QueryInput::InPlace if dtype != DType::F32 || geometry.head_dim() != geometry.v_head_dim() => {
                let (head_dim, v_head_dim) = (geometry.head_dim(), geometry.v_head_dim());
                Err(KernelError::NotInPlace { index, tensor, dtype, head_dim, v_head_dim })
            }
            QueryInput::InPlace => Ok(()),
        };
        match &self.operands {
            Operands::Forward { q, k, v } => {
                expect_query("q", q, shapes.q)?;
                expect("k", k, shapes.k)?;
                expect("v", v, shapes.v)?;
            }
            Operands::Stage { q, keys, k, v } => {
                let [_, kv_heads, dim] = shapes.k;
                expect("q", q, shapes.q)?;
                expect("k", k, [keys.len(), kv_heads, dim])?;
                expect("v", v, [keys.len(), kv_heads, geometry.v_head_dim()])?;
            }
            Operands::Backward { q, k, v, d_o, lse, d } => {
                expect("q", q, shapes.q)?;
                expect("k", k, shapes.k)?;
                expect("v", v, shapes.v)?;
                expect_query("d_o", d_o, shapes.o)?;
                lse.expect("lse", shapes.row).map_err(invalid)?;
                d.expect("d", shapes.row).map_err(invalid)?;
            }
        }
        let holds = |tensor, actual: usize, needed: usize| {
            if actual == needed {
                Ok(())
            } else {
                Err(KernelError::BadResult { index, tensor, actual, needed })
            }
        };
        let elements = |shape: [usize; 3]| shape.iter().product::<usize>();
        match (&self.operands, &self.results) {
            (Operands::Forward { .. }, Results::Forward { o, lse }) => {
                holds("o", o.len(), elements(shapes.o))?;
                holds("lse", lse.len(), elements(shapes.row))
            }
            (Operands::Backward { .. }, Results::Backward { dq, dk, dv }) => {
                holds("dq", dq.len(), elements(shapes.q))?;
                holds("dk", dk.len(), elements(shapes.k))?;
                holds("dv", dv.len(), elements(shapes.v))
            }
            _ => Ok(()),
        }
    }
}
