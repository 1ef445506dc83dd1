//! How long documents are: two corpora for long-context training, or lengths of one's own.

use std::sync::Arc;

use crate::SimulationError;
use crate::random::Random;

/// Documents of as many tokens are long.
const LONG: f64 = 64.0 * 1024.0;
/// Long documents come 4 times, and half of the others are left out: the odds of one of these.
const ODDS_OF_SHORT: f64 = 0.5 / 4.0;
/// The part of the long documents of [`Mix::Prolong`] that fill a context.
const FULL: f64 = 0.3;
/// Odds are drawn this often at most.
const TRIES: usize = 100_000;
/// How often there are long documents in the corpus that [`Mix::ProlongInOrder`] reads: 47, each 4 times.
pub const LONG_DOCUMENTS: u32 = 188;

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

/// A distribution of document lengths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mix {
    /// A pretraining corpus; lengths are stretched with the context.
    Pretrain,
    /// A corpus of books, code and articles for long contexts; 30% of the long documents fill the context.
    Prolong,
    /// The same documents in the order in which DistCA's scripts read them: the long ones, which are there
    /// [`LONG_DOCUMENTS`] times, come first, then only short ones.
    ProlongInOrder,
    /// These lengths, one of them as likely as another.
    Lengths(Arc<[u32]>),
}

/// Documents of a mix, one after the other.
#[derive(Clone, Debug)]
pub struct Stream<'a> {
    mix: &'a Mix,
    context: f64,
    drawn: u32,
    random: Random,
}

impl Mix {
    /// Names of mixes that come with the simulator.
    pub const BUILT_IN: [&str; 3] = ["pretrain", "prolong", "prolong-in-order"];

    /// A corpus by one of the names [`Mix::BUILT_IN`]. Quantiles of lengths, and how long documents are favoured, are
    /// those of DistCA's evaluation (arXiv 2510.18121, evaluation) and its scripts.
    pub fn built_in(name: &str) -> Option<Mix> {
        match name {
            "pretrain" => Some(Mix::Pretrain),
            "prolong" => Some(Mix::Prolong),
            "prolong-in-order" => Some(Mix::ProlongInOrder),
            _ => None,
        }
    }

    /// What it is called in results.
    pub fn name(&self) -> &'static str {
        match self {
            Mix::Pretrain => "pretrain",
            Mix::Prolong => "prolong",
            Mix::ProlongInOrder => "prolong-in-order",
            Mix::Lengths(_) => "lengths",
        }
    }

    /// Checks that there are lengths, and one that fills the context: else nothing is trained at that context.
    ///
    /// # Errors
    /// What is missing.
    pub fn check(&self, context: usize) -> Result<(), SimulationError> {
        let Mix::Lengths(lengths) = self else { return Ok(()) };
        let bad = |what: String| Err(SimulationError::Documents(what));
        if let Some(at) = lengths.iter().position(|&length| length == 0) {
            return bad(format!("length {at} is 0; a document has at least one token"));
        }
        match lengths.iter().max() {
            None => bad("there are no lengths".to_owned()),
            Some(&longest) if (longest as usize) < context => bad(format!(
                "no document reaches the context of {context}: the longest has {longest} tokens; choose a context of that or less"
            )),
            Some(_) => Ok(()),
        }
    }

    /// Tokens of most documents, or of what a context cuts of them, roughly.
    pub(crate) fn usual_length(&self, context: usize) -> f64 {
        let length = match self {
            Mix::Lengths(lengths) => {
                let all: f64 = lengths.iter().map(|&length| f64::from(length)).sum();
                all / lengths.len().max(1) as f64
            }
            _ => 1500.0,
        };
        length.min(context as f64).max(1.0)
    }

    /// Documents for training at a context, one after the other.
    pub fn stream(&self, context: usize, random: Random) -> Stream<'_> {
        Stream { mix: self, context: context as f64, drawn: 0, random }
    }
}

impl Stream<'_> {
    /// Tokens of the next document, at least 1. It may be longer than the context.
    pub fn draw(&mut self) -> usize {
        self.drawn += 1;
        let (mix, context) = (self.mix, self.context);
        let length = match mix {
            Mix::Lengths(lengths) => {
                let at = (self.random.unit() * lengths.len() as f64) as usize;
                return lengths.get(at).map_or(1, |&length| (length as usize).max(1));
            }
            Mix::Pretrain => self.of(&PRETRAIN, |_| true) * context / LONG,
            Mix::ProlongInOrder if self.drawn > LONG_DOCUMENTS => self.of(&PROLONG, |length| length < LONG),
            Mix::ProlongInOrder | Mix::Prolong => {
                let long = *mix == Mix::ProlongInOrder;
                let length = self.of(&PROLONG, |length| !long || length >= LONG);
                if length >= LONG && self.random.unit() < FULL { context } else { length }
            }
        };
        (length.round() as usize).max(1)
    }

    /// A length of the corpus that `fits`, long ones favoured.
    fn of(&mut self, table: &[u32; 18], fits: impl Fn(f64) -> bool) -> f64 {
        let mut length = 0.0;
        for _ in 0..TRIES {
            length = at_quantile(table, self.random.unit());
            if fits(length) && (length >= LONG || self.random.unit() < ODDS_OF_SHORT) {
                break;
            }
        }
        length
    }
}

/// Between the quantiles of a table, on the logarithm.
fn at_quantile(table: &[u32; 18], part: f64) -> f64 {
    let after = QUANTILES.partition_point(|&quantile| quantile <= part).clamp(1, QUANTILES.len() - 1);
    let (below, above) = (f64::from(table[after - 1]), f64::from(table[after]));
    let way = (part - QUANTILES[after - 1]) / (QUANTILES[after] - QUANTILES[after - 1]);
    below * power(above / below, way)
}

/// `base` to an exponent from 0 to 1, by square roots, which every machine rounds alike.
fn power(base: f64, exponent: f64) -> f64 {
    let (mut root, mut rest, mut product) = (base, exponent, 1.0);
    if exponent >= 1.0 {
        return base;
    }
    for _ in 0..52 {
        (root, rest) = (root.sqrt(), 2.0 * rest);
        if rest >= 1.0 {
            (product, rest) = (product * root, rest - 1.0);
        }
    }
    product
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
    fn powers_are_those_of_the_standard_library() {
        for (base, exponent) in [(2.0, 0.5), (63.0, 0.123), (1.0, 0.7), (7.5, 0.0), (7.5, 1.0), (1.2, 0.999)]
        {
            let (ours, theirs) = (power(base, exponent), f64::powf(base, exponent));
            assert!((ours / theirs - 1.0).abs() < 1e-12, "{base}^{exponent}: {ours}, not {theirs}");
        }
    }
}
