//! The least layer time, from what ticks can trade: with more tolerance a slot may have more to compute, and less needs to be
//! carried.

/// Seconds of one pass of a tick at least.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Stage {
    /// Of the busiest slot.
    pub(super) computing: f64,
    /// Of the busiest link.
    pub(super) carrying: f64,
}

/// Forward and backward at growing tolerances. Between two tolerances no less is computed than at the first, and no less
/// carried than at the second.
#[derive(Clone, Debug)]
pub(super) struct Trade(pub(super) Vec<[Stage; 2]>);

/// Parts of a second of computing that a second of carrying is exchanged for.
const WEIGHTS: usize = 20;

/// The least time of all ticks. A pass takes as long as all its ticks compute, or as all carry.
pub(super) fn least(trades: &[Trade]) -> f64 {
    let longer = |[forward, backward]: &[Stage; 2]| {
        forward.computing.max(forward.carrying) + backward.computing.max(backward.carrying)
    };
    match trades {
        [] => 0.0,
        [Trade(stages)] => stages.iter().map(longer).fold(f64::INFINITY, f64::min),
        // The longer of two sums is no less than any mean of both, and each tick has its own least of that.
        _ => {
            let mean = |weight: f64| -> f64 {
                let of = |stage: &Stage| weight * stage.computing + (1.0 - weight) * stage.carrying;
                let least = |Trade(stages): &Trade| {
                    let all = stages.iter().map(|[forward, backward]| of(forward) + of(backward));
                    all.fold(f64::INFINITY, f64::min)
                };
                trades.iter().map(least).sum()
            };
            (0..=WEIGHTS).map(|n| mean(n as f64 / WEIGHTS as f64)).fold(0.0, f64::max)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stages(times: [f64; 2]) -> [Stage; 2] {
        [1.0, 2.0].map(|by| Stage { computing: by * times[0], carrying: by * times[1] })
    }

    #[test]
    fn the_best_tolerance_counts() {
        let trade = Trade(vec![stages([1.0, 9.0]), stages([2.0, 3.0]), stages([4.0, 0.0])]);
        assert_eq!(least(&[]), 0.0);
        assert_eq!(least(std::slice::from_ref(&trade)), 9.0);
        // One tick may compute while the other carries.
        let both = least(&[trade.clone(), trade]);
        assert!(both <= 3.0 * 5.0 && both > 3.0 * 4.0, "{both}");
    }
}
