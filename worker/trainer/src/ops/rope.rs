//! Rotary positions.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};

use super::{elements, with_elements};

/// Cosines and sines of every position's angles.
pub(crate) struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Turns the pair `(x[i], x[i + half])` of every head by the angle of its row's position; x `[rows, heads * head_dim]`.
pub(crate) struct Rope {
    pub(crate) table: Arc<RopeTable>,
    /// The position of each row in its document, below the table's.
    pub(crate) positions: Arc<[u32]>,
}

impl RopeTable {
    /// Angles `position / base^(2 i / head_dim)` for positions below `positions`.
    pub(crate) fn new(head_dim: usize, base: f32, positions: usize) -> Self {
        let half = head_dim / 2;
        let frequencies: Vec<f64> =
            (0..half).map(|i| f64::from(base).powf(-2.0 * i as f64 / head_dim as f64)).collect();
        let angles = || (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        RopeTable {
            half,
            cos: angles().map(|a| a.cos() as f32).collect(),
            sin: angles().map(|a| a.sin() as f32).collect(),
        }
    }

    /// Cosines and sines of a position, or `None` beyond the table.
    fn at(&self, position: u32) -> Option<(&[f32], &[f32])> {
        let range = position as usize * self.half..(position as usize + 1) * self.half;
        Some((self.cos.get(range.clone())?, self.sin.get(range)?))
    }
}

impl Rope {
    /// Turns every row; `direction` is 1 forward and -1 backward.
    fn turn(&self, xs: &[f32], direction: f32) -> Result<Vec<f32>> {
        let half = self.table.half;
        let row = xs.len() / self.positions.len().max(1);
        if half == 0 || row == 0 || !row.is_multiple_of(2 * half) || row * self.positions.len() != xs.len() {
            candle_core::bail!(
                "rope: {} elements are not {} rows of heads of {}",
                xs.len(),
                self.positions.len(),
                2 * half
            );
        }
        let mut ys = vec![0.0; xs.len()];
        for ((y, x), &position) in ys.chunks_exact_mut(row).zip(xs.chunks_exact(row)).zip(&*self.positions) {
            let Some((cos, sin)) = self.table.at(position) else {
                candle_core::bail!("rope: position {position} lies beyond the table");
            };
            for (y, x) in y.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                let ((y0, y1), (x0, x1)) = (y.split_at_mut(half), x.split_at(half));
                for i in 0..half {
                    let (c, s) = (cos[i], sin[i] * direction);
                    y0[i] = x0[i] * c - x1[i] * s;
                    y1[i] = x1[i] * c + x0[i] * s;
                }
            }
        }
        Ok(ys)
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let ys = self.turn(elements(self.name(), x, layout)?, 1.0)?;
        Ok((CpuStorage::F32(ys), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dx = with_elements(self.name(), dy, |dy| self.turn(dy, -1.0))?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?))
    }
}
