//! When a job can start: which servers it may use, and its slots.

use std::collections::BTreeMap;
use std::sync::Arc;

use outboard_planner::{MIN_LINK, Rates, Slot};
use outboard_proto::ErrorKind;

use crate::Error;
use crate::pool::Candidate;
use crate::server::{ServerId, ServerSpec};
use crate::terms::{Placement, Terms};
use crate::text::{listed, ranks, servers};

/// Most slots of a job.
pub(crate) const MAX_SLOTS: usize = 1 << 16;

/// One unit of a job's planned parallelism, as declared when the job starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlotSpec {
    /// The rank it belongs to, for an in-place slot.
    pub rank: Option<u32>,
    /// Relative compute rate, above zero.
    pub weight: f64,
    /// Bytes it may hold; 0 means no limit declared.
    pub memory_bytes: u64,
    /// Bytes per second of its link, each way; 0 means not declared: as many as the job's rates say, or without these as
    /// the fastest link that is declared.
    pub bytes_per_second: f64,
}

impl SlotSpec {
    /// A slot of weight 1 that declares nothing else.
    pub fn of(rank: Option<u32>) -> SlotSpec {
        SlotSpec { rank, weight: 1.0, memory_bytes: 0, bytes_per_second: 0.0 }
    }

    /// The slot as the planner takes it, where a link of 1 carries so many bytes a second.
    fn planned(&self, unit: f64) -> Slot {
        // A link that is slower or faster yet makes no other plan.
        let relative = (self.bytes_per_second / unit).clamp(MIN_LINK, 1.0 / MIN_LINK);
        let link = if self.bytes_per_second > 0.0 { relative } else { 1.0 };
        // What a server has no room for waits to be sent, so its memory is no part of the plan.
        Slot { rank: self.rank, weight: self.weight, link, memory: None }
    }
}

/// What a job runs with, fixed when it starts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Footing {
    /// Its slots.
    pub(crate) slots: Vec<SlotSpec>,
    /// How fast they compute and carry, where the job declares it.
    pub(crate) rates: Option<Rates>,
    /// How its tokens may be placed, where it declares that.
    pub(crate) placement: Option<Placement>,
    /// The numerics id of its servers for its element type.
    pub(crate) numerics_id: String,
    /// The servers in place at its ranks.
    pub(crate) in_place: BTreeMap<u32, ServerId>,
    /// Servers of the pool that it does not use, and why, for people.
    pub(crate) left_out: Vec<String>,
}

/// Whether a job can start.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Readiness {
    /// It can.
    Ready(Footing),
    /// Not yet: what is missing, for people.
    Waiting(String),
    /// Never with these servers.
    Refused(Error),
}

impl Footing {
    /// The slots as the planner takes them. Without rates links are relative to the fastest that is declared.
    pub(crate) fn planned_slots(&self) -> Vec<Slot> {
        let fastest = || self.slots.iter().map(|slot| slot.bytes_per_second).fold(0.0, f64::max);
        let unit = self.rates.map_or_else(fastest, |rates| rates.bytes_per_second);
        self.slots.iter().map(|slot| slot.planned(unit)).collect()
    }
}

impl Terms {
    /// Whether the job can start on these servers, all of which take its tasks.
    pub(crate) fn readiness(&self, candidates: &[Candidate]) -> Readiness {
        let mut left_out = Vec::new();
        // Of a server that is not unsuited, and so computes the element type.
        let id_of =
            |server: &Candidate| server.1.numerics_id(self.geometry.dtype()).unwrap_or_default().to_owned();
        let mut in_place: BTreeMap<u32, &Candidate> = BTreeMap::new();
        let mut dedicated: Vec<&Candidate> = Vec::new();
        for server in candidates {
            let rank = server.1.in_place.as_ref().map(|place| place.rank);
            match (rank, server.1.unsuited_for(&self.geometry)) {
                (Some(rank), Some(why)) => {
                    return self
                        .refused(format!("the in-place server of rank {rank} ({}) {why}", server.1.address));
                }
                (Some(rank), None) if rank < self.ranks => drop(in_place.insert(rank, server)),
                (Some(rank), None) => left_out.push(note(server, &format!("is in place at rank {rank}"))),
                (None, Some(why)) => left_out.push(note(server, &why)),
                (None, None) => dedicated.push(server),
            }
        }
        let ids: BTreeMap<String, u32> = in_place.iter().map(|(&rank, s)| (id_of(s), rank)).collect();
        if ids.len() > 1 {
            let ids = listed(ids.iter().map(|(id, rank)| format!("{id} at rank {rank}")));
            return self.refused(format!(
                "its in-place servers have different numerics ids ({ids}); run all ranks on equal machines"
            ));
        }
        let numerics_id = match ids.keys().next() {
            Some(id) => id.clone(),
            None => most_common(dedicated.iter().map(|server| id_of(server))),
        };
        dedicated.retain(|server| {
            let id = id_of(server);
            let same = id == numerics_id;
            if !same {
                left_out.push(note(server, &format!("has numerics id {id}, the job {numerics_id}")));
            }
            same
        });
        if let Some(missing) = self.missing(&in_place, dedicated.len()) {
            let notes = if left_out.is_empty() {
                String::new()
            } else {
                format!("; not used: {}", listed(&left_out))
            };
            return Readiness::Waiting(format!("{missing}{notes}"));
        }
        let slots = if self.slots.is_empty() {
            let ranks = in_place.keys().map(|&rank| SlotSpec::of(Some(rank)));
            ranks.chain(dedicated.iter().map(|_| SlotSpec::of(None))).take(MAX_SLOTS).collect()
        } else {
            self.slots.clone()
        };
        let in_place = in_place.into_iter().map(|(rank, server)| (rank, server.0)).collect();
        let Terms { rates, placement, .. } = *self;
        Readiness::Ready(Footing { slots, rates, placement, numerics_id, in_place, left_out })
    }

