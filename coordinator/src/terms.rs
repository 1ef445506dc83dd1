//! What ranks say when they join.

use std::collections::BTreeMap;

use outboard_attention::HeadGeometry;
use outboard_planner::Rates;

use crate::slots::{MAX_SLOTS, SlotSpec};
use crate::text::{check_address, check_name};
use crate::{Error, MAX_RANKS};

/// How the planner may place the tokens of documents that come without homes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Placement {
    /// How far above the mean of its tick the tokens of a rank may lie, as a fraction of it: 0 to 1.
    pub token_slack: f64,
}

/// What a rank says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankSpec {
    /// The rank.
    pub rank: u32,
    /// Where its home service listens, `host:port`; empty in a job without placement.
    pub home_address: String,
}

/// What all ranks of a job must say alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Terms {
    /// The job's name.
    pub job: String,
    /// How many ranks it has.
    pub ranks: u32,
    /// Heads of its layers.
    pub geometry: HeadGeometry,
    /// Its slots; none means one slot a server then in the pool.
    pub slots: Vec<SlotSpec>,
    /// Servers that must be in the pool before it starts; 0 means 1.
    pub min_servers: u32,
    /// FLOPs a second of a slot of weight 1, and bytes a second of the link of a slot that declares none, as declared and
    /// never measured. With them steps are planned for the least layer time, and without for balance.
    pub rates: Option<Rates>,
    /// Given when documents may come without homes, which the planner then chooses. Without, every document comes with
    /// its one home.
    pub placement: Option<Placement>,
}

impl RankSpec {
    /// A rank of a job without placement.
    pub fn of(rank: u32) -> RankSpec {
        RankSpec { rank, home_address: String::new() }
    }

    /// Checks that the rank can be part of a job of these terms.
    ///
    /// # Errors
    /// An error of kind `Invalid` that names job, rank, field and value.
    pub fn check(&self, terms: &Terms) -> Result<(), Error> {
        let Terms { job, ranks, placement, .. } = terms;
        let RankSpec { rank, home_address } = self;
        if rank >= ranks {
            return Err(Error::invalid(format!("rank is {rank}; job {job} has {ranks} ranks")));
        }
        let checked = match placement {
            Some(_) if home_address.is_empty() => Err(Error::invalid(
                "home_address is empty; a job with placement needs where the rank's HomeService listens, host:port",
            )),
            Some(_) => check_address("home_address", home_address),
            None if home_address.is_empty() => Ok(()),
            None => Err(Error::invalid(format!(
                "home_address is {home_address:?} and placement missing; give both, or neither"
            ))),
        };
        checked.map_err(|error| error.context(format_args!("job {job}, rank {rank}")))
    }
}

impl Terms {
    /// Checks one rank's terms by themselves.
    ///
    /// # Errors
    /// An error of kind `Invalid` that names the field and its value.
    pub fn check(&self) -> Result<(), Error> {
        check_name("job", &self.job)?;
        if !(1..=MAX_RANKS).contains(&self.ranks) {
            return Err(Error::invalid(format!(
                "ranks is {}; it must be between 1 and {MAX_RANKS}",
                self.ranks
            )));
        }
        self.check_rates()?;
        match self.placement {
            Some(Placement { token_slack }) if !(0.0..=1.0).contains(&token_slack) => {
                let message = format!("placement.token_slack is {token_slack}; it must be between 0 and 1");
                Err(Error::invalid(message))
            }
            _ => self.check_slots(),
        }
    }

    fn check_rates(&self) -> Result<(), Error> {
        let Some(Rates { flops_per_second, bytes_per_second }) = self.rates else { return Ok(()) };
        let rates = [("flops_per_second", flops_per_second), ("bytes_per_second", bytes_per_second)];
        match rates.into_iter().find(|(_, rate)| !(rate.is_finite() && *rate > 0.0)) {
            Some((name, rate)) => {
                Err(Error::invalid(format!("rates.{name} is {rate}; it must be finite and above zero")))
            }
            None => Ok(()),
        }
    }

    fn check_slots(&self) -> Result<(), Error> {
        if self.slots.len() > MAX_SLOTS {
            return Err(Error::invalid(format!(
                "slots holds {} entries; at most {MAX_SLOTS} fit",
                self.slots.len()
            )));
        }
        let mut of_rank = BTreeMap::new();
        for (n, slot) in self.slots.iter().enumerate() {
            let SlotSpec { rank, weight, bytes_per_second, .. } = *slot;
            if !(weight.is_finite() && weight > 0.0) {
                return Err(Error::invalid(format!(
                    "slots[{n}].weight is {weight}; it must be finite and above zero"
                )));
            }
            if !(bytes_per_second.is_finite() && bytes_per_second >= 0.0) {
                let message = format!(
                    "slots[{n}].bytes_per_second is {bytes_per_second}; it must be finite and not below 0"
                );
                return Err(Error::invalid(message));
            }
            let Some(rank) = rank else { continue };
            if rank >= self.ranks {
                return Err(Error::invalid(format!(
                    "slots[{n}].rank is {rank}; the job has {} ranks",
                    self.ranks
                )));
            }
            if let Some(first) = of_rank.insert(rank, n) {
                let message = format!(
                    "slots[{first}].rank and slots[{n}].rank are both {rank}; a rank has one in-place slot"
                );
                return Err(Error::invalid(message));
            }
        }
        Ok(())
    }

