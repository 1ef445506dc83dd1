//! Advice: whether a pool of attention servers is worth it, and what it needs.

use crate::policy::Policy;
use crate::{Layout, Link, Network, Outcome, Scenario, SimulationError, simulate};

/// What a pool is predicted to make of a job, beside the best that the job can do without.
#[derive(Clone, Debug, PartialEq)]
pub struct Advice {
    /// The best of [`Advice::WITHOUT`].
    pub without: Outcome,
    /// The best of [`Advice::PUBLISHED`] that can do it.
    pub published: Option<Outcome>,
    /// The best pool, in place or with servers of its own.
    pub pool: Outcome,
    /// Pools with dedicated servers that were tried: how many GPUs they took, and their gain, where they could do it.
    pub dedicated: Vec<(u32, Option<f64>)>,
    /// Gain on slower and faster links between nodes, slowest first.
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
}

/// Why a pool is not worth it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// There is one device, which has nobody to share with.
    Alone,
    /// It would be on faster links.
    SlowLinks,
    /// Attention is a small part of a step.
    LittleAttention,
    /// Attention is about as balanced, and bytes about as well hidden, without.
    Balanced,
}

/// Attention below this part of a step is little.
const LITTLE: f64 = 0.15;
/// Speeds of links between nodes that are tried, times those of the scenario.
const LINKS: [f64; 6] = [0.0625, 0.125, 0.25, 0.5, 1.0, 4.0];
/// Parts of the GPUs, in eighths, that dedicated servers may take.
const EIGHTHS: [u32; 4] = [1, 2, 3, 4];
/// The part of the gain that is had on a link that suffices.
const MOST_OF_IT: f64 = 0.9;

impl Advice {
    /// A gain below this is not worth a pool: it is within what one step differs from the next by.
    pub const LEAST_GAIN: f64 = 0.02;
    /// What trainers do without a pool.
    pub const WITHOUT: [Policy; 4] = [Policy::Fixed, Policy::Wlb, Policy::Cp, Policy::CpRing];

    /// Other systems without a pool, as their papers describe them.
    pub const PUBLISHED: [Policy; 2] = [Policy::Flexsp, Policy::Hdp];

    /// By which part more tokens a second are trained with the pool than without.
    pub fn gain(&self) -> f64 {
        self.pool.tokens_per_second / self.without.tokens_per_second - 1.0
    }

    /// Whether the pool is worth it.
    pub fn is_worth_it(&self) -> bool {
        self.doubt.is_none()
    }

    /// The slowest link tried, between nodes, on which the pool still has most of its gain and is worth it.
    pub fn least_link(&self) -> Option<f64> {
        let enough = (MOST_OF_IT * self.gain()).max(Advice::LEAST_GAIN);
        // From the fastest down, as long as it is enough.
        let links = self.links.iter().rev().take_while(|link| link.gain >= enough);
        links.last().map(|link| link.bytes_per_second)
    }

    /// What takes most of the pool's time that computing does not: the name of a part of its account, and its share.
    pub fn limit(&self) -> (&'static str, f64) {
        let account = &self.pool.account;
        let parts = [
            ("collectives of tensor parallelism", account.tensor),
            ("sending and receiving on the devices themselves", account.host),
            ("communication that nothing hides", account.exposed),
            ("imbalance", account.imbalance),
            ("bubbles of the pipeline", account.bubble),
            ("the reduction of gradients", account.gradients),
            ("the optimizer", account.optimizer),
        ];
        let most = parts.into_iter().max_by(|a, b| a.1.total_cmp(&b.1));
        let (name, seconds) = most.unwrap_or(("nothing", 0.0));
        (name, seconds / self.pool.seconds)
    }
}

/// Simulates a job with a pool and without, on its links and on others.
///
/// # Errors
/// A [`SimulationError`] as [`simulate`]: of the scenario, of the pool where no pool can do it, or of the last of those
/// without where none of them can.
pub fn advise(scenario: &Scenario) -> Result<Advice, SimulationError> {
    scenario.check()?;
    let in_place = Scenario { layout: Layout { dedicated: 0, ..scenario.layout }, ..scenario.clone() };
    let without = best_of(&in_place, &Advice::WITHOUT)?;
    let published = best_of(&in_place, &Advice::PUBLISHED).ok();
    let mut pool = simulate(scenario, Policy::Outboard);
    let mut best = scenario.clone();
    let mut dedicated = Vec::new();
    if scenario.layout.dedicated == 0 {
        for gpus in candidates(&scenario.layout) {
            let layout = Layout { dedicated: gpus, ..scenario.layout };
            let apart = Scenario { layout, ..scenario.clone() };
            let outcome = simulate(&apart, Policy::Outboard);
            let gain = outcome.as_ref().ok().map(|outcome| gain(outcome, &without));
            dedicated.push((gpus, gain));
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
    let pool = pool?;
    let links = links(&in_place, &best)?;
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
            Err(error) => refusal = Some(error),
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

fn links(without: &Scenario, pool: &Scenario) -> Result<Vec<LinkGain>, SimulationError> {
    let on = |scenario: &Scenario, factor: f64| {
        let Network { between, .. } = scenario.network;
        let between = Link { bytes_per_second: between.bytes_per_second * factor, ..between };
        Scenario { network: Network { between, ..scenario.network }, ..scenario.clone() }
    };
    let of = |factor: f64| {
        let bytes_per_second = pool.network.between.bytes_per_second * factor;
        let pool = simulate(&on(pool, factor), Policy::Outboard)?;
        let without = best_of(&on(without, factor), &Advice::WITHOUT)?;
        Ok(LinkGain { bytes_per_second, gain: gain(&pool, &without) })
    };
    LINKS.into_iter().map(of).collect()
}

fn doubt(scenario: &Scenario, advice: &Advice) -> Option<Doubt> {
    if advice.gain() >= Advice::LEAST_GAIN {
        return None;
    }
    let fastest = advice.links.last().map_or(0.0, |link| link.gain);
    let attention = advice.without.account.attention / advice.without.seconds;
    Some(if scenario.layout.devices() <= 1 {
        Doubt::Alone
    } else if fastest >= Advice::LEAST_GAIN {
        Doubt::SlowLinks
    } else if attention < LITTLE {
        Doubt::LittleAttention
    } else {
        Doubt::Balanced
    })
}
