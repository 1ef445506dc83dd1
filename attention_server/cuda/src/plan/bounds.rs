//! Which bounds plans are built for. Pure.
//!
//! A plan serves any call within its bounds with the same bits: bounds only say how many blocks are started, and blocks
//! without work end at once. So plans are built for few bounds, and a larger one may stand in while the right one is
//! built.

use outboard_attention::Direction;

use crate::graph::Bounds;

/// Sequences of a call, at most.
pub(crate) const MAX_SEQUENCES: usize = 1024;

/// The bounds of the plan for a call.
pub(crate) fn for_call(direction: Direction, call: Bounds) -> Bounds {
    let sequences = step(call.sequences, 16, 4);
    match direction {
        // Blocks are started for rows; keys are run through.
        Direction::Forward => {
            let rows = step(call.rows, 256, 4);
            Bounds { sequences, rows, keys: step(call.keys.max(rows), 1 << 16, 16) }
        }
        // Blocks are started for keys, and a few that round and sum for rows.
        Direction::Backward => {
            Bounds { sequences, rows: step(call.rows, 512, 8), keys: step(call.keys, 512, 8) }
        }
    }
}

/// True when a plan for `bounds` can compute `call`.
pub(crate) fn covers(bounds: Bounds, call: Bounds) -> bool {
    bounds.sequences >= call.sequences && bounds.rows >= call.rows && bounds.keys >= call.keys
}

/// The least `first * factor^n` that is at least `n`.
fn step(n: usize, first: usize, factor: usize) -> usize {
    let mut bound = first;
    while bound < n {
        bound = bound.saturating_mul(factor);
    }
    bound
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_cover_their_calls_and_are_few() {
        let mut seen = std::collections::HashSet::new();
        for direction in [Direction::Forward, Direction::Backward] {
            for sequences in [1, 16, 17, 64, 1000, MAX_SEQUENCES] {
                for rows in [1, 128, 129, 4096] {
                    for keys in [1, 511, 4096, 100_000, outboard_attention::MAX_TOKENS] {
                        let call = Bounds { sequences, rows, keys };
                        let bounds = for_call(direction, call);
                        assert!(covers(bounds, call), "{call:?} {bounds:?}");
                        assert!(bounds.sequences < 4 * sequences.max(5));
                        seen.insert((direction, bounds));
                    }
                }
            }
        }
        assert!(seen.len() < 80, "{}", seen.len());
    }
}
