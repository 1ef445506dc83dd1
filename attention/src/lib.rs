//! The domain of core attention, pure: head geometry, documents, masks of band slices, tasks, plans, the merge of
//! partial results, a naive f64 reference, and the CPU kernel.
//!
//! Nothing here does IO, reads a clock or the environment, or knows an async runtime, serde or protobuf.

mod document;
mod element;
mod error;
mod geometry;
pub mod kernel;
mod mask;
mod math;
pub mod merge;
mod plan;
pub mod reference;
mod span;
mod task;
mod tensor;

pub use document::{Document, DocumentId, HomeRange};
pub use element::{AnyTensor, Element, Elements};
pub use error::InvalidAttention;
pub use geometry::{DType, HeadGeometry, HeadShape, MAX_HEAD_DIM, MAX_HEADS, MAX_TOKENS, UnknownDType};
pub use mask::{BandSlice, MAX_MASK_SLICES, Mask, MaskPart, PrefixSegment, query_chunks};
pub use plan::{InvalidPlan, PlannedTask, StepPlan, TickPlan};
pub use span::Span;
pub use task::{Direction, Task, TaskShapes};
pub use tensor::{TensorIdentity, TensorLayout, TensorSlice, TensorView};
