//! One rank's training loop.
//!
//! The loss of a step is the sum over all ranks' predicted tokens divided by their number, which ranks exchange before
//! anything is computed. Each rank backpropagates its own sum divided by that number; gradients are added in rank
//! order; so all ranks make the same update, and a run depends on its settings and data alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use outboard_worker::{Attended, CoreAttention, LayerCall, OutputGradient, Qkv, QkvGradient, WorkerError};

use crate::exchange::{Exchange, ExchangeError};
use crate::init::Parameters;
use crate::model::Model;
use crate::optimizer::AdamW;
use crate::{ModelConfig, PackedBatch, TrainConfig, TrainerError};

/// A model in training. Several may live in one process and share one exchange.
pub struct Trainer {
    config: TrainConfig,
    model: Model,
    parameters: Parameters,
    optimizer: AdamW,
    attention: Arc<dyn CoreAttention>,
    clock: Arc<AttentionClock>,
}

/// What one step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepOutcome {
    /// Training step.
    pub step: u64,
    /// Cross-entropy in nats per predicted token, over all ranks; the same bits on every rank.
    pub loss: f64,
    /// Predicted tokens of all ranks.
    pub targets: u64,
    /// Tokens of this rank.
    pub tokens: usize,
    /// Documents of this rank, of which others may hold parts too.
    pub documents: usize,
    /// Norm of the global gradient before clipping.
    pub gradient_norm: f64,
    /// Learning rate used.
    pub learning_rate: f64,
    /// Wall time of the step, with all that follows.
    pub seconds: f64,
    /// Of it, inside core attention, forward and backward.
    pub attention_seconds: f64,
    /// Of it, waiting for the slowest rank to be done with its backward pass.
    pub wait_seconds: f64,
    /// Of it, in the exchange otherwise: counts, and sending and adding gradients.
    pub exchange_seconds: f64,
}

/// Measures the time spent in core attention.
struct AttentionClock {
    inner: Arc<dyn CoreAttention>,
    nanoseconds: AtomicU64,
}

impl StepOutcome {
    /// Everything that is neither attention nor exchange: what this rank's own device does besides.
    pub fn rest_seconds(&self) -> f64 {
        (self.seconds - self.attention_seconds - self.wait_seconds - self.exchange_seconds).max(0.0)
    }
}

impl AttentionClock {
    fn timed<T>(&self, call: impl FnOnce(&dyn CoreAttention) -> T) -> T {
        let began = Instant::now();
        let result = call(self.inner.as_ref());
        self.nanoseconds.fetch_add(began.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }

    /// The time since the last call.
    fn take(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds.swap(0, Ordering::Relaxed))
    }
}

impl CoreAttention for AttentionClock {
    fn forward(&self, call: &LayerCall, qkv: &Qkv) -> Result<Attended, WorkerError> {
        self.timed(|attention| attention.forward(call, qkv))
    }

    fn backward(
        &self,
        call: &LayerCall,
        qkv: &Qkv,
        grad: &OutputGradient,
    ) -> Result<QkvGradient, WorkerError> {
        self.timed(|attention| attention.backward(call, qkv, grad))
    }
}

impl Trainer {
    /// A new model of the seed's weights, whose core attention `attention` computes.
    ///
    /// # Errors
    /// [`TrainerError::InvalidConfig`] and the like for bad settings.
    pub fn new(
        model: &ModelConfig,
        config: &TrainConfig,
        attention: Arc<dyn CoreAttention>,
    ) -> Result<Self, TrainerError> {
        config.validate()?;
        let parameters = Parameters::new(model, config.seed)?;
        let clock = Arc::new(AttentionClock { inner: attention, nanoseconds: AtomicU64::new(0) });
        Ok(Trainer {
            config: *config,
            model: Model::new(model, &parameters, config.tokens)?,
            optimizer: AdamW::new(config, &parameters)?,
            parameters,
            attention: clock.clone(),
            clock,
        })
    }

    /// The weights.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// One training step over this rank's `batch`; all ranks must call it for the same step.
    ///
    /// # Errors
    /// [`TrainerError`] with step and cause. The weights are then those of the step before, and other ranks fail with
    /// an error that names this rank as soon as this rank's exchange is dropped.
    pub fn step(
        &mut self,
        batch: &PackedBatch,
        exchange: &mut Exchange,
    ) -> Result<StepOutcome, TrainerError> {
        let step = batch.step;
        self.check(batch, exchange)?;
        let failed = |source: ExchangeError| TrainerError::Exchange { step, source };
        let began = Instant::now();
        self.clock.take();

        let counts = exchange.all_gather_u64(&[step, batch.targets()]).map_err(failed)?;
        if let Some(rank) = counts.iter().position(|count| count[0] != step) {
            let (expected, received) = (format!("step {step}"), format!("step {}", counts[rank][0]));
            return Err(failed(ExchangeError::OutOfStep { rank: rank as u32, expected, received }));
        }
        let targets = counts.iter().map(|count| count[1]).fold(0, u64::saturating_add);
        let counting = began.elapsed();

        let forward = self.model.forward(batch, &self.attention, targets)?;
        let sum = forward.loss_sum();
        let mut gradient = forward.backward(&self.parameters)?;

        let computed = Instant::now();
        let sums = exchange.all_gather_f64(&[sum]).map_err(failed)?;
        let wait = computed.elapsed();
        let met = Instant::now();
        exchange.sum_in_rank_order(&mut gradient).map_err(failed)?;
        let adding = met.elapsed();

        let loss = sums.iter().map(|sum| sum[0]).sum::<f64>() / targets as f64;
        if !loss.is_finite() {
            return Err(TrainerError::NotFinite { step, what: "the loss", value: loss });
        }
        let update = self.optimizer.update(step, &self.parameters, &mut gradient)?;
        Ok(StepOutcome {
            step,
            loss,
            targets,
            tokens: batch.tokens.len(),
            documents: batch.distinct_documents(),
            gradient_norm: update.gradient_norm,
            learning_rate: update.learning_rate,
            seconds: began.elapsed().as_secs_f64(),
            attention_seconds: self.clock.take().as_secs_f64(),
            wait_seconds: wait.as_secs_f64(),
            exchange_seconds: (counting + adding).as_secs_f64(),
        })
    }

    fn check(&self, batch: &PackedBatch, exchange: &Exchange) -> Result<(), TrainerError> {
        let TrainConfig { rank, ranks, tokens, .. } = self.config;
        if (exchange.rank(), exchange.ranks()) != (rank as usize, ranks as usize) {
            return Err(TrainerError::InvalidConfig {
                field: "exchange",
                value: format!("rank {} of {}", exchange.rank(), exchange.ranks()),
                expected: format!("the trainer is rank {rank} of {ranks}"),
            });
        }
        let bad = |field, value: usize, expected| {
            let (step, value) = (batch.step, value.to_string());
            Err(TrainerError::BadBatch { step, field, value, expected })
        };
        if let Some(document) = batch.documents.iter().find(|document| document.length > tokens) {
            let expected = format!(
                "document {} is longer than the {tokens} tokens that the trainer was set up for",
                document.id
            );
            return bad("document length", document.length, expected);
        }
        let most = tokens.saturating_mul(ranks as usize);
        if batch.tokens.len() > most {
            let expected = format!("all {ranks} ranks hold {most} tokens at most");
            return bad("number of tokens", batch.tokens.len(), expected);
        }
        Ok(())
    }
}
