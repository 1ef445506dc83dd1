//! Steps whose times are known.

use super::{Account, Clocks, Closing, Costs, Links, Program, Replica, Trace, run};
use crate::phase::{Attend, Exchange, Nano, Phase, Transfer};
use crate::scenario::Recompute;

const LINKS: Links = Links { bytes_per_second: [1e9, 1e8], latency_seconds: [1e-3, 2e-3] };
/// Seconds a token: before and after attention, of which the MLP; of the head, both passes.
const COSTS: Costs = Costs { pre: 1.0, post: 2.0, mlp: 1.5, tensor_pre: 0.125, tensor_post: 0.25, head: 0.5 };

fn closing(ranks: usize, stages: usize) -> Closing {
    Closing {
        ranks,
        stages,
        layers: 3,
        costs: COSTS,
        recompute: Recompute::None,
        token_bytes: 0.0,
        devices_per_node: 2,
        gradients: 0.0,
        weights: 0.0,
        optimizer: 0.0,
    }
}

/// A micro-batch of `tokens` on each device, whose attention takes `forward` and `backward` seconds.
fn micro_batch(tokens: &[f64], [forward, backward]: [f64; 2]) -> Phase {
    let attend = |seconds: f64| Attend::local(vec![seconds; tokens.len()]);
    Phase {
        nanos: vec![Nano { tokens: tokens.to_vec(), forward: attend(forward), backward: attend(backward) }],
    }
}

/// Runs a step; checks that every device's seconds add up to it.
fn check(program: &Program, closing: &Closing) -> (f64, Vec<Account>) {
    let mut clocks = Clocks::new(closing.ranks * closing.stages, LINKS, Trace::default());
    let seconds = run(&mut clocks, program, closing);
    for account in &clocks.accounts {
        assert_near(account.total(), seconds);
        assert!(account.parts().iter().all(|part| *part >= 0.0), "{account:?}");
    }
    (seconds, clocks.accounts)
}

#[track_caller]
fn assert_near(ours: f64, known: f64) {
    assert!((ours - known).abs() <= 1e-9 * known.abs().max(1.0), "{ours}, not {known}");
}

/// What a device computes of a micro-batch of `tokens`, forward and backward, without the head.
fn passes(tokens: f64, [forward, backward]: [f64; 2], recompute: Recompute) -> [f64; 2] {
    let dense = (COSTS.pre + COSTS.post) * tokens;
    let tensor = (COSTS.tensor_pre + COSTS.tensor_post) * tokens;
    let again = match recompute {
        Recompute::None => 0.0,
        Recompute::Mlp => COSTS.mlp * tokens,
        Recompute::Full => dense + tensor + forward,
    };
    [3.0 * (dense + tensor + forward), 3.0 * (2.0 * dense + tensor + backward + again)]
}

#[test]
fn one_device_takes_the_sum_of_all_it_computes() {
    let (tokens, attention) = (2.0, [3.0, 7.0]);
    for recompute in [Recompute::None, Recompute::Mlp, Recompute::Full] {
        let closing = Closing { recompute, ..closing(1, 1) };
        let [forward, backward] = passes(tokens, attention, recompute);
        let head = COSTS.head * tokens;
        let phases = vec![micro_batch(&[tokens], attention); 2];
        let apart = Program::Apart(vec![Replica { first: 0, micro_batches: phases.clone() }]);
        let together = Program::Together { forward: phases.clone(), backward: phases.clone() };
        for program in [apart, together, Program::Rounds(phases)] {
            let (seconds, accounts) = check(&program, &closing);
            assert_near(seconds, 2.0 * (forward + backward + head));
            let attention_forward = attention[0] * if recompute == Recompute::Full { 2.0 } else { 1.0 };
            assert_near(accounts[0].attention, 2.0 * 3.0 * (attention_forward + attention[1]));
            assert_near(accounts[0].exposed + accounts[0].imbalance + accounts[0].bubble, 0.0);
        }
    }
}

