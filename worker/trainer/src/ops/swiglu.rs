//! The gate of the MLP.

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};

use super::{elements, math, with_elements};

/// `silu(gate) * up` of rows `[gate | up]`: `[rows, 2 * width]` to `[rows, width]`.
pub(crate) struct SwiGlu {
    pub(crate) width: usize,
}

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let xs = elements(self.name(), x, layout)?;
        let rows = xs.len() / (2 * self.width);
        let mut ys = vec![0.0; rows * self.width];
        for (y, x) in ys.chunks_exact_mut(self.width).zip(xs.chunks_exact(2 * self.width)) {
            let (gate, up) = x.split_at(self.width);
            for ((y, &gate), &up) in y.iter_mut().zip(gate).zip(up) {
                *y = gate * math::sigmoid(gate) * up;
            }
        }
        Ok((CpuStorage::F32(ys), Shape::from((rows, self.width))))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let mut dx = vec![0.0; x.elem_count()];
        with_elements(self.name(), x, |xs| {
            with_elements(self.name(), dy, |dys| {
                let rows = xs.chunks_exact(2 * self.width).zip(dys.chunks_exact(self.width));
                for (dx, (x, dy)) in dx.chunks_exact_mut(2 * self.width).zip(rows) {
                    let ((gate, up), (dgate, dup)) = (x.split_at(self.width), dx.split_at_mut(self.width));
                    let into = dgate.iter_mut().zip(dup);
                    for (((dgate, dup), (&gate, &up)), &dy) in into.zip(gate.iter().zip(up)).zip(dy) {
                        let sigmoid = math::sigmoid(gate);
                        *dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid));
                        *dup = dy * gate * sigmoid;
                    }
                }
                Ok(())
            })
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?))
    }
}
