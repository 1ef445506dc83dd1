//! What no plan does better: the fewest bytes of any that balances, and the least layer time of any at all.
//!
//! A slot whose home has more cells than it may compute gives the surplus away, and what others compute costs them rows
//! and keys. Only what must be true of every plan is used: who has a surplus, who has room, how long documents are, and
//! the fewest bytes of so many cells of one document on one slot (`slice`). Which slices are left over after others were
//! taken, and where kv heads run out, is not; so the bound is lower than what can be reached.

mod slice;
mod time;

use std::collections::BTreeMap;

use outboard_attention::{Document, HeadGeometry, Span};

use crate::judge::price::{Fare, Price};
use crate::{PlanError, Problem, Rates};
use slice::{Priced, Prices, Source, Way};
use time::{Stage, Trade};

/// Tolerances at which layer time is bounded are so far apart, as a part of what slots have.
const STRIDE: f64 = 1.01;
/// The first of them after zero.
const FIRST: f64 = 1e-4;

/// The fewest bytes of one layer, forward and backward, of any plan whose busiest slot is within the problem's tolerance of
/// the mean in every tick, and in which no slot both gives and takes: what passes through a slot would be paid for twice.
///
/// # Errors
/// When the problem makes no sense.
pub fn least_bytes(problem: &Problem) -> Result<[f64; 2], PlanError> {
    problem.check()?;
    Ok(PASSES.map(|pass| {
        let prices = Prices::new(&problem.geometry, pass, Way::Both);
        ticks(problem).iter().map(|tick| tick.bytes(prices, problem.tolerance)).sum()
    }))
}

/// The least layer time in seconds, forward and backward, of any plan, balanced or not, where slots compute at these rates,
/// whatever the problem's profile says.
///
/// # Errors
/// When the problem makes no sense.
pub fn least_seconds(problem: &Problem, rates: Rates) -> Result<f64, PlanError> {
    Problem { rates: Some(rates), ..problem.clone() }.check()?;
    let trades: Vec<Trade> = ticks(problem).iter().map(|tick| tick.trade(&problem.geometry, rates)).collect();
    Ok(time::least(&trades))
}

const PASSES: [fn(&Fare) -> Price; 2] = [|fare| fare.forward, |fare| fare.backward];

/// What is known of a tick.
struct Tick {
    /// Slots, and ranks without one, which have no weight.
    homes: Vec<Home>,
    /// Cells of all.
    cells: f64,
    weights: f64,
    /// Rows and keys of documents that span ranks, of one kv head: rows of a rank, with all of so many keys that live
    /// elsewhere.
    meetings: Vec<[f64; 2]>,
    kv_heads: f64,
}

/// What lies on a slot before anything moves.
#[derive(Clone, Copy, Debug, Default)]
struct Home {
    weight: f64,
    link: f64,
    cells: f64,
    /// Those of documents that span ranks. What their cells cost when they move is not bounded.
    spanning: f64,
    source: Source,
}

fn ticks(problem: &Problem) -> Vec<Tick> {
    let mut by_tick: BTreeMap<u32, Vec<&Document>> = BTreeMap::new();
    for document in &problem.documents {
        by_tick.entry(document.tick()).or_default().push(document);
    }
    by_tick.values().map(|documents| Tick::new(problem, documents)).collect()
}

impl Tick {
    fn new(problem: &Problem, documents: &[&Document]) -> Tick {
        let Problem { geometry, slots, .. } = problem;
        let mut of_rank: BTreeMap<u32, usize> = BTreeMap::new();
        let mut homes: Vec<Home> = Vec::new();
        for slot in slots {
            of_rank.extend(slot.rank.map(|rank| (rank, homes.len())));
            homes.push(Home { weight: slot.weight, link: slot.link, ..Home::default() });
        }
        let mut meetings = Vec::new();
        for document in documents {
            let mask = document.mask(geometry.kv_heads());
            let spans = document.homes().iter().any(|home| home.rank != document.homes()[0].rank);
            for home in document.homes() {
                let at = *of_rank.entry(home.rank).or_insert_with(|| {
                    homes.push(Home::default());
                    homes.len() - 1
                });
                let keys = Span::to(document.tokens());
                let cells = mask.clip(home.tokens, keys, Span::to(geometry.kv_heads())).cells() as f64;
                let home = &mut homes[at];
                home.cells += cells;
                match spans {
                    true => home.spanning += cells,
                    false => home.source.add(document, geometry),
                }
            }
            if spans && document.is_causal() {
                meetings.extend(meetings_of(document));
            }
        }
        let cells = homes.iter().map(|home| home.cells).sum();
        let weights = homes.iter().map(|home| home.weight).sum();
        Tick { homes, cells, weights, meetings, kv_heads: geometry.kv_heads() as f64 }
    }