#[test]
fn one_forward_one_backward_takes_as_many_turns_as_micro_batches_and_stages() {
    for stages in 1..5 {
        for micro_batches in 1..7 {
            let closing = Closing { costs: Costs { head: 0.0, ..COSTS }, ..closing(2, stages) };
            let phase = micro_batch(&[2.0, 2.0], [3.0, 7.0]);
            let [forward, backward] = passes(2.0, [3.0, 7.0], Recompute::None);
            let replica = Replica { first: 0, micro_batches: vec![phase; micro_batches] };
            let (seconds, accounts) = check(&Program::Apart(vec![replica]), &closing);
            let turns = (micro_batches + stages - 1) as f64;
            assert_near(seconds, turns * (forward + backward));
            let bubble = (stages - 1) as f64 * (forward + backward);
            accounts.iter().for_each(|account| assert_near(account.bubble, bubble));
        }
    }
}

/// A micro-batch in `nanos` parts, of which each device computes the other's attention: `bytes` there and as many back.
fn served(nanos: usize, bytes: f64) -> Phase {
    let swap = [Transfer { from: 0, to: 1, bytes }, Transfer { from: 1, to: 0, bytes }];
    let exchange = Exchange::of(2, &swap, |_, _| true);
    let attend = || Attend { there: exchange.clone(), back: exchange.clone(), ..Attend::local(vec![4.0; 2]) };
    let nano = || Nano { tokens: vec![2.0; 2], forward: attend(), backward: attend() };
    Phase { nanos: std::iter::repeat_with(nano).take(nanos).collect() }
}

#[test]
fn nano_batches_hide_bytes_that_take_less_than_is_computed() {
    let closing = Closing { costs: Costs { head: 0.0, ..COSTS }, ..closing(2, 1) };
    let forward_and_backward = |phase: Phase| {
        check(&Program::Together { forward: vec![phase.clone()], backward: vec![phase] }, &closing)
    };
    // A second on the link, and less than 2.25 before attention and 4 of attention.
    let bytes = LINKS.bytes_per_second[0];
    let carried = 1.0 + LINKS.latency_seconds[0];
    let (alone, _) = forward_and_backward(served(1, 0.0));
    let (one, accounts) = forward_and_backward(served(1, bytes));
    assert_near(one, alone + 12.0 * carried);
    assert_near(accounts[0].exposed, 12.0 * carried);
    let (both, _) = forward_and_backward(served(2, 0.0));
    assert_near(both, 2.0 * alone);
    let (hidden, accounts) = forward_and_backward(served(2, bytes));
    assert_near(hidden, both);
    assert_near(accounts[0].exposed, 0.0);
    // What takes longer than the link is free is the time of the link.
    let (long, _) = forward_and_backward(served(2, 100.0 * bytes));
    assert!(long >= 2.0 * 12.0 * 100.0, "{long}");
}

#[test]
fn an_all_gather_takes_its_bytes_and_a_latency() {
    let near = |a: u32, b: u32| a / 2 == b / 2;
    for (ranks, link) in [(2, 0), (3, 1), (4, 1)] {
        let group = vec![(0..ranks as u32).collect::<Vec<_>>()];
        let gather = Exchange::gather(ranks, group, |device| 1e7 * f64::from(device + 1), near);
        let total = 1e7 * (ranks * (ranks + 1) / 2) as f64;
        let ready: Vec<f64> = (0..ranks).map(|n| n as f64).collect();
        let mut clocks = Clocks::new(ranks, LINKS, Trace::default());
        let arrivals = clocks.exchange(0, &gather, &vec![1.0; ranks]);
        let most = total - 1e7;
        let latest = arrivals.iter().map(|arrival| arrival.at).fold(0.0, f64::max);
        assert_near(latest, 1.0 + most / LINKS.bytes_per_second[link] + LINKS.latency_seconds[link]);
        // Nobody has it before the last one has sent.
        let mut clocks = Clocks::new(ranks, LINKS, Trace::default());
        let arrivals = clocks.exchange(0, &gather, &ready);
        assert!(
            arrivals
                .iter()
                .all(|arrival| arrival.at >= (ranks - 1) as f64 && arrival.made == ready[ranks - 1])
        );
    }
}

