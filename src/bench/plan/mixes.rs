//! Steps of random documents, as long as those of two corpora for long-context training.

use anyhow::Context;
use outboard_attention::{DType, Document, DocumentId, HeadGeometry, HeadShape, HomeRange, Span};
use outboard_planner::{Problem, Slot};
use outboard_simulator::{Mix, Random};

/// The simulator's mixes that steps are drawn of.
const MIXES: [&str; 2] = ["pretrain", "prolong"];
/// Of these, the mix of the steps that planning time is measured with as they grow.
const PROLONG: usize = 1;

const CONTEXTS: [usize; 2] = [128 * 1024, 512 * 1024];
const SERVERS: [u32; 4] = [8, 64, 256, 512];

/// A step to draw: in-place servers, each filled with a context's worth of documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Draw {
    /// Which one of [`MIXES`].
    mix: usize,
    context: usize,
    servers: u32,
}

/// Every mix, context and number of servers.
pub(super) fn all() -> Vec<Draw> {
    let mut draws = Vec::new();
    for mix in 0..MIXES.len() {
        for context in CONTEXTS {
            draws.extend(SERVERS.map(|servers| Draw { mix, context, servers }));
        }
    }
    draws
}

impl Draw {
    /// The steps that planning time is measured with as they grow.
    pub(super) fn of_growth(servers: u32) -> Draw {
        Draw { mix: PROLONG, context: CONTEXTS[0], servers }
    }

    pub(super) fn name(&self) -> String {
        format!("{}-{}k-n{}", MIXES[self.mix], self.context / 1024, self.servers)
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
        let name = MIXES[self.mix];
        let mix = Mix::built_in(name).with_context(|| format!("no mix is called {name}"))?;
        let seed = (self.mix as u64) << 48 | (self.context as u64) << 16 | u64::from(self.servers);
        let mut stream = mix.stream(self.context, Random::new(seed));
        let mut documents = Vec::new();
        for rank in 0..self.servers {
            let (mut left, mut index) = (self.context, 0);
            while left > 0 {
                // The last is cut off where the rank is full.
                let tokens = stream.draw().min(left);
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
    fn a_step_is_drawn_the_same_again_and_fills_its_ranks() {
        for draw in all().into_iter().filter(|draw| draw.servers <= 64) {
            let documents = draw.documents().unwrap();
            assert_eq!(documents, draw.documents().unwrap());
            let tokens: usize = documents.iter().map(Document::tokens).sum();
            assert_eq!(tokens, draw.context * draw.servers as usize, "{}", draw.name());
        }
    }
}
