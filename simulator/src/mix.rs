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

/// A part of a corpus by number of documents, and the most tokens that a document of it has.
type Quantile = (f64, u32);

const PRETRAIN: [Quantile; 21] = [
    (0.0, 1),
    (0.01, 63),
    (0.05, 324),
    (0.1, 646),
    (0.2, 1283),
    (0.3, 1932),
    (0.4, 2582),
    (0.5, 3227),
    (0.6, 3861),
    (0.7, 4514),
    (0.8, 5156),
    (0.9, 5784),
    (0.95, 6110),
    (0.98, 10080),
    (0.99, 26070),
    (0.995, 69118),
    (0.996, 78551),
    (0.997, 91208),
    (0.998, 99110),
    (0.999, 119836),
    (1.0, 124913),
];
const PROLONG: [Quantile; 23] = [
    (0.0, 575),
    (0.01, 678),
    (0.05, 801),
    (0.1, 919),
    (0.2, 1130),
    (0.3, 1347),
    (0.4, 1594),
    (0.5, 1914),
    (0.6, 2362),
    (0.7, 3018),
    (0.8, 4050),
    (0.9, 6051),
    (0.95, 8379),
    (0.98, 12310),
    (0.99, 16273),
    (0.995, 21393),
    (0.999, 47500),
    (0.9993, 59220),
    (0.9995, 74664),
    (0.9997, 100137),
    (0.9998, 138974),
    (0.9999, 239494),
    (1.0, 340149),
];

/// A distribution of document lengths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mix {
    /// A pretraining corpus; lengths are stretched with the context.
    Pretrain,
    /// A corpus of books, code and articles for long contexts; 30% of the long documents fill the context.
    Prolong,
    /// These lengths, one of them as likely as another.
    Lengths(Arc<[u32]>),
    /// These lengths in this order, and again from the first one on. The context is where sequences are cut, whether a
    /// document reaches it or not.
    InOrder(Arc<[u32]>),
}

/// Documents of a mix, one after the other.
#[derive(Clone, Debug)]
pub struct Stream<'a> {
    mix: &'a Mix,
    context: f64,
    /// Documents that were drawn.
    drawn: usize,
    random: Random,
}

impl Mix {
    /// Names of mixes that come with the simulator.
    pub const BUILT_IN: [&str; 2] = ["pretrain", "prolong"];

    /// A corpus by one of the names [`Mix::BUILT_IN`]. Quantiles of lengths, and how long documents are favoured, are
    /// those of DistCA's evaluation (arXiv 2510.18121, evaluation) and its scripts.
    pub fn built_in(name: &str) -> Option<Mix> {
        match name {
            "pretrain" => Some(Mix::Pretrain),
            "prolong" => Some(Mix::Prolong),
            _ => None,
        }
    }

    /// What it is called in results.
    pub fn name(&self) -> &'static str {
        match self {
            Mix::Pretrain => "pretrain",
            Mix::Prolong => "prolong",
            Mix::Lengths(_) => "lengths",
            Mix::InOrder(_) => "lengths in order",
        }
    }

    /// Checks that there are lengths, and, where they are drawn, one that fills the context: else nothing is trained at that
    /// context.
    ///
    /// # Errors
    /// What is missing.
    pub fn check(&self, context: usize) -> Result<(), SimulationError> {
        let (Mix::Lengths(lengths) | Mix::InOrder(lengths)) = self else { return Ok(()) };
        let bad = |what: String| Err(SimulationError::Documents(what));
        if let Some(at) = lengths.iter().position(|&length| length == 0) {
            return bad(format!("length {at} is 0; a document has at least one token"));
        }
        match lengths.iter().max() {
            None => bad("there are no lengths".to_owned()),
            Some(&longest) if matches!(self, Mix::Lengths(_)) && (longest as usize) < context => {
                bad(format!(
                    "no document reaches the context of {context}: the longest has {longest} tokens; choose a context of that or less"
                ))
            }
            Some(_) => Ok(()),
        }
    }

    /// Tokens of most documents, or of what a context cuts of them, roughly.
    pub(crate) fn usual_length(&self, context: usize) -> f64 {
        let length = match self {
            Mix::Lengths(lengths) | Mix::InOrder(lengths) => {
                let all: f64 = lengths.iter().map(|&length| f64::from(length)).sum();
                all / lengths.len().max(1) as f64
            }
            Mix::Pretrain | Mix::Prolong => 1500.0,
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
        let nth = self.drawn;
        self.drawn = self.drawn.wrapping_add(1);
        let length = match self.mix {
            Mix::Lengths(lengths) => {
                let at = (self.random.unit() * lengths.len() as f64) as usize;
                lengths.get(at).map_or(1.0, |&length| f64::from(length))
            }
            Mix::InOrder(lengths) => {
                let at = nth.checked_rem(lengths.len()).and_then(|at| lengths.get(at));
                at.map_or(1.0, |&length| f64::from(length))
            }
            Mix::Pretrain => self.of(&PRETRAIN) * self.context / LONG,
            Mix::Prolong => {
                let length = self.of(&PROLONG);
                if length >= LONG && self.random.unit() < FULL { self.context } else { length }
            }
        };
        (length.round() as usize).max(1)
    }

    /// A length of the corpus, long ones favoured.
    fn of(&mut self, table: &[Quantile]) -> f64 {
        let mut length = 0.0;
        for _ in 0..TRIES {
            length = at_quantile(table, self.random.unit());
            if length >= LONG || self.random.unit() < ODDS_OF_SHORT {
                break;
            }
        }
        length
    }
}

/// Between the quantiles of a table, on the logarithm.
fn at_quantile(table: &[Quantile], part: f64) -> f64 {
    let after = table.partition_point(|&(quantile, _)| quantile <= part).clamp(1, table.len() - 1);
    let ((from, below), (to, above)) = (table[after - 1], table[after]);
    let (below, above) = (f64::from(below), f64::from(above));
    below * power(above / below, (part - from) / (to - from))
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
        for table in [&PRETRAIN[..], &PROLONG[..]] {
            assert!(table.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 < pair[1].1));
            for &(quantile, tokens) in table {
                assert!((at_quantile(table, quantile) / f64::from(tokens) - 1.0).abs() < 1e-9);
            }
        }
        let middle = at_quantile(&PRETRAIN, 0.005);
        assert!((middle - 63f64.sqrt()).abs() < 1e-9, "{middle} halfway between 1 and 63");
    }

    #[test]
    fn documents_come_in_order_and_again() {
        let mix = Mix::InOrder([5, 7, 11].into());
        let mut stream = mix.stream(100, Random::new(3));
        let drawn: Vec<usize> = (0..7).map(|_| stream.draw()).collect();
        assert_eq!(drawn, [5, 7, 11, 5, 7, 11, 5]);
        mix.check(100).unwrap();
        assert!(Mix::InOrder([5, 0].into()).check(1).is_err() && Mix::InOrder([].into()).check(1).is_err());
        assert_eq!(Mix::InOrder([].into()).stream(1, Random::new(0)).draw(), 1);
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
