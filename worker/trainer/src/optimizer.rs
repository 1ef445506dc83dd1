//! AdamW over all parameters in name order, with global-norm clipping and a learning rate that warms up and decays.

use candle_core::{Device, Tensor};

use crate::init::Parameters;
use crate::{TrainConfig, TrainerError};

/// The share of the largest learning rate at which the decay ends.
const FINAL_SHARE: f64 = 0.1;

/// AdamW's state: the weights and two running means, flat in parameter order, f32.
#[derive(Clone, Debug)]
pub struct AdamW {
    config: TrainConfig,
    weights: Vec<f32>,
    mean: Vec<f32>,
    square: Vec<f32>,
    updates: i32,
}

/// What one update did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// Norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Learning rate used.
    pub learning_rate: f64,
}

impl AdamW {
    /// A fresh state over the present values of `parameters`.
    ///
    /// # Errors
    /// [`TrainerError::Tensor`] when they cannot be read.
    pub fn new(config: &TrainConfig, parameters: &Parameters) -> Result<Self, TrainerError> {
        let mut weights = Vec::with_capacity(parameters.elements());
        for parameter in parameters {
            weights.extend(parameter.var().flatten_all()?.to_vec1::<f32>()?);
        }
        let zeros = vec![0.0; weights.len()];
        Ok(AdamW { config: *config, weights, mean: zeros.clone(), square: zeros, updates: 0 })
    }

    /// One update from the global gradient, flat in parameter order. The gradient is clipped in place.
    ///
    /// # Errors
    /// [`TrainerError::NotFinite`] when the gradient is not finite, [`TrainerError::BadBatch`] when it has the wrong
    /// length; the weights then stay as they are.
    pub fn update(
        &mut self,
        step: u64,
        parameters: &Parameters,
        gradient: &mut [f32],
    ) -> Result<Update, TrainerError> {
        if gradient.len() != self.weights.len() {
            return Err(TrainerError::BadBatch {
                step,
                field: "gradient length",
                value: gradient.len().to_string(),
                expected: format!("the parameters have {} elements", self.weights.len()),
            });
        }
        let gradient_norm = global_norm(parameters, gradient);
        if !gradient_norm.is_finite() {
            return Err(TrainerError::NotFinite { step, what: "the gradient's norm", value: gradient_norm });
        }
        if gradient_norm > self.config.clip_norm {
            let factor = (self.config.clip_norm / gradient_norm) as f32;
            gradient.iter_mut().for_each(|g| *g *= factor);
        }
        let learning_rate = learning_rate(&self.config, step);
        self.updates = self.updates.saturating_add(1);
        for parameter in parameters {
            let decay = if parameter.decays() { self.config.weight_decay } else { 0.0 };
            let range = parameter.offset()..parameter.offset() + parameter.elements();
            self.update_range(range.clone(), &gradient[range.clone()], learning_rate, decay);
            let values = Tensor::from_slice(&self.weights[range], parameter.var().shape(), &Device::Cpu)?;
            parameter.var().set(&values)?;
        }
        Ok(Update { gradient_norm, learning_rate })
    }

    fn update_range(&mut self, range: std::ops::Range<usize>, gradient: &[f32], rate: f64, decay: f64) {
        let TrainConfig { beta1, beta2, epsilon, .. } = self.config;
        let unbias1 = (1.0 / (1.0 - beta1.powi(self.updates))) as f32;
        let unbias2 = (1.0 / (1.0 - beta2.powi(self.updates))) as f32;
        let (beta1, beta2, epsilon) = (beta1 as f32, beta2 as f32, epsilon as f32);
        let (rate, keep) = (rate as f32, (1.0 - rate * decay) as f32);
        let means = self.mean[range.clone()].iter_mut().zip(&mut self.square[range.clone()]);
        for ((weight, (mean, square)), &g) in self.weights[range].iter_mut().zip(means).zip(gradient) {
            *mean = beta1 * *mean + (1.0 - beta1) * g;
            *square = beta2 * *square + (1.0 - beta2) * g * g;
            *weight = *weight * keep - rate * (*mean * unbias1) / ((*square * unbias2).sqrt() + epsilon);
        }
    }
}

/// The norm of a flat gradient: squares summed in f64 within each parameter, then over parameters in name order.
pub fn global_norm(parameters: &Parameters, gradient: &[f32]) -> f64 {
    let sum: f64 = parameters
        .iter()
        .map(|p| {
            gradient
                .iter()
                .skip(p.offset())
                .take(p.elements())
                .map(|&g| f64::from(g) * f64::from(g))
                .sum::<f64>()
        })
        .sum();
    sum.sqrt()
}

/// The learning rate of `step`: a linear rise over the warm-up, then half a cosine down to a tenth at the last step.
pub fn learning_rate(config: &TrainConfig, step: u64) -> f64 {
    if step < config.warmup_steps {
        return config.learning_rate * (step + 1) as f64 / (config.warmup_steps + 1) as f64;
    }
    let decaying = config.steps.saturating_sub(config.warmup_steps).max(1) as f64;
    let done = ((step - config.warmup_steps) as f64 / decaying).min(1.0);
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
    config.learning_rate * (FINAL_SHARE + (1.0 - FINAL_SHARE) * cosine)
}
