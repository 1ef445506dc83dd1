//! What a model asks of core attention, whoever computes it.

use std::sync::Arc;

use outboard_attention::{
    DocumentId, Elements, HeadGeometry, HeadShape, InvalidAttention, Span, Task, TensorView,
};

use crate::WorkerError;

/// Tokens of a document in a rank's packed activations: all of them, or a range where ranks share the document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedDocument {
    /// The document.
    pub id: DocumentId,
    /// Its rows here.
    pub rows: Span,
    /// Position in the document of the token in the first of these rows.
    pub first_token: usize,
    /// Tokens of the whole document.
    pub length: usize,
}

impl PackedDocument {
    /// A document all of whose tokens are here.
    pub fn whole(id: DocumentId, rows: Span) -> PackedDocument {
        PackedDocument { id, rows, first_token: 0, length: rows.len() }
    }

    /// Positions in the document of the tokens that are here.
    pub fn tokens(&self) -> Span {
        Span::at(self.first_token, self.rows.len())
    }

    /// True when all of its tokens are here.
    pub fn is_whole(&self) -> bool {
        self.rows.len() == self.length
    }
}

/// One layer's core attention of one tick, as a rank sees it: the documents it is home of, packed one after another.
#[derive(Clone, Debug)]
pub struct LayerCall {
    /// Training step.
    pub step: u64,
    /// Layer, from zero.
    pub layer: u32,
    /// Nano-batch.
    pub tick: u32,
    /// Heads.
    pub geometry: HeadGeometry,
    /// The documents, in row order, covering all rows.
    pub documents: Arc<[PackedDocument]>,
}

impl LayerCall {
    /// Rows of the packed activations.
    pub fn rows(&self) -> usize {
        self.documents.last().map_or(0, |last| last.rows.end())
    }

    /// Checks that the documents cover the rows one after another, and that Q, K and V fit them and are of the
    /// geometry's element type.
    ///
    /// # Errors
    /// [`InvalidAttention`] naming what does not fit.
    pub fn check(&self, qkv: &Qkv) -> Result<(), InvalidAttention> {
        let mut at = 0;
        for packed in self.documents.iter() {
            let PackedDocument { rows, length, .. } = packed;
            if rows.start() != at || rows.is_empty() {
                let bound = Span::at(at, rows.len());
                let bound_name = "where the document before it ends";
                return Err(InvalidAttention::OutsideSpan {
                    field: "document rows",
                    span: *rows,
                    bound_name,
                    bound,
                });
            }
            let (span, bound) = (packed.tokens(), Span::to(*length));
            if !bound.covers(span) {
                let (field, bound_name) = ("document tokens", "the whole document");
                return Err(InvalidAttention::OutsideSpan { field, span, bound_name, bound });
            }
            at = rows.end();
        }
        let HeadShape { q_heads, kv_heads, head_dim, v_head_dim, .. } = self.geometry.shape();
        self.fits("q", &qkv.q, [at, q_heads, head_dim])?;
        self.fits("k", &qkv.k, [at, kv_heads, head_dim])?;
        self.fits("v", &qkv.v, [at, kv_heads, v_head_dim])
    }

    /// Checks that dO, LSE and D fit the call.
    ///
    /// # Errors
    /// [`InvalidAttention`] naming the tensor that does not.
    pub fn check_gradient(&self, gradient: &OutputGradient) -> Result<(), InvalidAttention> {
        let (rows, heads) = (self.rows(), self.geometry.q_heads());
        self.fits("d_o", &gradient.d_o, [rows, heads, self.geometry.v_head_dim()])?;
        TensorView::contiguous("lse", &gradient.lse, [rows, heads, 1])?;
        TensorView::contiguous("d", &gradient.d, [rows, heads, 1])?;
        Ok(())
    }

    /// Checks a tensor of the geometry's element type.
    fn fits(
        &self,
        tensor: &'static str,
        elements: &Elements,
        shape: [usize; 3],
    ) -> Result<(), InvalidAttention> {
        elements.contiguous(tensor, shape)?.expect(tensor, shape, self.geometry.dtype())
    }

    /// Row of the first of a document's tokens, when all of them are in one range here.
    pub(crate) fn row_of(&self, document: DocumentId, tokens: Span) -> Option<usize> {
        let of_document = self.documents.iter().filter(|packed| packed.id == document);
        let packed = of_document.into_iter().find(|packed| packed.tokens().covers(tokens))?;
        Some(packed.rows.start() + (tokens.start() - packed.first_token))
    }

    pub(crate) fn no_result(&self, task: &Task) -> WorkerError {
        let (step, layer) = (self.step, self.layer);
        WorkerError::NoResult {
            step,
            layer,
            document: task.document(),
            q: task.q(),
            kv_heads: task.kv_heads(),
        }
    }

    pub(crate) fn invalid(&self, source: InvalidAttention) -> WorkerError {
        WorkerError::Invalid { step: self.step, layer: self.layer, source }
    }
}

/// Q `[rows, q_heads, head_dim]`, K `[rows, kv_heads, head_dim]` and V `[rows, kv_heads, v_head_dim]`, contiguous, of the
/// geometry's element type, positions already applied. Shared, so that backward reads what forward was given without a
/// copy.
#[derive(Clone, Debug)]
pub struct Qkv {
    /// Queries.
    pub q: Elements,
    /// Keys.
    pub k: Elements,
    /// Values.
    pub v: Elements,
}

/// What forward gives back, in f32 whatever the geometry's element type.
#[derive(Clone, Debug)]
pub struct Attended {
    /// O `[rows, q_heads, v_head_dim]`.
    pub o: Vec<f32>,
    /// Log-sum-exp of each row's scores, natural log, `[rows, q_heads]`; -inf for a row without a key.
    pub lse: Arc<Vec<f32>>,
}

/// What backward needs besides Q, K, V.
#[derive(Clone, Debug)]
pub struct OutputGradient {
    /// dO `[rows, q_heads, v_head_dim]`, of the geometry's element type.
    pub d_o: Elements,
    /// The LSE that forward gave back.
    pub lse: Arc<Vec<f32>>,
    /// D = rowsum(dO * O), `[rows, q_heads]`.
    pub d: Arc<Vec<f32>>,
}

/// dQ, dK, dV with the shapes of Q, K, V, in f32 whatever the geometry's element type.
#[derive(Clone, Debug)]
pub struct QkvGradient {
    /// Gradient of Q.
    pub dq: Vec<f32>,
    /// Gradient of K.
    pub dk: Vec<f32>,
    /// Gradient of V.
    pub dv: Vec<f32>,
}

/// Computes core attention for a model: on this device alone, or through the pool. Calls block until the result is
/// there; each may fail with an error that names job, step, layer and rank. Where ranks share documents a layer of a step has
/// one set of keys: forward may be asked for again with the same, and backward once.
pub trait CoreAttention: Send + Sync {
    /// O and LSE of one layer.
    ///
    /// # Errors
    /// When the inputs do not fit the call, or the attention cannot be computed.
    fn forward(&self, call: &LayerCall, qkv: &Qkv) -> Result<Attended, WorkerError>;

    /// dQ, dK, dV of one layer.
    ///
    /// # Errors
    /// When the inputs do not fit the call, or the attention cannot be computed.
    fn backward(
        &self,
        call: &LayerCall,
        qkv: &Qkv,
        grad: &OutputGradient,
    ) -> Result<QkvGradient, WorkerError>;
}
