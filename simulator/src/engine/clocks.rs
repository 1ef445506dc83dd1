//! Queues and links: when each is free, and what passes through.

use super::account::Account;
use super::trace::{Doing, Trace, Traced};
use crate::phase::{Exchange, Senders};

/// What links carry.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Links {
    /// Bytes a second each way, within a node and between nodes.
    pub(crate) bytes_per_second: [f64; 2],
    pub(crate) latency_seconds: [f64; 2],
}

/// When something is there, and when whoever it comes from was done with computing it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Arrival {
    pub(crate) at: f64,
    pub(crate) made: f64,
}

/// How a wait is accounted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Until its makers are done others still compute, after that bytes are on their way.
    Attention,
    /// For another stage.
    Stage,
}

/// All devices of a step.
#[derive(Clone, Debug)]
pub(crate) struct Clocks {
    links: Links,
    compute: Vec<f64>,
    out: Vec<[f64; 2]>,
    into: Vec<[f64; 2]>,
    pub(crate) accounts: Vec<Account>,
    /// Bytes that each device has sent.
    pub(crate) carried: Vec<[f64; 2]>,
    pub(crate) trace: Trace,
}

/// Something to compute on one device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operation {
    pub(crate) device: usize,
    pub(crate) input: Arrival,
    pub(crate) wait: Wait,
    pub(crate) doing: Doing,
    pub(crate) nano: u8,
    /// Seconds of the device.
    pub(crate) seconds: f64,
    /// The last of them that need the input; those before can start without.
    pub(crate) waits: f64,
}

impl Clocks {
    pub(crate) fn new(devices: usize, links: Links, trace: Trace) -> Clocks {
        Clocks {
            links,
            compute: vec![0.0; devices],
            out: vec![[0.0; 2]; devices],
            into: vec![[0.0; 2]; devices],
            accounts: vec![Account::default(); devices],
            carried: vec![[0.0; 2]; devices],
            trace,
        }
    }

    /// When a device has computed all that it was given so far.
    pub(crate) fn free(&self, device: usize) -> f64 {
        self.compute[device]
    }

    /// Puts something on a device's queue; returns when it is done. What it computed is accounted for by the caller.
    pub(crate) fn compute(&mut self, operation: Operation) -> f64 {
        let Operation { device, input, wait, doing, nano, seconds, waits } = operation;
        let free = self.compute[device];
        let early = seconds * (1.0 - waits);
        let end = (free + seconds).max(input.at.max(free) + seconds - early);
        let gap = (end - free - seconds).max(0.0);
        let account = &mut self.accounts[device];
        match wait {
            Wait::Stage => account.bubble += gap,
            Wait::Attention => {
                let others = (input.made.min(input.at) - free).clamp(0.0, gap);
                account.imbalance += others;
                account.exposed += gap - others;
            }
        }
        self.trace.add(Traced { device: device as u32, nano, doing, start: end - seconds, end });
        self.compute[device] = end;
        end
    }

