//! The ranks of a job that have joined before it starts. Pure; time comes in.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use outboard_proto::ErrorKind;

use crate::Error;
use crate::job::JobId;
use crate::slots::SlotSpec;
use crate::terms::RankSpec;
use crate::text::ranks;
use crate::verdict::{Awaited, Verdict};

/// A run that has all its ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct Joined {
    /// Names the run in later calls.
    pub job: JobId,
    /// Its slots.
    pub slots: Vec<SlotSpec>,
    /// The numerics id of its servers for its element type.
    pub numerics_id: String,
    /// Where the home service of each rank listens, in rank order; none without placement.
    pub home_addresses: Vec<String>,
}

/// Waits for ranks and servers.
#[derive(Debug)]
pub(crate) struct Gathering {
    ranks: u32,
    /// The home address of each rank that has joined.
    joined: BTreeMap<u32, String>,
    since: Instant,
    verdict: Verdict<Joined>,
}

impl Gathering {
    /// Nobody has joined yet.
    pub(crate) fn new(ranks: u32, now: Instant) -> Gathering {
        Gathering { ranks, joined: BTreeMap::new(), since: now, verdict: Verdict::new() }
    }

    /// When it began.
    pub(crate) fn since(&self) -> Instant {
        self.since
    }

    /// True when nobody has joined.
    pub(crate) fn is_empty(&self) -> bool {
        self.joined.is_empty()
    }

    /// True when all ranks have joined.
    pub(crate) fn is_complete(&self) -> bool {
        self.joined.len() == self.ranks as usize
    }

    /// Adds a rank.
    pub(crate) fn join(
        &mut self,
        RankSpec { rank, home_address }: &RankSpec,
    ) -> Result<Awaited<Joined>, Error> {
        if self.joined.contains_key(rank) {
            let message = format!("rank {rank} has joined already; start each rank once");
            return Err(Error::invalid(message));
        }
        self.joined.insert(*rank, home_address.clone());
        Ok(self.verdict.awaited())
    }

    /// Takes a rank back.
    pub(crate) fn unjoin(&mut self, rank: u32) {
        self.joined.remove(&rank);
    }

    /// Answers all who wait.
    pub(crate) fn give(&self, answer: Result<Joined, Error>) {
        self.verdict.give(answer.map(Arc::new));
    }

    /// The home addresses in rank order.
    pub(crate) fn addresses(&self) -> Vec<String> {
        self.joined.values().cloned().collect()
    }

    /// The error that names the ranks that did not join in so many seconds.
    pub(crate) fn incomplete(&self, seconds: f64) -> Error {
        let missing: Vec<u32> = (0..self.ranks).filter(|rank| !self.joined.contains_key(rank)).collect();
        let message = format!(
            "{} of {} did not join within {seconds:.1} s; see whether all were started",
            ranks(&missing),
            self.ranks
        );
        Error::new(ErrorKind::Aborted, message)
    }

    /// The error that names two ranks with one home address: whoever asks there for keys may get the other's.
    pub(crate) fn shared_address(&self) -> Option<Error> {
        let mut of_address: BTreeMap<&str, u32> = BTreeMap::new();
        let given = self.joined.iter().filter(|(_, address)| !address.is_empty());
        given.into_iter().find_map(|(&rank, address)| {
            let first = of_address.insert(address, rank)?;
            let message = format!(
                "ranks {first} and {rank} both have home_address {address}; give each its own, as the other ranks reach it"
            );
            Some(Error::invalid(message))
        })
    }
}
