//! Advice: whether a pool of attention servers is worth it, and what it needs.

use crate::outcome::nearer;
use crate::policy::Policy;
use crate::{Layout, Link, Network, Outcome, Scenario, SimulationError, simulate};

/// What a pool is predicted to make of a job, beside the best that the job can do without.
#[derive(Clone, Debug, PartialEq)]
pub struct Advice {
    /// The best of [`Advice::WITHOUT`], or why none of them can do it.
    pub without: Result<Outcome, SimulationError>,
    /// The best of [`Advice::PUBLISHED`] that can do it.
    pub published: Option<Outcome>,
    /// The best pool, in place or with servers of its own, or why none can do it.
    pub pool: Result<Outcome, SimulationError>,
    /// Pools with dedicated servers that were tried: how many GPUs they took, and their gain, where they could do it.
    pub dedicated: Vec<(u32, Option<f64>)>,
    /// Gain on slower and faster links between nodes, slowest first. Empty where one of both cannot do it.
    pub links: Vec<LinkGain>,
    /// Why it is not worth it; `None` where it is.
    pub doubt: Option<Doubt>,
}

/// What a pool gains on links of a speed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkGain {
    /// Of a GPU, between nodes, each way.
    pub bytes_per_second: f64,
    /// As [`Advice::gain`], with both sides on these links.
    pub gain: f64,
    /// Whether it is the scenario's own.
    pub is_own: bool,
}

/// Why a pool is not worth it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// There is one device, which has nobody to share with.
    Alone,
    /// The pool does not fit memory, or cannot do it otherwise.
    Impossible,
    /// The dedicated servers that were asked for are too few for the attention there is.
    TooFewServers,
    /// It would be on faster links.
    SlowLinks,
    /// Attention is a small part of a step.
    LittleAttention,
    /// Attention is about as balanced, and bytes about as well hidden, without.
    Balanced,
}

/// Attention below this part of a step is little.
const LITTLE: f64 = 0.15;
/// Waiting for others that compute above this part of a step is much.
const MUCH: f64 = 0.15;
/// Speeds of links between nodes that are tried, times those of the scenario.
const LINKS: [f64; 5] = [0.125, 0.25, 0.5, 1.0, 4.0];
/// Parts of the GPUs, in eighths, that dedicated servers may take.
const EIGHTHS: [u32; 4] = [1, 2, 3, 4];

impl Advice {
    /// How many parts the work has, at most.
    pub const PARTS: usize = 3 + EIGHTHS.len() + LINKS.len();
    /// A gain below this is not worth a pool: it is within what one step differs from the next by.
    pub const LEAST_GAIN: f64 = 0.02;
    /// What trainers do without a pool.
    pub const WITHOUT: [Policy; 4] = [Policy::Fixed, Policy::Wlb, Policy::Cp, Policy::CpRing];

    /// Other systems without a pool, as their papers describe them.
    pub const PUBLISHED: [Policy; 2] = [Policy::Flexsp, Policy::Hdp];

    /// By which part more tokens a second are trained with the pool than without, where both can do it.
    pub fn gain(&self) -> Option<f64> {
        let (Ok(pool), Ok(without)) = (&self.pool, &self.without) else { return None };
        Some(gain(pool, without))
    }

    /// The same beside the best of the published systems without a pool.
    pub fn gain_over_published(&self) -> Option<f64> {
        let (Ok(pool), Some(published)) = (&self.pool, &self.published) else { return None };
        Some(gain(pool, published))
    }

    /// Whether the pool is worth it.
    pub fn is_worth_it(&self) -> bool {
        self.doubt.is_none()
    }

    /// The slowest link tried, between nodes, on which the pool is worth it, and so on all faster ones up to the scenario's;
    /// where it is not worth it there, up to the fastest that was tried.
    pub fn least_link(&self) -> Option<f64> {
        let own = self.links.iter().position(|link| link.is_own).filter(|_| self.is_worth_it());
        let links = own.and_then(|own| self.links.get(..=own)).unwrap_or(&self.links);
        let worth = links.iter().rev().take_while(|link| link.gain >= Advice::LEAST_GAIN);
        worth.last().map(|link| link.bytes_per_second)
    }

    /// What takes most of the pool's time that computing does not: the name of a part of its account, and its share.
    pub fn limit(&self) -> Option<(&'static str, f64)> {
        let pool = self.pool.as_ref().ok()?;
        let account = &pool.account;
        let parts = [
            ("collectives of tensor parallelism", account.tensor),
            ("sending and receiving on the devices themselves", account.host),
            ("communication that nothing hides", account.exposed),
            ("imbalance", account.imbalance),
            ("bubbles of the pipeline", account.bubble),
            ("gradients and weights among ranks", account.gradients),
            ("the optimizer", account.optimizer),
        ];
        let most = parts.into_iter().max_by(|a, b| a.1.total_cmp(&b.1));
        most.map(|(name, seconds)| (name, seconds / pool.seconds))
    }
}