    /// Sends what `exchange` says among the devices from `first` on, each once it is `ready`; returns when each has
    /// received everything. A device that receives nothing, and waits for nobody, has it when it is ready.
    pub(crate) fn exchange(&mut self, first: usize, exchange: &Exchange, ready: &[f64]) -> Vec<Arrival> {
        let devices = ready.len();
        let mut sent = vec![0.0; devices];
        for (n, sent) in sent.iter_mut().enumerate() {
            let (device, mut last) = (first + n, ready[n]);
            for link in 0..2 {
                let bytes = exchange.sends.get(n).map_or(0.0, |bytes| bytes[link]);
                if bytes > 0.0 {
                    let end = self.out[device][link].max(ready[n])
                        + bytes * exchange.drag / self.links.bytes_per_second[link];
                    self.out[device][link] = end;
                    self.carried[device][link] += bytes;
                    last = last.max(end);
                }
            }
            *sent = last;
        }
        let (mut all, mut groups) = (None, Vec::new());
        match &exchange.senders {
            Senders::All => {
                all = Some(Waited::for_all((0..devices as u32).collect::<Vec<_>>().as_slice(), ready, &sent))
            }
            Senders::Groups(members) => {
                groups = vec![None; devices];
                for group in members {
                    let waited = Waited::for_all(group, ready, &sent);
                    group.iter().for_each(|&n| groups[n as usize] = Some(waited));
                }
            }
            Senders::Nobody | Senders::Each { .. } => {}
        }
        let waited = |n: usize| match &exchange.senders {
            Senders::Nobody => None,
            Senders::Each { borders, senders } => {
                let of = &senders[borders[n] as usize..borders[n + 1] as usize];
                (!of.is_empty()).then(|| Waited::for_all(of, ready, &sent))
            }
            Senders::Groups(_) => groups[n],
            Senders::All => all,
        };
        let mut arrivals: Vec<Arrival> =
            ready.iter().map(|&ready| Arrival { at: ready, made: ready }).collect();
        for (n, arrival) in arrivals.iter_mut().enumerate() {
            let Some(waited) = waited(n) else { continue };
            let (device, mut last, mut latency) = (first + n, waited.sent, 0.0f64);
            for link in 0..2 {
                let bytes = exchange.receives.get(n).map_or(0.0, |bytes| bytes[link]);
                if bytes > 0.0 {
                    let end = self.into[device][link].max(waited.first)
                        + bytes * exchange.drag / self.links.bytes_per_second[link];
                    self.into[device][link] = end;
                    last = last.max(end);
                    latency = latency.max(self.links.latency_seconds[link]);
                }
            }
            let at = (last + latency).max(ready[n]);
            self.trace.add(Traced {
                device: device as u32,
                nano: 0,
                doing: Doing::Transfer,
                start: waited.first,
                end: at,
            });
            *arrival = Arrival { at, made: waited.ready.max(ready[n]) };
        }
        if matches!(exchange.senders, Senders::All) {
            let last = arrivals.iter().map(|arrival| arrival.at).fold(0.0, f64::max);
            arrivals.iter_mut().for_each(|arrival| arrival.at = last);
        }
        arrivals
    }

    /// Sends something to one device of another stage, once it is ready; returns when it is there. Only the sender's link
    /// is in use: receivers have it when they ask for it, in an order of their own.
    pub(crate) fn send(&mut self, from: usize, link: usize, bytes: f64, ready: f64) -> Arrival {
        if bytes <= 0.0 {
            return Arrival { at: ready, made: ready };
        }
        let end = self.out[from][link].max(ready) + bytes / self.links.bytes_per_second[link];
        self.out[from][link] = end;
        self.carried[from][link] += bytes;
        Arrival { at: end + self.links.latency_seconds[link], made: ready }
    }

    /// Lets time pass on a device until `until`, by the way that `account` accounts for it.
    pub(crate) fn pass(&mut self, device: usize, until: f64, account: impl FnOnce(&mut Account, f64)) {
        let gap = until - self.compute[device];
        if gap > 0.0 {
            account(&mut self.accounts[device], gap);
            self.compute[device] = until;
        }
    }
}

/// Of those that somebody waits for.
#[derive(Clone, Copy, Debug)]
struct Waited {
    /// When the first of them was ready.
    first: f64,
    /// When the last was.
    ready: f64,
    /// When the last had sent.
    sent: f64,
}

impl Waited {
    fn for_all(devices: &[u32], ready: &[f64], sent: &[f64]) -> Waited {
        let none = Waited { first: f64::INFINITY, ready: 0.0, sent: 0.0 };
        devices.iter().fold(none, |waited, &n| Waited {
            first: waited.first.min(ready[n as usize]),
            ready: waited.ready.max(ready[n as usize]),
            sent: waited.sent.max(sent[n as usize]),
        })
    }
}
