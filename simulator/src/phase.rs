//! What devices do in each layer of a stage: the common language of policies and the engine.

use std::collections::BTreeMap;

/// One micro-batch on the devices that work on it, or all that the stages of a pipeline work on at one time, in every
/// layer the same. Devices are numbered from the first that takes part.
#[derive(Clone, Debug, Default)]
pub(crate) struct Phase {
    /// Nano-batches, one or two that take turns.
    pub(crate) nanos: Vec<Nano>,
}

/// A part of a micro-batch.
#[derive(Clone, Debug, Default)]
pub(crate) struct Nano {
    /// Tokens that each device holds.
    pub(crate) tokens: Vec<f64>,
    pub(crate) forward: Attend,
    pub(crate) backward: Attend,
}

/// Core attention of a nano-batch in one direction.
#[derive(Clone, Debug, Default)]
pub(crate) struct Attend {
    /// Seconds that each device computes it.
    pub(crate) seconds: Vec<f64>,
    /// Seconds that each device is busy with sending and receiving, besides.
    pub(crate) dispatch: Vec<f64>,
    /// What is sent to where it is computed.
    pub(crate) there: Exchange,
    /// What comes back.
    pub(crate) back: Exchange,
    /// The part of each device's computing that waits for the last of what is sent: 1 where nothing starts before all is
    /// there.
    pub(crate) waits: Vec<f64>,
}

/// Bytes among devices that travel at one time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Exchange {
    /// What each device sends to others of its node, and of other nodes.
    pub(crate) sends: Vec<[f64; 2]>,
    /// What each device receives.
    pub(crate) receives: Vec<[f64; 2]>,
    pub(crate) senders: Senders,
    /// How much longer its bytes take than others do.
    pub(crate) drag: f64,
}

/// Whom a device waits for before it has received everything.
#[derive(Clone, Debug, Default)]
pub(crate) enum Senders {
    /// Nobody.
    #[default]
    Nobody,
    /// Those that it receives from: of device `n` `senders[borders[n]..borders[n + 1]]`.
    Each { borders: Vec<u32>, senders: Vec<u32> },
    /// All of its group, those without one nobody.
    Groups(Vec<Vec<u32>>),
    /// All that take part.
    All,
}

/// Bytes from one device to another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Transfer {
    pub(crate) from: u32,
    pub(crate) to: u32,
    pub(crate) bytes: f64,
}

impl Exchange {
    /// Those transfers among `devices` devices. `near` says whether two of them are of one node.
    pub(crate) fn of(devices: usize, transfers: &[Transfer], near: impl Fn(u32, u32) -> bool) -> Exchange {
        let mut exchange = Exchange::idle(devices);
        let mut senders: BTreeMap<(u32, u32), ()> = BTreeMap::new();
        for &Transfer { from, to, bytes } in transfers {
            if from == to || bytes <= 0.0 {
                continue;
            }
            let link = usize::from(!near(from, to));
            exchange.sends[from as usize][link] += bytes;
            exchange.receives[to as usize][link] += bytes;
            senders.insert((to, from), ());
        }
        let mut borders = vec![0u32; devices + 1];
        for (to, _) in senders.keys() {
            borders[*to as usize + 1] += 1;
        }
        for n in 0..devices {
            borders[n + 1] += borders[n];
        }
        let senders: Vec<u32> = senders.into_keys().map(|(_, from)| from).collect();
        if !senders.is_empty() {
            exchange.senders = Senders::Each { borders, senders };
        }
        exchange
    }

    /// Everybody of each group sends `bytes(device)` to every other of it, as an all-gather along a ring does: each byte
    /// passes every device once.
    pub(crate) fn gather(
        devices: usize,
        groups: Vec<Vec<u32>>,
        bytes: impl Fn(u32) -> f64,
        near: impl Fn(u32, u32) -> bool,
    ) -> Exchange {
        let mut exchange = Exchange::idle(devices);
        for group in &groups {
            let total: f64 = group.iter().map(|&device| bytes(device)).sum();
            for (n, &device) in group.iter().enumerate() {
                let next = group[(n + 1) % group.len()];
                let previous = group[(n + group.len() - 1) % group.len()];
                // Along a ring, all but what the next one has itself goes out, and all but one's own comes in.
                let out = usize::from(!near(device, next));
                let into = usize::from(!near(previous, device));
                exchange.sends[device as usize][out] += total - bytes(next);
                exchange.receives[device as usize][into] += total - bytes(device);
            }
        }
        exchange.senders = Senders::Groups(groups);
        exchange
    }

