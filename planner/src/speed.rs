//! How fast servers are compared with each other, from what they did in the steps before.
//!
//! Measured times are noisy, and a report may be nonsense. So an estimate moves slowly, by a bounded factor a step, within
//! bounds; and what others are told of it is only whether a server is *clearly* slower than its peers.

use std::collections::BTreeMap;

/// How much of the way to what a step says an estimate goes.
const GAIN: f64 = 0.25;
/// The most that one step changes an estimate by, as a factor. Two servers changed in opposite ways by one step alone
/// stay within [`SLOW`] of each other.
const STEP: f64 = 1.08;
/// Estimates stay between `1 / RANGE` and `RANGE`.
const RANGE: f64 = 8.0;
/// A server below this speed, relative to its peers, is slow ...
const SLOW: f64 = 0.85;
/// ... until it is above this again.
const SOUND: f64 = 0.92;
/// Shorter times than this many seconds say more of clocks and scheduling than of a device.
const SHORTEST: f64 = 1e-3;

/// What a server did in a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Its work in any unit that all servers of the step have in common, such as predicted seconds.
    pub work: f64,
    /// How long it computed, in seconds.
    pub seconds: f64,
}

/// Relative speeds of servers, which are known by keys `K`. The median server has speed 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Speeds<K> {
    of: BTreeMap<K, Estimate>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Estimate {
    speed: f64,
    slow: bool,
}

impl<K> Default for Speeds<K> {
    fn default() -> Speeds<K> {
        Speeds { of: BTreeMap::new() }
    }
}

impl<K: Ord + Clone> Speeds<K> {
    /// Takes what servers did in one step. Samples that make no sense count nothing; a server without one keeps its
    /// speed.
    ///
    /// Speeds are relative, so what a step says of a server depends on what it says of the others: the speed of each is
    /// its rate over the median of all rates, each of them over its server's estimate.
    pub fn observe(&mut self, samples: &BTreeMap<K, Sample>) {
        let before = |(key, sample): (&K, &Sample)| Some((key.clone(), sample.rate()?, self.speed(key)));
        let rates: Vec<(K, f64, f64)> = samples.iter().filter_map(before).collect();
        let Some(base) = median(rates.iter().map(|(_, rate, speed)| rate / speed).collect()) else { return };
        for (key, rate, speed) in rates {
            // Bounded first, so that no rate is too large to reckon with.
            let says = (rate / base).clamp(1.0 / RANGE, RANGE);
            let moved = (speed + GAIN * (says - speed)).clamp(speed / STEP, speed * STEP);
            let estimate = self.of.entry(key).or_insert(Estimate { speed, slow: false });
            estimate.speed = moved.clamp(1.0 / RANGE, RANGE);
        }
        self.settle();
    }

    /// Forgets servers; one that comes back starts anew.
    pub fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        self.of.retain(|key, _| keep(key));
        self.settle();
    }

    /// Whether a server has measured anything, and was not forgotten.
    pub fn knows(&self, key: &K) -> bool {
        self.of.contains_key(key)
    }

    /// The estimate of a server: 1 for one that is not known.
    pub fn speed(&self, key: &K) -> f64 {
        self.of.get(key).map_or(1.0, |estimate| estimate.speed)
    }

    /// The servers that are clearly slower than their peers, each with its speed relative to them: below 1.
    pub fn slow(&self) -> BTreeMap<K, f64> {
        let peers = Peers::of(&self.of);
        let slow = self.of.iter().filter(|(_, estimate)| estimate.slow);
        slow.map(|(key, estimate)| (key.clone(), estimate.speed / peers.without(estimate.speed))).collect()
    }

    /// Makes the median 1 again, from which noise would carry it away over many steps, and says who is slow.
    fn settle(&mut self) {
        let Some(middle) = median(self.of.values().map(|estimate| estimate.speed).collect()) else { return };
        for estimate in self.of.values_mut() {
            estimate.speed = (estimate.speed / middle).clamp(1.0 / RANGE, RANGE);
        }
        let peers = Peers::of(&self.of);
        for estimate in self.of.values_mut() {
            let relative = estimate.speed / peers.without(estimate.speed);
            estimate.slow = relative < if estimate.slow { SOUND } else { SLOW };
        }
    }
}

impl Sample {
    /// Work a second, if that makes sense.
    fn rate(self) -> Option<f64> {
        let sound = |value: f64| value.is_finite() && value > 0.0;
        let rate = self.work / self.seconds;
        (sound(self.work) && self.seconds >= SHORTEST && sound(rate)).then_some(rate)
    }
}

/// The speeds of all servers, ascending.
struct Peers(Vec<f64>);

impl Peers {
    fn of<K>(of: &BTreeMap<K, Estimate>) -> Peers {
        let mut speeds: Vec<f64> = of.values().map(|estimate| estimate.speed).collect();
        speeds.sort_unstable_by(f64::total_cmp);
        Peers(speeds)
    }

    /// The median without one server of this speed; without anybody else that speed itself.
    fn without(&self, speed: f64) -> f64 {
        let at = self.0.partition_point(|&other| other < speed);
        let left = self.0.len().saturating_sub(1);
        let nth = |n: usize| self.0.get(if n < at { n } else { n + 1 }).copied().unwrap_or(speed);
        if left == 0 { speed } else { middle(nth((left - 1) / 2), nth(left / 2)) }
    }
}

/// The median of positive values; of an even number the geometric mean of the middle two. `None` of none.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.retain(|value| value.is_finite() && *value > 0.0);
    values.sort_unstable_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    Some(middle(*values.get(last / 2)?, *values.get(values.len() / 2)?))
}

fn middle(a: f64, b: f64) -> f64 {
    // Equal values stay as they are to the last bit.
    if a == b { a } else { a.sqrt() * b.sqrt() }
}