    /// Which servers are missing, for people.
    fn missing(&self, in_place: &BTreeMap<u32, &Candidate>, dedicated: usize) -> Option<String> {
        let (needed, found) = (self.min_servers.max(1) as usize, in_place.len() + dedicated);
        if found < needed {
            return Some(format!("{} that it can use in the pool, {needed} needed", servers(found)));
        }
        let absent: Vec<u32> = self
            .slots
            .iter()
            .filter_map(|slot| slot.rank)
            .filter(|rank| !in_place.contains_key(rank))
            .collect();
        if !absent.is_empty() {
            return Some(format!("no in-place server of {} in the pool", ranks(&absent)));
        }
        let wants_dedicated = self.slots.iter().any(|slot| slot.rank.is_none());
        (wants_dedicated && dedicated == 0).then(|| "no dedicated server in the pool".to_owned())
    }

    fn refused(&self, what: String) -> Readiness {
        Readiness::Refused(Error::new(ErrorKind::Unsupported, format!("job {}: {what}", self.job)))
    }
}

/// The id that comes most often; of several, the least in alphabetical order.
fn most_common(ids: impl Iterator<Item = String>) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    ids.for_each(|id| *counts.entry(id).or_default() += 1);
    let best = counts.into_iter().rev().max_by_key(|&(_, count)| count);
    best.map_or_else(String::new, |(id, _)| id)
}

fn note((id, spec): &(ServerId, Arc<ServerSpec>), why: &str) -> String {
    format!("server {id} at {} {why}", spec.address)
}

#[cfg(test)]
mod tests {
    use outboard_attention::{DType, HeadGeometry};

    use super::*;
    use crate::server::InPlace;

    fn terms(ranks: u32, slots: Vec<SlotSpec>, min_servers: u32) -> Terms {
        let geometry = HeadGeometry::standard(8, 2, 64).unwrap();
        Terms { job: "job".into(), ranks, geometry, slots, min_servers, rates: None, placement: None }
    }

    fn rates(flops_per_second: f64, bytes_per_second: f64) -> Option<Rates> {
        Some(Rates { flops_per_second, bytes_per_second })
    }

    #[test]
    fn links_are_planned_beside_the_rates_or_else_the_fastest() {
        let links = |declared: &[f64], rates| {
            let slot = |&bytes_per_second| SlotSpec { bytes_per_second, ..SlotSpec::of(None) };
            let terms = Terms { rates, ..terms(1, declared.iter().map(slot).collect(), 0) };
            terms.check().unwrap();
            let footing = ready(&terms, &[server(1, None, "a")]);
            assert_eq!(footing.rates, rates);
            footing.planned_slots().iter().map(|slot| slot.link).collect::<Vec<_>>()
        };
        assert_eq!(links(&[1e10, 2.5e9, 0.0, 1.0], None), [1.0, 0.25, 1.0, MIN_LINK]);
        assert_eq!(links(&[0.0, 0.0], None), [1.0, 1.0]);
        let declared = [1e10, 2.5e9, 0.0, 1.0, f64::MAX];
        assert_eq!(links(&declared, rates(1e12, 5e9)), [2.0, 0.5, 1.0, MIN_LINK, 1.0 / MIN_LINK]);
        assert_eq!(links(&[0.0, 1.0], rates(1e12, 5e-324)), [1.0, 1.0 / MIN_LINK]);
    }

    fn server(id: u64, rank: Option<u32>, numerics_id: &str) -> Candidate {
        let spec = ServerSpec {
            host: String::new(),
            address: format!("host:{id}"),
            socket: String::new(),
            device: "cpu".into(),
            memory_bytes: 1,
            numerics: BTreeMap::from([(DType::F32, numerics_id.into())]),
            max_head_dim: 128,
            in_place: rank.map(|rank| InPlace { job: "job".into(), rank }),
        };
        (ServerId(id), Arc::new(spec))
    }

