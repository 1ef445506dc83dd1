//! Root-mean-square norm.

use candle_core::{CpuStorage, CustomOp2, Device, Layout, Result, Shape, Tensor};

use super::{elements, math, with_elements};

/// `y = x / sqrt(mean(x^2) + epsilon) * weight` over the rows of x `[rows, dim]`, weight `[dim]`.
pub(crate) struct RmsNorm {
    pub(crate) epsilon: f32,
}

impl RmsNorm {
    fn inverse(&self, row: &[f32]) -> f32 {
        1.0 / (math::sum(row, |x| x * x) / row.len() as f32 + self.epsilon).sqrt()
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (xs, weight) =
            (elements(self.name(), x, x_layout)?, elements(self.name(), weight, weight_layout)?);
        let dim = weight.len();
        let mut ys = vec![0.0; xs.len()];
        for (y, x) in ys.chunks_exact_mut(dim).zip(xs.chunks_exact(dim)) {
            let inverse = self.inverse(x);
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * inverse * w;
            }
        }
        Ok((CpuStorage::F32(ys), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dim = weight.elem_count();
        let mut dx = vec![0.0; x.elem_count()];
        let mut dw = vec![0.0; dim];
        let mut scaled = vec![0.0; dim];
        with_elements(self.name(), weight, |weight| {
            with_elements(self.name(), x, |xs| {
                with_elements(self.name(), dy, |dys| {
                    let rows = xs.chunks_exact(dim).zip(dys.chunks_exact(dim));
                    for (dx, (x, dy)) in dx.chunks_exact_mut(dim).zip(rows) {
                        let inverse = self.inverse(x);
                        for ((scaled, dy), w) in scaled.iter_mut().zip(dy).zip(weight) {
                            *scaled = dy * w;
                        }
                        let along =
                            math::sum_pairs(&scaled, x, |g, x| g * x) * inverse * inverse / dim as f32;
                        for ((dx, g), x) in dx.iter_mut().zip(&scaled).zip(x) {
                            *dx = inverse * (g - x * along);
                        }
                        for ((dw, dy), x) in dw.iter_mut().zip(dy).zip(x) {
                            *dw += dy * x * inverse;
                        }
                    }
                    Ok(())
                })
            })
        })?;
        let dx = Tensor::from_vec(dx, x.shape(), &Device::Cpu)?;
        Ok((Some(dx), Some(Tensor::from_vec(dw, weight.shape(), &Device::Cpu)?)))
    }
}
