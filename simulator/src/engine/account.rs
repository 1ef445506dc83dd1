//! Where a device's time goes.

/// Seconds of a device in a step. They add up to the step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Account {
    /// Everything but core attention: projections, MLP, head.
    pub dense: f64,
    /// Of the same, what is computed again.
    pub recomputed: f64,
    /// Collectives among the lanes of tensor parallelism.
    pub tensor: f64,
    /// Core attention, for whomever.
    pub attention: f64,
    /// Sending and receiving what attention needs, on the device itself.
    pub host: f64,
    /// Waiting for bytes that are on their way.
    pub exposed: f64,
    /// Waiting for others that still compute.
    pub imbalance: f64,
    /// Waiting for other stages of the pipeline.
    pub bubble: f64,
    /// Gradients and weights among ranks, as far as nothing hides them.
    pub gradients: f64,
    /// The optimizer.
    pub optimizer: f64,
}

impl Account {
    /// Names of the parts, in the order of [`Account::parts`].
    pub const NAMES: [&str; 10] = [
        "dense",
        "recomputed",
        "tensor",
        "attention",
        "host",
        "exposed",
        "imbalance",
        "bubble",
        "gradients",
        "optimizer",
    ];

    /// The parts in order.
    pub fn parts(&self) -> [f64; 10] {
        [
            self.dense,
            self.recomputed,
            self.tensor,
            self.attention,
            self.host,
            self.exposed,
            self.imbalance,
            self.bubble,
            self.gradients,
            self.optimizer,
        ]
    }

    /// All of it.
    pub fn total(&self) -> f64 {
        self.parts().iter().sum()
    }

    /// The mean of several.
    pub fn mean(accounts: &[Account]) -> Account {
        let mut sum = [0.0; 10];
        for account in accounts {
            for (sum, part) in sum.iter_mut().zip(account.parts()) {
                *sum += part;
            }
        }
        let count = accounts.len().max(1) as f64;
        Account::from_parts(sum.map(|part| part / count))
    }

    fn from_parts(parts: [f64; 10]) -> Account {
        let [dense, recomputed, tensor, attention, host, exposed, imbalance, bubble, gradients, optimizer] =
            parts;
        Account {
            dense,
            recomputed,
            tensor,
            attention,
            host,
            exposed,
            imbalance,
            bubble,
            gradients,
            optimizer,
        }
    }
}