    fn ready(terms: &Terms, servers: &[Candidate]) -> Footing {
        match terms.readiness(servers) {
            Readiness::Ready(footing) => footing,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn one_slot_a_server_ranks_first() {
        let servers =
            [server(1, None, "a"), server(2, Some(1), "a"), server(3, Some(0), "a"), server(4, None, "a")];
        let footing = ready(&terms(2, Vec::new(), 0), &servers);
        let ranks: Vec<_> = footing.slots.iter().map(|slot| slot.rank).collect();
        assert_eq!(ranks, [Some(0), Some(1), None, None]);
        assert_eq!(footing.in_place, BTreeMap::from([(0, ServerId(3)), (1, ServerId(2))]));
        assert!(footing.left_out.is_empty());
    }

    #[test]
    fn the_numerics_id_of_most_servers_wins_and_others_are_named() {
        let servers = [server(1, None, "b"), server(2, None, "a"), server(3, None, "b")];
        let footing = ready(&terms(1, Vec::new(), 0), &servers);
        assert_eq!((footing.numerics_id.as_str(), footing.slots.len()), ("b", 2));
        assert!(
            footing.left_out[0].contains("server 2 at host:2 has numerics id a, the job b"),
            "{footing:?}"
        );
        // Of equally many, the least.
        assert_eq!(ready(&terms(1, Vec::new(), 0), &servers[..2]).numerics_id, "a");
        // In-place servers have no choice.
        let servers = [server(1, Some(0), "a"), server(2, None, "b"), server(3, None, "b")];
        assert_eq!(ready(&terms(1, Vec::new(), 0), &servers).numerics_id, "a");
    }

    #[test]
    fn what_is_missing_is_named() {
        let waiting = |terms: Terms, servers: &[Candidate], what: &str| match terms.readiness(servers) {
            Readiness::Waiting(message) => assert!(message.contains(what), "{message}"),
            other => panic!("{other:?}"),
        };
        waiting(terms(1, Vec::new(), 0), &[], "0 servers that it can use in the pool, 1 needed");
        let two = [server(1, None, "a"), server(2, None, "b")];
        waiting(
            terms(1, Vec::new(), 2),
            &two,
            "1 server that it can use in the pool, 2 needed; not used: server 2",
        );
        waiting(terms(2, vec![SlotSpec::of(Some(1))], 0), &two[..1], "no in-place server of rank 1");
        waiting(terms(2, vec![SlotSpec::of(None)], 0), &[server(1, Some(0), "a")], "no dedicated server");
    }

    #[test]
    fn servers_that_cannot_serve_in_place_are_refused() {
        let refused = |terms: Terms, servers: &[Candidate], what: &str| match terms.readiness(servers) {
            Readiness::Refused(error) => assert!(error.message.contains(what), "{error}"),
            other => panic!("{other:?}"),
        };
        let servers = [server(1, Some(0), "a"), server(2, Some(1), "b")];
        refused(terms(2, Vec::new(), 0), &servers, "a at rank 0, b at rank 1");
        let wide = Terms { geometry: HeadGeometry::standard(8, 2, 256).unwrap(), ..terms(2, Vec::new(), 0) };
        refused(wide, &servers, "computes head dims up to 128, the job has 256");
        let bf16 = Terms {
            geometry: terms(2, Vec::new(), 0).geometry.with_dtype(DType::Bf16),
            ..terms(2, Vec::new(), 0)
        };
        refused(bf16, &servers, "the in-place server of rank 0 (host:1) does not compute bf16, only f32");
    }

    #[test]
    fn a_job_runs_on_servers_that_agree_on_its_own_element_type() {
        let computes = |id: u64, numerics: &[(DType, &str)]| {
            let (server, spec) = server(id, None, "");
            let numerics = numerics.iter().map(|&(dtype, id)| (dtype, id.to_owned())).collect();
            (server, Arc::new(ServerSpec { numerics, ..(*spec).clone() }))
        };
        // As machines with and without a dot product of bf16 pairs.
        let servers = [
            computes(1, &[(DType::F32, "a"), (DType::Bf16, "b")]),
            computes(2, &[(DType::F32, "a"), (DType::Bf16, "c")]),
            computes(3, &[(DType::F32, "a")]),
            computes(4, &[(DType::F32, "a"), (DType::Bf16, "c")]),
        ];
        let of = |dtype| {
            let terms = terms(1, Vec::new(), 0);
            Terms { geometry: terms.geometry.with_dtype(dtype), ..terms }
        };
        let footing = ready(&of(DType::F32), &servers);
        assert_eq!((footing.numerics_id.as_str(), footing.slots.len()), ("a", 4));
        let footing = ready(&of(DType::Bf16), &servers);
        assert_eq!((footing.numerics_id.as_str(), footing.slots.len()), ("c", 2));
        let left_out = [
            "server 3 at host:3 does not compute bf16, only f32",
            "server 1 at host:1 has numerics id b, the job c",
        ];
        assert_eq!(footing.left_out, left_out);
        match of(DType::F16).readiness(&servers) {
            Readiness::Waiting(message) => assert!(
                message.contains("0 servers that it can use")
                    && message.contains("does not compute f16, only f32, bf16"),
                "{message}"
            ),
            other => panic!("{other:?}"),
        }
    }
}