    /// Checks that another rank's terms are the same.
    pub(crate) fn check_same(&self, other: &Terms, rank: u32) -> Result<(), Error> {
        let differs = |field: &str, here: String, there: String| {
            let message = format!(
                "job {}: rank {rank} joins with {field} {there}, ranks before it with {here}; all ranks must say the same",
                self.job
            );
            Err(Error::invalid(message))
        };
        if self.ranks != other.ranks {
            return differs("ranks", self.ranks.to_string(), other.ranks.to_string());
        }
        if self.geometry != other.geometry {
            return differs(
                "geometry",
                format!("{:?}", self.geometry.shape()),
                format!("{:?}", other.geometry.shape()),
            );
        }
        if self.min_servers != other.min_servers {
            return differs("min_servers", self.min_servers.to_string(), other.min_servers.to_string());
        }
        if self.rates != other.rates {
            return differs("rates", rates_in_words(self.rates), rates_in_words(other.rates));
        }
        if self.placement != other.placement {
            let [here, there] = [self, other].map(|terms| placement_in_words(terms.placement));
            let advice = "give all of them the same token_slack, or none";
            return differs("placement", here, there)
                .map_err(|error| Error::invalid(format!("{error}: {advice}")));
        }
        if self.slots.len() != other.slots.len() {
            return differs("slots (how many)", self.slots.len().to_string(), other.slots.len().to_string());
        }
        match self.slots.iter().zip(&other.slots).position(|(a, b)| a != b) {
            Some(n) => differs(
                &format!("slots[{n}]"),
                format!("{:?}", self.slots[n]),
                format!("{:?}", other.slots[n]),
            ),
            None => Ok(()),
        }
    }
}

fn rates_in_words(rates: Option<Rates>) -> String {
    rates.map_or("none".into(), |Rates { flops_per_second, bytes_per_second }| {
        format!("of {flops_per_second} FLOP/s and {bytes_per_second} bytes/s")
    })
}

fn placement_in_words(placement: Option<Placement>) -> String {
    placement.map_or("none".into(), |Placement { token_slack }| format!("token_slack {token_slack}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms(ranks: u32, slots: Vec<SlotSpec>) -> Terms {
        let geometry = HeadGeometry::standard(8, 2, 64).unwrap();
        Terms { job: "job".into(), ranks, geometry, slots, min_servers: 0, rates: None, placement: None }
    }

    fn placing(token_slack: f64) -> Terms {
        Terms { placement: Some(Placement { token_slack }), ..terms(2, Vec::new()) }
    }

    #[test]
    fn bad_terms_are_refused_by_field() {
        let slot = SlotSpec::of(None);
        let with_rates = |flops_per_second, bytes_per_second| Terms {
            rates: Some(Rates { flops_per_second, bytes_per_second }),
            ..terms(1, Vec::new())
        };
        let cases = [
            ("job is empty", Terms { job: String::new(), ..terms(1, Vec::new()) }),
            ("ranks is 0", terms(0, Vec::new())),
            ("slots[1].weight is NaN", terms(1, vec![slot, SlotSpec { weight: f64::NAN, ..slot }])),
            ("slots[0].weight is 0", terms(1, vec![SlotSpec { weight: 0.0, ..slot }])),
            ("slots[0].rank is 1", terms(1, vec![SlotSpec::of(Some(1))])),
            ("slots[0].rank and slots[1].rank", terms(1, vec![SlotSpec::of(Some(0)); 2])),
            ("slots[0].bytes_per_second", terms(1, vec![SlotSpec { bytes_per_second: -1.0, ..slot }])),
            ("rates.flops_per_second is NaN", with_rates(f64::NAN, 1.0)),
            ("rates.flops_per_second is 0", with_rates(0.0, 1.0)),
            ("rates.flops_per_second is -1", with_rates(-1.0, f64::NAN)),
            ("rates.bytes_per_second is inf", with_rates(1.0, f64::INFINITY)),
            ("rates.bytes_per_second is -0", with_rates(1.0, -0.0)),
            ("placement.token_slack is -0.1; it must be between 0 and 1", placing(-0.1)),
            ("placement.token_slack is 1.5", placing(1.5)),
            ("placement.token_slack is NaN", placing(f64::NAN)),
            ("placement.token_slack is inf", placing(f64::INFINITY)),
        ];
        for (what, terms) in cases {
            let error = terms.check().unwrap_err();
            assert!(error.message.contains(what), "{what}: {error}");
        }
        for slack in [0.0, 1.0] {
            placing(slack).check().unwrap();
        }
    }

    #[test]
    fn a_home_address_comes_with_placement_and_only_then() {
        let check = |terms: &Terms, rank, address: &str| {
            RankSpec { rank, home_address: address.into() }.check(terms).map_err(|error| error.message)
        };
        assert_eq!(check(&placing(0.0), 1, "host:7"), Ok(()));
        assert_eq!(check(&placing(0.0), 1, "[::1]:7"), Ok(()));
        assert_eq!(check(&terms(2, Vec::new()), 1, ""), Ok(()));
        let long = format!("{}:7", "h".repeat(300));
        for (terms, address, what) in [
            (placing(0.0), "", "job job, rank 1: home_address is empty; a job with placement needs"),
            (placing(0.0), "host", "home_address is \"host\"; it must be host:port"),
            (placing(0.0), ":7", "home_address is \":7\"; it must be host:port"),
            (placing(0.0), "host:0", "with a port above 0"),
            (placing(0.0), &*long, "home_address is 302 bytes long; at most 256"),
            (placing(0.0), "ho\nst:7", "control characters"),
            (
                terms(2, Vec::new()),
                "host:7",
                "job job, rank 1: home_address is \"host:7\" and placement missing; give both, or neither",
            ),
        ] {
            let message = check(&terms, 1, address).unwrap_err();
            assert!(message.contains(what), "{what}: {message}");
        }
        assert!(check(&placing(0.0), 2, "host:7").unwrap_err().contains("rank is 2; job job has 2 ranks"));
    }
}
