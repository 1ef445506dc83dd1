//! What can be wrong with a description of attention.

use crate::{DType, DocumentId, Span};

/// A domain value that does not hold together. Every variant names the field and the values at fault.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidAttention {
    /// A count or dimension outside its allowed range.
    #[error("{field} is {value}; it must be between {min} and {max}")]
    OutOfRange {
        /// The field at fault.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// Smallest value allowed.
        min: u64,
        /// Largest value allowed.
        max: u64,
    },
    /// Query heads that cannot be shared evenly among kv heads.
    #[error(
        "q_heads is {q_heads}, which kv_heads {kv_heads} does not divide; every kv head needs the same number of query heads"
    )]
    UnevenGroups {
        /// Query heads.
        q_heads: usize,
        /// Key/value heads.
        kv_heads: usize,
    },
    /// A softmax scale that is not a positive finite number.
    #[error("scale is {scale}; it must be finite and above zero (commonly 1/sqrt(head_dim))")]
    BadScale {
        /// What was given.
        scale: f32,
    },
    /// A softcap that is not a positive finite number.
    #[error("softcap is {softcap}; it must be finite and above zero, or left out")]
    BadSoftcap {
        /// What was given.
        softcap: f32,
    },
    /// An empty range where something was expected.
    #[error("{field} {span} is empty")]
    EmptySpan {
        /// The field at fault.
        field: &'static str,
        /// What it holds.
        span: Span,
    },
    /// A range that reaches outside what it is a part of.
    #[error("{field} {span} reaches outside {bound_name} {bound}")]
    OutsideSpan {
        /// The field at fault.
        field: &'static str,
        /// What it holds.
        span: Span,
        /// What should contain it.
        bound_name: &'static str,
        /// The range of that.
        bound: Span,
    },
    /// A band whose lower end lies above its upper end, so that it holds no cell.
    #[error("band lo {lo} is above hi {hi}; no key can satisfy lo <= key - query <= hi")]
    EmptyBand {
        /// Lower end.
        lo: i64,
        /// Upper end.
        hi: i64,
    },
    /// Two slices of a mask that count a cell twice.
    #[error("mask slices {first} and {second} overlap; slices of a mask must be disjoint")]
    Overlap {
        /// Index of one slice.
        first: usize,
        /// Index of the other.
        second: usize,
    },
    /// Home ranges that do not partition a document's tokens.
    #[error("document {document}: home ranges do not add up to [0, {tokens}): {detail}")]
    BadHomes {
        /// The document.
        document: DocumentId,
        /// Its length in tokens.
        tokens: usize,
        /// Where they fail.
        detail: String,
    },
    /// A tensor whose element count does not match its shape.
    #[error(
        "{tensor} holds {actual} elements; its shape {shape:?} with token stride {stride} needs {needed}"
    )]
    BadTensor {
        /// Which tensor.
        tensor: &'static str,
        /// Elements there are.
        actual: usize,
        /// `[tokens, heads, dim]`.
        shape: [usize; 3],
        /// Elements from one token to the next.
        stride: usize,
        /// Elements there should be.
        needed: usize,
    },
    /// A tensor whose shape does not fit the task it comes with.
    #[error("{tensor} has shape {actual:?} ([tokens, heads, dim]); the task needs {expected:?}")]
    ShapeMismatch {
        /// Which tensor.
        tensor: &'static str,
        /// `[tokens, heads, dim]` found.
        actual: [usize; 3],
        /// `[tokens, heads, dim]` wanted.
        expected: [usize; 3],
    },
    /// A tensor of another element type than the geometry says.
    #[error("{tensor} holds {actual}; the geometry says {expected}")]
    DTypeMismatch {
        /// Which tensor.
        tensor: &'static str,
        /// The element type found.
        actual: DType,
        /// The element type wanted.
        expected: DType,
    },
    /// LSE or D of another element type than f32.
    #[error("{tensor} holds {actual}; LSE and D are f32, whatever the geometry says")]
    NotF32 {
        /// Which tensor.
        tensor: &'static str,
        /// The element type found.
        actual: DType,
    },
}