    /// What each home must give away at least where slots may have `1 + tolerance` times their share, by its index, and the
    /// room that the others have; both in descending order.
    fn surplus(&self, tolerance: f64) -> (Vec<(usize, f64)>, Vec<f64>) {
        let (mut donors, mut rooms) = (Vec::new(), Vec::new());
        for (n, home) in self.homes.iter().enumerate() {
            let cap = self.cells * (home.weight / self.weights) * (1.0 + tolerance);
            let over = home.cells - cap;
            // Rounding of sums must not make a surplus.
            let certain = over - home.spanning - 1e-9 * home.cells;
            if certain > 0.0 {
                donors.push((n, certain));
            }
            if over < 0.0 {
                rooms.push(-over);
            }
        }
        donors.sort_by(|a, b| b.1.total_cmp(&a.1));
        rooms.sort_by(|a, b| b.total_cmp(a));
        (donors, rooms)
    }

    fn bytes(&self, prices: Prices, tolerance: f64) -> f64 {
        let meetings: f64 =
            self.meetings.iter().map(|[rows, keys]| self.kv_heads * prices.meeting(*rows, *keys)).sum();
        let (donors, rooms) = self.surplus(tolerance);
        let most = rooms.first().copied().unwrap_or(0.0);
        let each = donors
            .iter()
            .map(|&(n, cells)| cells * self.homes[n].source.priced(prices).per_cell(cells.min(most)));
        let source = donors.iter().fold(Source::default(), |all, &(n, _)| all.merged(self.homes[n].source));
        meetings + each.sum::<f64>().max(paired(&source.priced(prices), &donors, &rooms))
    }

    /// What computing and carrying take at least, as tolerances grow.
    fn trade(&self, geometry: &HeadGeometry, rates: Rates) -> Trade {
        let mean = self.cells / self.weights;
        let slots = self.homes.iter().filter(|home| home.weight > 0.0);
        let most = slots.clone().map(|home| home.cells / home.weight).fold(mean, f64::max);
        let links: f64 = slots.map(|home| home.link).sum();
        let flops = [geometry.forward_flops(1), geometry.backward_flops(1)];
        let priced = PASSES.map(|pass| {
            [Way::There, Way::Back].map(|way| {
                let prices = Prices::new(geometry, pass, way);
                self.homes.iter().map(|home| home.source.priced(prices)).collect::<Vec<_>>()
            })
        });
        let carrying = |donors: &[(usize, f64)], priced: &[Priced]| {
            // What a donor sends leaves by its own link, if it has one, and arrives by some slot's.
            let (mut busiest, mut all) = (0.0f64, 0.0);
            for &(n, cells) in donors {
                let bytes = cells * priced[n].per_cell(cells);
                all += bytes;
                let Home { weight, link, .. } = self.homes[n];
                busiest = if weight > 0.0 { busiest.max(bytes / link) } else { busiest };
            }
            busiest.max(all / links) / rates.bytes_per_second
        };
        let between = |from: f64, to: f64| {
            let (donors, _) = self.surplus(to);
            [0, 1].map(|pass| Stage {
                computing: mean * (1.0 + from) * flops[pass] / rates.flops_per_second,
                carrying: priced[pass].iter().map(|priced| carrying(&donors, priced)).fold(0.0, f64::max),
            })
        };
        let (mut from, mut to) = (0.0, FIRST);
        let mut stages = Vec::new();
        // Beyond what the fullest slot has at home, no more stays there.
        while mean * (1.0 + from) < most {
            stages.push(between(from, to));
            (from, to) = (to, (1.0 + to) * STRIDE - 1.0);
        }
        stages.push(between(from, f64::MAX));
        Trade(stages)
    }
}

/// The fewest bytes when a slice is no larger than its donor's surplus and its receiver's room, and all come from `priced`.
/// Bytes a cell fall with the size of a slice, so the largest donors and receivers should meet: dealing them out in order
/// is the cheapest way.
fn paired(priced: &Priced, donors: &[(usize, f64)], rooms: &[f64]) -> f64 {
    let mut rooms = rooms.iter();
    let (mut size, mut room, mut bytes) = (0.0, 0.0, 0.0);
    for &(_, surplus) in donors {
        let mut left = surplus;
        while left > 0.0 {
            if room <= 0.0 {
                let Some(next) = rooms.next() else { return bytes };
                (size, room) = (*next, *next);
            }
            let moved = f64::min(left, room);
            bytes += moved * priced.per_cell(surplus.min(size));
            (left, room) = (left - moved, room - moved);
        }
    }
    bytes
}

/// For each rank of a causal document: its rows from some token on, and the keys of other ranks before that token. All of
/// these rows see all of these keys.
fn meetings_of(document: &Document) -> Vec<[f64; 2]> {
    let homes = document.homes();
    let mut ranks: Vec<u32> = homes.iter().map(|home| home.rank).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let count = |of: &dyn Fn(u32) -> bool, within: Span| -> f64 {
        let own = homes.iter().filter(|home| of(home.rank));
        own.map(|home| home.tokens.intersect(within).len()).sum::<usize>() as f64
    };
    let of_rank = |rank: &u32| {
        let all = Span::to(document.tokens());
        let meeting = |from: usize| {
            let (before, after) = (Span::to(from), Span::at(from, all.end() - from));
            [count(&|other| other == *rank, after), count(&|other| other != *rank, before)]
        };
        let starts = homes.iter().filter(|home| home.rank == *rank).map(|home| home.tokens.start());
        starts.map(meeting).max_by(|a, b| a[0].min(a[1]).total_cmp(&b[0].min(b[1])))
    };
    ranks.iter().filter_map(of_rank).collect()
}
