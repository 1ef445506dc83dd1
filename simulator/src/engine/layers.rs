//! Layers one after another: before attention, attention, after it, with nano-batches that take turns.

use super::clocks::{Arrival, Clocks, Operation, Wait};
use super::trace::Doing;
use crate::phase::{Attend, Phase};
use crate::scenario::Recompute;

/// What a token takes on one lane outside of core attention, forward; backward takes twice as long to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Costs {
    /// Up to Q, K and V.
    pub(crate) pre: f64,
    /// From O to the end of the layer.
    pub(crate) post: f64,
    /// The MLP, a part of `post`.
    pub(crate) mlp: f64,
    /// Collectives among lanes up to Q, K and V, in each direction.
    pub(crate) tensor_pre: f64,
    /// The same from O on.
    pub(crate) tensor_post: f64,
    /// The head, both directions, on the last stage.
    pub(crate) head: f64,
}

/// A pass through layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Forward,
    Backward(Recompute),
}

/// What goes through layers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stretch<'a> {
    pub(crate) work: Work,
    pub(crate) layers: u32,
    pub(crate) costs: &'a Costs,
    /// How the waits of a device that holds no tokens are accounted for: in a pipeline it has nothing in hand.
    pub(crate) idle: Wait,
}

/// What is computed before attention is sent for, or at the end.
#[derive(Clone, Copy, Debug)]
struct Leg {
    /// Seconds a token.
    dense: f64,
    recomputed: f64,
    tensor: f64,
    doing: Doing,
    attend: Option<Doing>,
}

/// Runs `layers` layers of a phase on the devices from `first` on. Each starts once its input is there; returns when
/// each is done.
pub(crate) fn run(
    clocks: &mut Clocks,
    first: usize,
    phase: &Phase,
    Stretch { work, layers, costs, idle }: Stretch<'_>,
    entry: &[Arrival],
) -> Vec<Arrival> {
    let mut inputs: Vec<Vec<Arrival>> = phase.nanos.iter().map(|_| entry.to_vec()).collect();
    let mut wait = Wait::Stage;
    for leg in legs(work, layers, costs) {
        let mut arrivals = Vec::with_capacity(phase.nanos.len());
        for (n, nano) in phase.nanos.iter().enumerate() {
            let mut ready = vec![0.0; nano.tokens.len()];
            for (device, ready) in ready.iter_mut().enumerate() {
                let tokens = nano.tokens[device];
                let parts = [leg.dense, leg.recomputed, leg.tensor].map(|seconds| seconds * tokens);
                *ready = clocks.compute(Operation {
                    device: first + device,
                    input: inputs[n][device],
                    wait: if tokens > 0.0 { wait } else { idle },
                    doing: leg.doing,
                    nano: n as u8,
                    seconds: parts.iter().sum(),
                    waits: 1.0,
                });
                let account = &mut clocks.accounts[first + device];
                account.dense += parts[0];
                account.recomputed += parts[1];
                account.tensor += parts[2];
            }
            match leg.attend {
                Some(doing) => {
                    let attend = attend(nano, doing);
                    arrivals.push(clocks.exchange(first, &attend.there, &ready));
                }
                None => arrivals.push(ready.iter().map(|&at| Arrival { at, made: at }).collect()),
            }
        }
        wait = Wait::Attention;
        if let Some(doing) = leg.attend {
            for (n, nano) in phase.nanos.iter().enumerate() {
                let attend = attend(nano, doing);
                let mut done = vec![0.0; nano.tokens.len()];
                for (device, done) in done.iter_mut().enumerate() {
                    let (seconds, host) = (attend.seconds[device], attend.dispatch[device]);
                    *done = clocks.compute(Operation {
                        device: first + device,
                        input: arrivals[n][device],
                        wait: if nano.tokens[device] > 0.0 { wait } else { idle },
                        doing,
                        nano: n as u8,
                        seconds: seconds + host,
                        waits: attend.waits[device],
                    });
                    let account = &mut clocks.accounts[first + device];
                    account.attention += seconds;
                    account.host += host;
                }
                arrivals[n] = clocks.exchange(first, &attend.back, &done);
            }
        }
        inputs = arrivals;
    }
    // A device is through when its last nano-batch is.
    let mut exits = inputs.pop().unwrap_or_else(|| entry.to_vec());
    for others in inputs {
        for (exit, other) in exits.iter_mut().zip(others) {
            *exit = Arrival { at: exit.at.max(other.at), made: exit.made.max(other.made) };
        }
    }
    exits
}

fn attend(nano: &crate::phase::Nano, doing: Doing) -> &Attend {
    if doing == Doing::AttentionBackward { &nano.backward } else { &nano.forward }
}

fn legs(work: Work, layers: u32, costs: &Costs) -> Vec<Leg> {
    let &Costs { pre, post, mlp, tensor_pre, tensor_post, .. } = costs;
    let layers = layers as usize;
    let mut legs = Vec::with_capacity(2 * layers + 1);
    match work {
        Work::Forward => {
            for layer in 0..=layers {
                let (before, after) = (layer > 0, layer < layers);
                let sum =
                    |post: f64, pre: f64| if before { post } else { 0.0 } + if after { pre } else { 0.0 };
                legs.push(Leg {
                    dense: sum(post, pre),
                    recomputed: 0.0,
                    tensor: sum(tensor_post, tensor_pre),
                    doing: Doing::Dense,
                    attend: after.then_some(Doing::Attention),
                });
            }
        }
        Work::Backward(Recompute::Full) => {
            for layer in 0..=layers {
                // Backward through what comes before attention of the layer above, and forward up to this one's.
                let (before, after) = (layer > 0, layer < layers);
                let dense = if before { 2.0 * pre } else { 0.0 };
                let recomputed = if after { pre } else { 0.0 };
                let tensor = f64::from(u8::from(before) + u8::from(after)) * tensor_pre;
                let attend = after.then_some(Doing::Attention);
                legs.push(Leg { dense, recomputed, tensor, doing: Doing::DenseBackward, attend });
                if after {
                    legs.push(Leg {
                        dense: 2.0 * post,
                        recomputed: post,
                        tensor: 2.0 * tensor_post,
                        doing: Doing::DenseBackward,
                        attend: Some(Doing::AttentionBackward),
                    });
                }
            }
        }
        Work::Backward(recompute) => {
            let again = if recompute == Recompute::Mlp { mlp } else { 0.0 };
            for layer in 0..=layers {
                let (before, after) = (layer > 0, layer < layers);
                let sum =
                    |pre: f64, post: f64| if before { pre } else { 0.0 } + if after { post } else { 0.0 };
                legs.push(Leg {
                    dense: 2.0 * sum(pre, post),
                    recomputed: sum(0.0, again),
                    tensor: sum(tensor_pre, tensor_post),
                    doing: Doing::DenseBackward,
                    attend: after.then_some(Doing::AttentionBackward),
                });
            }
        }
    }
    legs
}
