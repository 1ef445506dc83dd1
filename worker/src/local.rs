//! Core attention on this rank's own device: the baseline that the pool is compared with.

use std::sync::{Mutex, PoisonError};

use outboard_attention::kernel::{CpuKernel, KernelConfig, KernelTask, Operands, Results};
use outboard_attention::{Direction, Elements, InvalidAttention, Mask, Span, Task, TensorView};

use crate::assemble::{Part, merge_outputs, sum_gradients};
use crate::{Attended, CoreAttention, LayerCall, OutputGradient, Qkv, QkvGradient, WorkerError};

/// Computes every document whole, with the kernel that attention servers use, on the calling thread (and as many more
/// as configured). No coordinator, no transport.
#[derive(Debug)]
pub struct LocalAttention {
    kernel: Mutex<CpuKernel>,
}

impl LocalAttention {
    /// A local backend.
    ///
    /// # Errors
    /// [`WorkerError::NoKernel`] when the configuration cannot be had on this machine.
    pub fn new(config: KernelConfig) -> Result<Self, WorkerError> {
        let kernel = CpuKernel::new(config).map_err(WorkerError::NoKernel)?;
        Ok(LocalAttention { kernel: Mutex::new(kernel) })
    }

    fn run(
        &self,
        call: &LayerCall,
        qkv: &Qkv,
        gradient: Option<&OutputGradient>,
    ) -> Result<Vec<(Part, Results)>, WorkerError> {
        let invalid = |source| call.invalid(source);
        call.check(qkv).map_err(invalid)?;
        gradient.map_or(Ok(()), |g| call.check_gradient(g)).map_err(invalid)?;
        let direction = if gradient.is_some() { Direction::Backward } else { Direction::Forward };
        let parts = whole_documents(call).map_err(invalid)?;
        let batch = parts.iter().map(|part| {
            let operands = operands(call, part, qkv, gradient)?;
            let results = Results::zeroed(&part.task, &call.geometry, direction);
            Ok(KernelTask { geometry: call.geometry, task: &part.task, operands, results })
        });
        let batch = batch.collect::<Result<Vec<_>, _>>().map_err(invalid)?;
        let finished = Mutex::new(vec![None; parts.len()]);
        let done = |index: usize, results: Results| {
            if let Some(slot) = finished.lock().unwrap_or_else(PoisonError::into_inner).get_mut(index) {
                *slot = Some(results);
            }
        };
        let mut kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |source| WorkerError::Kernel { step: call.step, layer: call.layer, source };
        kernel.run(batch, &done).map_err(failed)?;
        drop(kernel);
        let results = finished.into_inner().unwrap_or_else(PoisonError::into_inner);
        let with_result = |(part, result): (Part, Option<Results>)| match result {
            Some(result) => Ok((part, result)),
            None => Err(call.no_result(&part.task)),
        };
        parts.into_iter().zip(results).map(with_result).collect()
    }
}

impl CoreAttention for LocalAttention {
    fn forward(&self, call: &LayerCall, qkv: &Qkv) -> Result<Attended, WorkerError> {
        let finished = self.run(call, qkv, None)?;
        merge_outputs(call, &finished).map_err(|source| call.invalid(source))
    }

    fn backward(
        &self,
        call: &LayerCall,
        qkv: &Qkv,
        gradient: &OutputGradient,
    ) -> Result<QkvGradient, WorkerError> {
        let finished = self.run(call, qkv, Some(gradient))?;
        sum_gradients(call, &finished, &[]).map_err(|source| call.invalid(source))
    }
}

/// One causal task for each document.
fn whole_documents(call: &LayerCall) -> Result<Vec<Part>, InvalidAttention> {
    let kv_heads = call.geometry.kv_heads();
    let part = |group: usize| {
        let document = &call.documents[group];
        if !document.is_whole() {
            let (span, bound) = (document.tokens(), Span::to(document.length));
            let bound_name = "the whole document, which is computed here or not at all";
            return Err(InvalidAttention::OutsideSpan { field: "document tokens", span, bound_name, bound });
        }
        let all = Span::to(document.rows.len());
        let mask = Mask::causal(all.len(), kv_heads);
        let task = Task::new(document.id, all, all, Span::to(kv_heads), &mask)?;
        let row = document.rows.start();
        Ok(Part { task, q_row: row, kv_row: Some(row), group: group as u32, position: 0 })
    };
    (0..call.documents.len()).map(part).collect()
}

fn operands<'a>(
    call: &LayerCall,
    part: &Part,
    qkv: &'a Qkv,
    gradient: Option<&'a OutputGradient>,
) -> Result<Operands<'a>, InvalidAttention> {
    let shapes = part.task.shapes(&call.geometry);
    let view = |name, elements: &'a Elements, shape: [usize; 3]| {
        let stride = shape[1] * shape[2];
        elements.view(name, part.q_row * stride, shape, stride)
    };
    let row = |name, data: &'a [f32]| {
        let [_, heads, _] = shapes.row;
        TensorView::new(name, data.get(part.q_row * heads..).unwrap_or_default(), shapes.row, heads)
    };
    let q = view("q", &qkv.q, shapes.q)?;
    let k = view("k", &qkv.k, shapes.k)?;
    let v = view("v", &qkv.v, shapes.v)?;
    Ok(match gradient {
        None => Operands::Forward { q: q.into(), k, v },
        Some(OutputGradient { d_o, lse, d }) => {
            let d_o = view("d_o", d_o, shapes.o)?.into();
            Operands::Backward { q, k, v, d_o, lse: row("lse", lse)?, d: row("d", d)? }
        }
    })
}
