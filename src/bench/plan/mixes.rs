//! Steps of random documents, as long as those of two corpora for long-context training.

use outboard_attention::{DType, Document, DocumentId, HeadGeometry, HeadShape, HomeRange, Span};
use outboard_planner::{Problem, Slot};

use crate::bench::kernel::subject::Noise;

/// Documents of as many tokens are long.
const LONG: f64 = 64.0 * 1024.0;
/// Long documents come 4 times, and half of the others are left out: the odds of one of these.
const ODDS_OF_SHORT: f64 = 0.5 / 4.0;
/// The part of the long documents of [`Mix::Prolong`] that fill a context.
const FULL: f64 = 0.3;
/// Odds are drawn this often at most.
const TRIES: usize = 1000;

const CONTEXTS: [usize; 2] = [128 * 1024, 512 * 1024];
const SERVERS: [u32; 4] = [8, 64, 256, 512];

/// Parts of a corpus, by number of documents.
const QUANTILES: [f64; 18] =
    [0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0];
/// That part has at most so many tokens.
const PRETRAIN: [u32; 18] = [
    1, 63, 324, 646, 1283, 1932, 2582, 3227, 3861, 4514, 5156, 5784, 6110, 10080, 26070, 69118, 119836,
    124913,
];
const PROLONG: [u32; 18] = [
    575, 678, 801, 919, 1130, 1347, 1594, 1914, 2362, 3018, 4050, 6051, 8379, 12310, 16273, 21393, 47500,
    340149,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mix {
    Pretrain,
    Prolong,
}

/// A step to draw: in-place servers, each filled with a context's worth of documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Draw {
    mix: Mix,
    context: usize,
    servers: u32,
}

/// Every mix, context and number of servers.
pub(super) fn all() -> Vec<Draw> {
    let mut draws = Vec::new();
    for mix in [Mix::Pretrain, Mix::Prolong] {
        for context in CONTEXTS {
            draws.extend(SERVERS.map(|servers| Draw { mix, context, servers }));
        }
    }
    draws
}

impl Mix {
    /// A document's tokens for training at a context: lengths of the corpus, with long ones favoured.
    fn tokens(self, context: usize, noise: &mut Noise) -> usize {
        let table = match self {
            Mix::Pretrain => &PRETRAIN,
            Mix::Prolong => &PROLONG,
        };
        let mut length = 0.0;
        for _ in 0..TRIES {
            length = at_quantile(table, noise.unit());
            if length >= LONG || noise.unit() < ODDS_OF_SHORT {
                break;
            }
        }
        let length = match self {
            Mix::Pretrain => length * context as f64 / LONG,
            Mix::Prolong if length >= LONG && noise.unit() < FULL => context as f64,
            Mix::Prolong => length,
        };
        (length.round() as usize).clamp(1, context)
    }
}

/// Between the quantiles of a table, on the logarithm.
fn at_quantile(table: &[u32; 18], part: f64) -> f64 {
    let after = QUANTILES.partition_point(|&quantile| quantile <= part).clamp(1, QUANTILES.len() - 1);
    let (below, above) = (f64::from(table[after - 1]), f64::from(table[after]));
    let way = (part - QUANTILES[after - 1]) / (QUANTILES[after] - QUANTILES[after - 1]);
    below * (above / below).powf(way)
}

impl Draw {
    /// The steps that planning time is measured with as they grow.
    pub(super) fn of_growth(servers: u32) -> Draw {
        Draw { mix: Mix::Prolong, context: CONTEXTS[0], servers }
    }

    pub(super) fn name(&self) -> String {
        let mix = match self.mix {
            Mix::Pretrain => "pretrain",
            Mix::Prolong => "prolong",
        };
        format!("{mix}-{}k-n{}", self.context / 1024, self.servers)
    }

    /// The step: the same documents in every run on one machine, heads of an 8B model.
    pub(super) fn problem(&self) -> anyhow::Result<Problem> {
        let (head_dim, v_head_dim, scale) = (128, 128, 1.0 / 128f32.sqrt());
        let geometry = HeadShape {
            q_heads: 32,
            kv_heads: 8,
            head_dim,
            v_head_dim,
            scale,
            dtype: DType::Bf16,
            softcap: None,
        };
        let slots = (0..self.servers).map(Slot::in_place).collect();
        Ok(Problem::new(HeadGeometry::try_from(geometry)?, self.documents()?, slots))
    }

    fn documents(&self) -> anyhow::Result<Vec<Document>> {
        let mut noise =
            Noise((self.mix as u64) << 48 | (self.context as u64) << 16 | u64::from(self.servers));
        let mut documents = Vec::new();
        for rank in 0..self.servers {
            let (mut left, mut index) = (self.context, 0);
            while left > 0 {
                // The last is cut off where the rank is full.
                let tokens = self.mix.tokens(self.context, &mut noise).min(left);
                let home = HomeRange { rank, tokens: Span::to(tokens) };
                documents.push(Document::new(DocumentId { rank, index }, tokens, vec![home])?);
                left -= tokens;
                index += 1;
            }
        }
        Ok(documents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_follow_the_quantiles() {
        for table in [&PRETRAIN, &PROLONG] {
            assert!(table.windows(2).all(|pair| pair[0] < pair[1]));
            for (&quantile, &tokens) in QUANTILES.iter().zip(table) {
                assert!((at_quantile(table, quantile) / f64::from(tokens) - 1.0).abs() < 1e-9);
            }
        }
        let middle = at_quantile(&PRETRAIN, 0.005);
        assert!((middle - 63f64.sqrt()).abs() < 1e-9, "{middle} halfway between 1 and 63");
    }

    #[test]
    fn a_step_is_drawn_the_same_again_and_fills_its_ranks() {
        for draw in all().into_iter().filter(|draw| draw.servers <= 64) {
            let documents = draw.documents().unwrap();
            assert_eq!(documents, draw.documents().unwrap());
            let tokens: usize = documents.iter().map(Document::tokens).sum();
            assert_eq!(tokens, draw.context * draw.servers as usize, "{}", draw.name());
        }
    }
}