/// Simulates a job with a pool and without, on its links and on others. `next` is told what is simulated next, at most
/// [`Advice::PARTS`] times.
///
/// # Errors
/// A [`SimulationError`] as [`simulate`]: of the scenario, or of those without a pool where nothing can do it, with or without.
pub fn advise(scenario: &Scenario, next: &dyn Fn(&str)) -> Result<Advice, SimulationError> {
    scenario.check()?;
    next("without attention servers");
    let in_place = Scenario { layout: Layout { dedicated: 0, ..scenario.layout }, ..scenario.clone() };
    let without = best_of(&in_place, &Advice::WITHOUT);
    next("published systems");
    let published = best_of(&in_place, &Advice::PUBLISHED).ok();
    next("attention servers");
    let mut pool = simulate(scenario, Policy::Outboard);
    let mut best = scenario.clone();
    let mut dedicated = Vec::new();
    if scenario.layout.dedicated == 0 {
        for gpus in candidates(&scenario.layout) {
            next(&format!("attention servers on {gpus} GPUs of their own"));
            let layout = Layout { dedicated: gpus, ..scenario.layout };
            let apart = Scenario { layout, ..scenario.clone() };
            let outcome = simulate(&apart, Policy::Outboard);
            let both = outcome.as_ref().ok().zip(without.as_ref().ok());
            dedicated.push((gpus, both.map(|(outcome, without)| gain(outcome, without))));
            let sooner = match (&outcome, &pool) {
                (Ok(outcome), Ok(pool)) => outcome.seconds < pool.seconds,
                (Ok(_), Err(_)) => true,
                (Err(_), _) => false,
            };
            if sooner {
                (pool, best) = (outcome, apart);
            }
        }
    }
    let links = match (&pool, &without) {
        (Ok(pool), Ok(without)) => links((&in_place, without), (&best, pool), next)?,
        (Err(_), Err(error)) => return Err(error.clone()),
        _ => Vec::new(),
    };
    let mut advice = Advice { without, published, pool, dedicated, links, doubt: None };
    advice.doubt = doubt(scenario, &advice);
    Ok(advice)
}

fn gain(pool: &Outcome, without: &Outcome) -> f64 {
    pool.tokens_per_second / without.tokens_per_second - 1.0
}

/// The fastest of several policies, or why the last of them cannot do it where none can.
fn best_of(scenario: &Scenario, policies: &[Policy]) -> Result<Outcome, SimulationError> {
    let mut best: Option<Outcome> = None;
    let mut refusal = None;
    for &policy in policies {
        match simulate(scenario, policy) {
            Ok(outcome) if best.as_ref().is_none_or(|best| outcome.seconds < best.seconds) => {
                best = Some(outcome);
            }
            Ok(_) => {}
            Err(error) => refusal = Some(nearer(refusal, error)),
        }
    }
    let none = || SimulationError::Unsuited { policy: "no policy".to_owned(), what: "it".to_owned() };
    best.ok_or_else(|| refusal.unwrap_or_else(none))
}

/// GPUs that dedicated servers may take so that the rest multiplies out.
fn candidates(layout: &Layout) -> Vec<u32> {
    let block = layout.tensor.saturating_mul(layout.pipeline).max(1);
    let mut gpus: Vec<u32> = EIGHTHS.map(|eighths| layout.gpus / 8 * eighths / block * block).into();
    gpus.retain(|&gpus| gpus > 0 && gpus < layout.gpus);
    gpus.dedup();
    gpus
}

/// Gains on links of other speeds; those on the scenario's own are known.
fn links(
    (without, outcome): (&Scenario, &Outcome),
    (pool, pooled): (&Scenario, &Outcome),
    next: &dyn Fn(&str),
) -> Result<Vec<LinkGain>, SimulationError> {
    let on = |scenario: &Scenario, factor: f64| {
        let Network { between, .. } = scenario.network;
        let between = Link { bytes_per_second: between.bytes_per_second * factor, ..between };
        Scenario { network: Network { between, ..scenario.network }, ..scenario.clone() }
    };
    let mut links = Vec::with_capacity(LINKS.len());
    for factor in LINKS {
        let bytes_per_second = pool.network.between.bytes_per_second * factor;
        next(&format!("links of {:.3e} bytes a second", bytes_per_second));
        let gain = if factor == 1.0 {
            gain(pooled, outcome)
        } else if on(pool, factor).check().is_ok() {
            gain(
                &simulate(&on(pool, factor), Policy::Outboard)?,
                &best_of(&on(without, factor), &Advice::WITHOUT)?,
            )
        } else {
            continue;
        };
        links.push(LinkGain { bytes_per_second, gain, is_own: factor == 1.0 });
    }
    Ok(links)
}

fn doubt(scenario: &Scenario, advice: &Advice) -> Option<Doubt> {
    let Ok(pool) = &advice.pool else { return Some(Doubt::Impossible) };
    let (Ok(without), Some(gain)) = (&advice.without, advice.gain()) else { return None };
    if gain >= Advice::LEAST_GAIN {
        return None;
    }
    let fastest = advice.links.last().map_or(0.0, |link| link.gain);
    let attention = without.account.attention / without.seconds;
    let waits = pool.account.imbalance / pool.seconds;
    Some(if scenario.layout.devices() <= 1 {
        Doubt::Alone
    } else if scenario.layout.dedicated > 0 && waits > MUCH {
        Doubt::TooFewServers
    } else if fastest >= Advice::LEAST_GAIN {
        Doubt::SlowLinks
    } else if attention < LITTLE {
        Doubt::LittleAttention
    } else {
        Doubt::Balanced
    })
}
