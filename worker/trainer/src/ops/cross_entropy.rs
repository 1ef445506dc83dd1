//! The loss.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};

use super::{elements, math, with_elements};

/// A row that predicts nothing.
pub(crate) const NO_TARGET: u32 = u32::MAX;

/// Cross-entropy in nats of logits `[rows, vocab]`, summed over the rows with a target and divided by `count`: a scalar.
pub(crate) struct CrossEntropy {
    targets: Arc<[u32]>,
    count: f64,
    kept: Arc<Mutex<Kept>>,
}

/// What forward leaves behind.
#[derive(Default)]
struct Kept {
    /// The undivided sum.
    sum: f64,
    /// Log-sum-exp of each row with a target.
    lse: Vec<f32>,
}

/// Reads the undivided sum in f64 once forward has run.
pub(crate) struct LossSum(Arc<Mutex<Kept>>);

impl LossSum {
    pub(crate) fn get(&self) -> f64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).sum
    }
}

impl CrossEntropy {
    /// `targets` holds a token below `vocab`, or [`NO_TARGET`], for each row.
    pub(crate) fn new(targets: Arc<[u32]>, count: f64) -> Self {
        CrossEntropy { targets, count, kept: Arc::default() }
    }

    pub(crate) fn sum(&self) -> LossSum {
        LossSum(self.kept.clone())
    }

    fn vocab(&self, logits: &[f32]) -> Result<usize> {
        let rows = self.targets.len();
        let vocab = logits.len() / rows.max(1);
        let fits = |&target: &u32| target == NO_TARGET || (target as usize) < vocab;
        if vocab == 0 || vocab * rows != logits.len() || !self.targets.iter().all(fits) {
            candle_core::bail!("cross-entropy: {} logits do not fit {rows} targets", logits.len());
        }
        Ok(vocab)
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let logits = elements(self.name(), logits, layout)?;
        let vocab = self.vocab(logits)?;
        let mut lse = Vec::with_capacity(self.targets.len());
        let mut sum = 0.0;
        for (row, &target) in logits.chunks_exact(vocab).zip(&*self.targets) {
            if target == NO_TARGET {
                continue;
            }
            let max = math::max(row);
            let log_sum = max + math::sum(row, |x| math::exp(x - max)).ln();
            sum += f64::from(log_sum - row[target as usize]);
            lse.push(log_sum);
        }
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Kept { sum, lse };
        Ok((CpuStorage::F32(vec![(sum / self.count) as f32]), Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, dloss: &Tensor) -> Result<Option<Tensor>> {
        let scale = (f64::from(dloss.to_scalar::<f32>()?) / self.count) as f32;
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lses = kept.lse.iter();
        let mut dx = vec![0.0; logits.elem_count()];
        with_elements(self.name(), logits, |logits| {
            let vocab = self.vocab(logits)?;
            let rows = logits.chunks_exact(vocab).zip(&*self.targets);
            for (dx, (row, &target)) in dx.chunks_exact_mut(vocab).zip(rows) {
                if target == NO_TARGET {
                    continue;
                }
                let Some(&lse) = lses.next() else {
                    candle_core::bail!("cross-entropy: backward without forward");
                };
                for (dx, x) in dx.iter_mut().zip(row) {
                    *dx = math::exp(x - lse) * scale;
                }
                dx[target as usize] -= scale;
            }
            Ok(())
        })?;
        Ok(Some(Tensor::from_vec(dx, logits.shape(), &Device::Cpu)?))
    }
}
