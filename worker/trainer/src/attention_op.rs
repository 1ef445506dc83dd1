//! Core attention as a node of the autograd graph.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{CpuStorage, CustomOp3, Device, Error, Layout, Result, Shape, Tensor};
use outboard_attention::{Elements, TensorView};
use outboard_worker::{CoreAttention, LayerCall, OutputGradient, Qkv, WorkerError};

use crate::ops::{elements, with_elements};

/// Where an attention error waits while candle carries its text up: candle's errors cannot hold it whole.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fault(Arc<Mutex<Option<WorkerError>>>);

/// Q `[rows, q_heads * head_dim]`, K and V `[rows, kv_heads * head_dim]` to O `[rows, q_heads * head_dim]`. A row's
/// heads lie side by side, so the memory is `[rows, heads, head_dim]` as core attention wants it, and nothing is ever
/// transposed. All are f32 to the model; Q, K, V and dO are rounded to the geometry's element type on the way, whose
/// gradient is taken to be one.
pub(crate) struct AttentionOp {
    attention: Arc<dyn CoreAttention>,
    call: LayerCall,
    fault: Fault,
    kept: Mutex<Option<Kept>>,
}

/// What backward needs of forward.
#[derive(Clone)]
struct Kept {
    qkv: Qkv,
    lse: Arc<Vec<f32>>,
}

impl Fault {
    /// The error, if there was one.
    pub(crate) fn take(&self) -> Option<WorkerError> {
        lock(&self.0).take()
    }

    /// Keeps the first error, and gives candle one with its text.
    fn keep(&self, error: WorkerError) -> Error {
        let text = Error::Msg(error.to_string());
        lock(&self.0).get_or_insert(error);
        text
    }
}

impl AttentionOp {
    pub(crate) fn new(attention: Arc<dyn CoreAttention>, call: LayerCall, fault: Fault) -> Self {
        AttentionOp { attention, call, fault, kept: Mutex::new(None) }
    }

    fn rows(&self) -> usize {
        self.call.documents.last().map_or(0, |document| document.rows.end())
    }

    /// Checks what a backend gave back, since it may be anyone's.
    fn check(&self, tensor: &'static str, data: &[f32], heads: usize, dim: usize) -> Result<()> {
        let LayerCall { step, layer, .. } = self.call;
        match TensorView::contiguous(tensor, data, [self.rows(), heads, dim]) {
            Ok(_) => Ok(()),
            Err(source) => Err(self.fault.keep(WorkerError::Invalid { step, layer, source })),
        }
    }
}

impl CustomOp3 for AttentionOp {
    fn name(&self) -> &'static str {
        "core-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let dtype = self.call.geometry.dtype();
        let shared = |storage, layout| {
            let values = elements(self.name(), storage, layout)?;
            Ok::<_, Error>(Elements::rounded(dtype, values.iter().copied()))
        };
        let qkv = Qkv { q: shared(q, q_layout)?, k: shared(k, k_layout)?, v: shared(v, v_layout)? };
        let attended = self.attention.forward(&self.call, &qkv).map_err(|error| self.fault.keep(error))?;
        let geometry = &self.call.geometry;
        let width = geometry.q_heads() * geometry.v_head_dim();
        self.check("o", &attended.o, geometry.q_heads(), geometry.v_head_dim())?;
        self.check("lse", &attended.lse, geometry.q_heads(), 1)?;
        *lock(&self.kept) = Some(Kept { qkv, lse: attended.lse });
        Ok((CpuStorage::F32(attended.o), Shape::from((self.rows(), width))))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &Tensor,
        d_o: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(Kept { qkv, lse }) = lock(&self.kept).clone() else {
            candle_core::bail!("core-attention: backward without forward");
        };
        let geometry = &self.call.geometry;
        let dim = geometry.v_head_dim();
        let rounded = |values: &[f32]| Ok(Elements::rounded(geometry.dtype(), values.iter().copied()));
        let d_o = with_elements(self.name(), d_o, rounded)?;
        // Of the dO that the kernel gets, so that the score gradients of a row add up to nothing.
        let d = with_elements(self.name(), o, |o| Ok(row_sums(&d_o.values(), o, dim)))?;
        let grad = OutputGradient { d_o, lse, d: Arc::new(d) };
        let given =
            self.attention.backward(&self.call, &qkv, &grad).map_err(|error| self.fault.keep(error))?;
        self.check("dq", &given.dq, geometry.q_heads(), geometry.head_dim())?;
        self.check("dk", &given.dk, geometry.kv_heads(), geometry.head_dim())?;
        self.check("dv", &given.dv, geometry.kv_heads(), dim)?;
        let tensor = |data, like: &Tensor| Tensor::from_vec(data, like.shape(), &Device::Cpu).map(Some);
        Ok((tensor(given.dq, q)?, tensor(given.dk, k)?, tensor(given.dv, v)?))
    }
}

/// D = rowsum(dO * O), in f32 and in element order, for rows of `dim` elements.
fn row_sums(d_o: &[f32], o: &[f32], dim: usize) -> Vec<f32> {
    let rows = d_o.chunks_exact(dim).zip(o.chunks_exact(dim));
    rows.map(|(d_o, o)| d_o.iter().zip(o).fold(0.0, |sum, (a, b)| sum + a * b)).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