    /// Everybody of each group sends `bytes(device, size of the group)` to every other of it, each its own.
    pub(crate) fn all_to_all(
        devices: usize,
        groups: Vec<Vec<u32>>,
        bytes: impl Fn(u32, usize) -> f64,
        near: impl Fn(u32, u32) -> bool,
    ) -> Exchange {
        let mut exchange = Exchange::idle(devices);
        for group in &groups {
            for &from in group {
                let bytes = bytes(from, group.len());
                for &to in group.iter().filter(|to| **to != from) {
                    let link = usize::from(!near(from, to));
                    exchange.sends[from as usize][link] += bytes;
                    exchange.receives[to as usize][link] += bytes;
                }
            }
        }
        exchange.senders = Senders::Groups(groups);
        exchange
    }

    /// Nothing among `devices` devices.
    pub(crate) fn idle(devices: usize) -> Exchange {
        Exchange {
            sends: vec![[0.0; 2]; devices],
            receives: vec![[0.0; 2]; devices],
            senders: Senders::Nobody,
            drag: 1.0,
        }
    }

    /// Bytes that a device sends and receives.
    pub(crate) fn moved(&self, device: usize) -> f64 {
        self.sent(device) + self.received(device)
    }

    /// Bytes that a device sends.
    pub(crate) fn sent(&self, device: usize) -> f64 {
        self.sends.get(device).map_or(0.0, |bytes| bytes[0] + bytes[1])
    }

    /// Bytes that a device receives.
    pub(crate) fn received(&self, device: usize) -> f64 {
        self.receives.get(device).map_or(0.0, |bytes| bytes[0] + bytes[1])
    }

    /// The same, but nobody goes on before everybody has everything.
    pub(crate) fn with_barrier(mut self) -> Exchange {
        self.senders = Senders::All;
        self
    }

    /// The same, whose bytes take `drag` times as long.
    pub(crate) fn dragged(mut self, drag: f64) -> Exchange {
        self.drag = drag;
        self
    }

    /// Both at one time.
    pub(crate) fn and(mut self, other: &Exchange) -> Exchange {
        for (sum, more) in [(&mut self.sends, &other.sends), (&mut self.receives, &other.receives)] {
            for (sum, more) in sum.iter_mut().zip(more) {
                sum[0] += more[0];
                sum[1] += more[1];
            }
        }
        self.drag = self.drag.max(other.drag);
        self.senders = match (self.senders, &other.senders) {
            (Senders::Nobody, senders) => senders.clone(),
            (senders, Senders::Nobody) => senders,
            (Senders::Groups(groups), Senders::Groups(others)) if groups == *others => {
                Senders::Groups(groups)
            }
            (
                Senders::Each { borders, senders },
                Senders::Each { borders: other_borders, senders: other_senders },
            ) => merged(&borders, &senders, other_borders, other_senders),
            _ => Senders::All,
        };
        self
    }
}

fn merged(borders: &[u32], senders: &[u32], other_borders: &[u32], other: &[u32]) -> Senders {
    let mut all = Vec::with_capacity(senders.len() + other.len());
    let mut ends = vec![0u32];
    for n in 0..borders.len().saturating_sub(1) {
        let of =
            |borders: &[u32], senders: &[u32]| senders[borders[n] as usize..borders[n + 1] as usize].to_vec();
        let mut both = of(borders, senders);
        both.extend(of(other_borders, other));
        both.sort_unstable();
        both.dedup();
        all.extend(both);
        ends.push(all.len() as u32);
    }
    Senders::Each { borders: ends, senders: all }
}

impl Nano {
    /// Bytes of a device's buffers that hold the most that it sends at one time, and the most that it receives.
    pub(crate) fn buffers(&self, device: usize) -> f64 {
        let (forward, backward) = (&self.forward, &self.backward);
        let exchanges = [&forward.there, &forward.back, &backward.there, &backward.back];
        let most = |bytes: fn(&Exchange, usize) -> f64| {
            exchanges.iter().map(|exchange| bytes(exchange, device)).fold(0.0, f64::max)
        };
        most(Exchange::sent) + most(Exchange::received)
    }
}

impl Attend {
    /// Attention that each device computes of what it has.
    pub(crate) fn local(seconds: Vec<f64>) -> Attend {
        let devices = seconds.len();
        Attend {
            seconds,
            dispatch: vec![0.0; devices],
            there: Exchange::idle(devices),
            back: Exchange::idle(devices),
            waits: vec![1.0; devices],
        }
    }
}

impl Phase {
    /// Devices that take part.
    pub(crate) fn devices(&self) -> usize {
        self.nanos.first().map_or(0, |nano| nano.tokens.len())
    }

    /// Tokens of a device, of all nano-batches.
    pub(crate) fn tokens_of(&self, device: usize) -> f64 {
        self.nanos.iter().map(|nano| nano.tokens.get(device).copied().unwrap_or(0.0)).sum()
    }
}
