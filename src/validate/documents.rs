//! The documents of DistCA's evaluation, in the order in which its scripts read them.

use anyhow::{Context, bail, ensure};
use outboard_simulator::Mix;
use serde::Deserialize;

const DOCUMENTS: &str = include_str!("../../validation/documents.json");
/// Scripts round lengths up to a multiple of this.
const MULTIPLE: u32 = 16;
/// Lengths of `pretrain` are for a context of as many tokens, and are stretched with the context.
const UNSTRETCHED: usize = 64 * 1024;

/// Tokens of documents.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Documents {
    /// Where they are from.
    pub(super) source: String,
    pretrain: Vec<u32>,
    prolong: Vec<u32>,
    /// Which of `prolong` scripts make as long as the context.
    prolong_full: Vec<usize>,
    /// Those of the measured steps of the 8B model, cut into its sequences.
    measured_8b: Vec<u32>,
}

impl Documents {
    /// What is built in.
    pub(super) fn built_in() -> anyhow::Result<Documents> {
        serde_json::from_str(DOCUMENTS).context("validation/documents.json")
    }

    /// Documents by the name that `distca.json` has for them, for training at `context`.
    pub(super) fn mix(&self, name: &str, context: usize) -> anyhow::Result<Mix> {
        let too_long = || format!("validation/documents.json: {name} at a context of {context}");
        let mut lengths = match name {
            "pretrain" => {
                ensure!(context.is_multiple_of(UNSTRETCHED), "validation/distca.json: context {context}");
                let stretch = u32::try_from(context / UNSTRETCHED)?;
                let stretched = self.pretrain.iter().map(|length| length.checked_mul(stretch));
                stretched.collect::<Option<Vec<u32>>>().with_context(too_long)?
            }
            "prolong" => {
                let mut lengths = self.prolong.clone();
                for &at in &self.prolong_full {
                    *lengths.get_mut(at).context("validation/documents.json: prolong_full")? =
                        u32::try_from(context)?;
                }
                lengths
            }
            "prolong as it is" => self.prolong.clone(),
            "8B runs" => self.measured_8b.clone(),
            _ => bail!("validation/distca.json: no documents are called {name}"),
        };
        for length in &mut lengths {
            *length = length.checked_next_multiple_of(MULTIPLE).with_context(too_long)?;
        }
        Ok(Mix::InOrder(lengths.into()))
    }
}

/// Steps of `tokens` that there are documents for.
pub(super) fn steps_of(mix: &Mix, tokens: u64) -> u32 {
    let Mix::InOrder(lengths) = mix else { return u32::MAX };
    let all: u64 = lengths.iter().map(|&length| u64::from(length)).sum();
    u32::try_from(all / tokens.max(1)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_stretched_or_fill_the_context_and_are_rounded_up() {
        let documents = Documents {
            source: String::new(),
            pretrain: vec![1, 100, 70_000],
            prolong: vec![70_001, 90_000, 33],
            prolong_full: vec![1],
            measured_8b: vec![16, 48],
        };
        let of = |name: &str, context: usize| match documents.mix(name, context).unwrap() {
            Mix::InOrder(lengths) => lengths.to_vec(),
            other => panic!("{other:?}"),
        };
        assert_eq!(of("pretrain", 128 << 10), [16, 208, 140_000]);
        assert_eq!(of("prolong", 128 << 10), [70_016, 128 << 10, 48]);
        assert_eq!(of("prolong as it is", 128 << 10), [70_016, 90_000, 48]);
        assert_eq!(of("8B runs", 256 << 10), [16, 48]);
        assert!(documents.mix("pretrain", 100_000).is_err() && documents.mix("prelong", 1 << 17).is_err());
        let mix = documents.mix("8B runs", 1).unwrap();
        assert_eq!([16, 32, 33, 64, 65].map(|tokens| steps_of(&mix, tokens)), [4, 2, 1, 1, 0]);
        assert_eq!(steps_of(&Mix::Prolong, 5), u32::MAX);
    }
}