#[test]
fn an_all_to_all_takes_what_goes_to_other_nodes() {
    let near = |a: u32, b: u32| a / 2 == b / 2;
    let exchange =
        Exchange::all_to_all(8, vec![vec![0, 1, 2, 3], vec![4, 5]], |_, size| 4e6 / size as f64, near);
    assert_eq!(exchange.sends[0], [1e6, 2e6]);
    assert_eq!(exchange.receives[3], [1e6, 2e6]);
    assert_eq!((exchange.sends[4], exchange.sends[6]), ([2e6, 0.0], [0.0; 2]));
    let arrivals = Clocks::new(8, LINKS, Trace::default()).exchange(0, &exchange, &[0.0; 8]);
    assert_near(arrivals[0].at, 2e6 / LINKS.bytes_per_second[1] + LINKS.latency_seconds[1]);
    assert_near(arrivals[5].at, 2e6 / LINKS.bytes_per_second[0] + LINKS.latency_seconds[0]);
    assert_near(arrivals[7].at, 0.0);
}

#[test]
fn a_ring_computes_what_has_come() {
    let group = vec![vec![0, 1]];
    let gather = Exchange::gather(2, group, |_| LINKS.bytes_per_second[0], |_, _| true);
    for (seconds, known) in [(4.0, 4.0), (1.0, 1.0 + LINKS.latency_seconds[0] + 0.5)] {
        let attend = Attend { there: gather.clone(), waits: vec![0.5; 2], ..Attend::local(vec![seconds; 2]) };
        let nano = Nano { tokens: vec![1.0; 2], forward: attend, backward: Attend::local(vec![0.0; 2]) };
        let closing = Closing { costs: Costs { head: 0.0, ..COSTS }, ..closing(2, 1) };
        let phase = Phase { nanos: vec![nano] };
        let (together, _) = check(&Program::Rounds(vec![phase]), &closing);
        let [forward, backward] = passes(1.0, [known, 0.0], Recompute::None);
        assert_near(together, forward + backward);
    }
}

#[test]
fn rounds_end_when_the_slowest_group_does() {
    let closing = Closing { costs: Costs { head: 0.0, ..COSTS }, ..closing(2, 1) };
    let phases = vec![micro_batch(&[1.0, 3.0], [0.0; 2]), micro_batch(&[3.0, 1.0], [0.0; 2])];
    let [forward, backward] = passes(3.0, [0.0; 2], Recompute::None);
    let (rounds, _) = check(&Program::Rounds(phases.clone()), &closing);
    assert_near(rounds, 2.0 * (forward + backward));
    let [less_forward, less_backward] = passes(1.0, [0.0; 2], Recompute::None);
    let (free, _) = check(&Program::Together { forward: phases.clone(), backward: phases }, &closing);
    assert_near(free, forward + backward + less_forward + less_backward);
}

#[test]
fn gradients_hide_behind_the_layers_below() {
    let step = |gradients: f64, tokens: [f64; 2]| {
        let closing = Closing { gradients, costs: Costs { head: 0.0, ..COSTS }, ..closing(2, 1) };
        check(&Program::Rounds(vec![micro_batch(&tokens, [0.0; 2])]), &closing).0
    };
    let [forward, backward] = passes(2.0, [0.0; 2], Recompute::None);
    // Of the first of three layers at least, and all of them once the last layer's are there.
    assert_near(step(3.0, [2.0; 2]), forward + backward + 1.0);
    assert_near(step(1e3, [2.0; 2]), forward + backward / 3.0 + 1e3);
    // A rank that is done sooner does not keep the others from hiding them.
    assert_near(step(3.0, [2.0, 0.0]), forward + backward + 1.0);
    // New weights: those of the first layer, after the optimizer.
    let closing =
        Closing { weights: 3.0, optimizer: 2.0, costs: Costs { head: 0.0, ..COSTS }, ..closing(2, 1) };
    let (seconds, accounts) = check(&Program::Rounds(vec![micro_batch(&[2.0; 2], [0.0; 2])]), &closing);
    assert_near(seconds, forward + backward + 2.0 + 1.0);
    assert_near(accounts[0].gradients, 1.0);
}
