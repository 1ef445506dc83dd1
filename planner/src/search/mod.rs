//! Search: who relieves whom, anew and anew, while bytes fall.
//!
//! A donor's surplus is served by receivers; an [`Edge`] says how much each takes. A slice of `w` cells costs about
//! `sqrt(w)`, so that few large unequal slices cost least, and which receivers go to which donor is a packing problem.
//! An exchange takes a few donors, pools their receivers, and deals these out again; it is kept when bytes, and a toll
//! on links near the busiest, fall. A lower bound turns most exchanges down before any slice is laid out.

mod pool;
mod random;
mod shape;

use pool::Pool;
pub(crate) use random::Random;
pub(crate) use shape::{Rect, Shape};

/// What a receiver takes from a donor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Edge {
    pub(crate) slot: usize,
    pub(crate) cells: f64,
    /// Bytes to the receiver, forward.
    pub(crate) sent: f64,
}

/// A slot with too much work.
#[derive(Clone, Debug)]
pub(crate) struct Donor {
    pub(crate) slot: usize,
    /// Cells to give away.
    pub(crate) surplus: f64,
    /// What may be cut, the longest first.
    pub(crate) strips: Vec<Rect>,
    /// Who takes how much, in descending order of cells.
    pub(crate) edges: Vec<Edge>,
}

/// What the search knows besides the donors.
#[derive(Debug)]
pub(crate) struct Terms {
    pub(crate) shape: Shape,
    /// Cells that may be misplaced.
    pub(crate) grain: f64,
    /// Exchanges to try.
    pub(crate) tries: usize,
}

/// Donors in an exchange, at most.
const DONORS: usize = 12;
/// A donor with more edges is left as it is: an exchange takes the square of their number, and many edges are alike.
const EDGES: usize = 64;
/// The toll and who has room are taken anew after so many exchanges.
const PERIOD: usize = 256;
/// What the whole of the busiest link is worth, as a part of all bytes.
const TOLL: f64 = 0.1 / 32.0;
/// Bytes that an exchange must save: what is below is rounding.
const LEAST_SAVING: f64 = 1.0;

/// A way to relieve one donor.
#[derive(Clone, Debug, Default)]
struct Relief {
    edges: Vec<Edge>,
    /// Bytes of all slices; before they are laid out, no more than these.
    bytes: f64,
}

/// Improves the donors' edges. `room` is what slots could take besides, in cells; it is kept up to date. Donors whose
/// strips cannot serve their edges keep them, and so do those with very many. The outcome is the same on every machine.
pub(crate) fn improve(donors: &mut [Donor], room: &mut [f64], links: Links, terms: &Terms) -> Links {
    let mut search = Search::new(donors, room, links, terms);
    let (mut random, mut fresh) = (Random::new(1), vec![Relief::default(); DONORS]);
    search.start();
    if !search.able.is_empty() {
        for round in 0..terms.tries {
            if round % PERIOD == 0 {
                search.survey();
            }
            search.exchange(&mut random, &mut fresh);
        }
        search.survey();
    }
    search.links
}

struct Search<'a> {
    donors: &'a mut [Donor],
    room: &'a mut [f64],
    terms: &'a Terms,
    /// Bytes that each donor moves.
    bytes: Vec<f64>,
    /// What each donor can give, at best.
    hulls: Vec<Rect>,
    /// Donors to exchange between, in order of surplus.
    able: Vec<usize>,
    /// Which of these a slot serves.
    users: Vec<Vec<usize>>,
    links: Links,
    /// Slots with room to spare.
    roomy: Vec<usize>,
    pool: Pool,
    /// Donors of the exchange at hand.
    some: Vec<usize>,
    /// Working memory of [`Shape::serve`].
    left: Vec<Rect>,
    /// Changes of links' bytes by slot: in, out.
    changes: Vec<(usize, f64, f64)>,
}

/// Bytes on every slot's link, forward, Q, K and V alone.
#[derive(Clone, Debug)]
pub(crate) struct Links {
    /// Into and out of each slot.
    loads: Vec<(f64, f64)>,
    /// How long each takes for a byte, relative to the others.
    slow: Vec<f64>,
    /// Of the link that is in use longest, how long.
    busiest: f64,
    /// Bytes in all that the whole of the busiest link is worth.
    price: f64,
}

impl Links {
    /// Nothing on them. `links` is how much each carries, relative to the others.
    pub(crate) fn new(links: impl Iterator<Item = f64>) -> Links {
        let slow: Vec<f64> = links.map(|link| 1.0 / link).collect();
        Links { loads: vec![(0.0, 0.0); slow.len()], slow, busiest: 0.0, price: 0.0 }
    }

    /// How long a slot's link is in use.
    fn time(&self, slot: usize, into: f64, out: f64) -> f64 {
        into.max(out) * self.slow[slot]
    }

    /// What a slot's link costs besides its bytes.
    fn toll(&self, slot: usize, into: f64, out: f64) -> f64 {
        let mut share = self.time(slot, into, out) / self.busiest;
        // To the 32nd power.
        for _ in 0..5 {
            share *= share;
        }
        self.price * share
    }

    /// How long what leaves a slot takes, as a part of what the busiest link does.
    pub(crate) fn out(&self, slot: usize) -> f64 {
        match self.loads.get(slot) {
            Some(load) if self.busiest > 0.0 => load.1 * self.slow[slot] / self.busiest,
            _ => 0.0,
        }
    }
}

impl<'a> Search<'a> {
    fn new(donors: &'a mut [Donor], room: &'a mut [f64], links: Links, terms: &'a Terms) -> Search<'a> {
        let slots = room.len();
        Search {
            bytes: vec![0.0; donors.len()],
            hulls: donors.iter().map(|donor| Rect::hull(&donor.strips)).collect(),
            able: Vec::new(),
            users: vec![Vec::new(); slots],
            links,
            roomy: Vec::new(),
            pool: Pool::default(),
            some: Vec::new(),
            left: Vec::new(),
            changes: Vec::new(),
            donors,
            room,
            terms,
        }
    }

    /// Lays out what the donors begin with.
    fn start(&mut self) {
        for (n, donor) in self.donors.iter_mut().enumerate() {
            let Donor { slot, strips, edges, .. } = donor;
            if edges.is_empty() || edges.len() > EDGES {
                continue;
            }
            let served =
                self.terms.shape.serve(strips, edges, self.terms.grain, f64::INFINITY, &mut self.left);
            let Some(bytes) = served else { continue };
            self.bytes[n] = bytes;
            self.able.push(n);
            for edge in edges.iter() {
                self.users[edge.slot].push(n);
                self.links.loads[edge.slot].0 += edge.sent;
                self.links.loads[*slot].1 += edge.sent;
            }
        }
    }

    /// Room worth dealing out.
    fn crumb(&self) -> f64 {
        4.0 * self.terms.grain
    }

    fn survey(&mut self) {
        let time = |(slot, load): (usize, &(f64, f64))| self.links.time(slot, load.0, load.1);
        self.links.busiest = self.links.loads.iter().enumerate().map(time).fold(f64::MIN_POSITIVE, f64::max);
        self.links.price = TOLL * self.bytes.iter().sum::<f64>();
        let crumb = self.crumb();
        self.roomy.clear();
        self.roomy.extend((0..self.room.len()).filter(|&slot| self.room[slot] > crumb));
    }

    /// Tries one exchange, and keeps it if it pays.
    fn exchange(&mut self, random: &mut Random, fresh: &mut [Relief]) {
        self.choose(random);
        self.gather(random);
        if let Some(spare) = self.deal(random, fresh)
            && self.lay_out(spare, fresh)
        {
            self.keep(fresh);
        }
    }

    /// Chooses donors: one, and others that share a receiver with one of them, or any.
    fn choose(&mut self, random: &mut Random) {
        self.some.clear();
        self.some.push(self.able[random.below(self.able.len())]);
        for _ in 0..random.below(DONORS) {
            let edges = &self.donors[self.some[random.below(self.some.len())]].edges;
            let near = &self.users[edges[random.below(edges.len())].slot];
            let other = match random.below(2) {
                0 => near[random.below(near.len())],
                _ => self.able[random.below(self.able.len())],
            };
            if !self.some.contains(&other) {
                self.some.push(other);
            }
        }
        // Donors lie in order of surplus: the largest is served first, most of the time.
        self.some.sort_unstable();
        if random.below(2) == 0 {
            let (a, b) = (random.below(self.some.len()), random.below(self.some.len()));
            self.some.swap(a, b);
        }
    }

    /// Pools the receivers of the chosen donors, and a few with room.
    fn gather(&mut self, random: &mut Random) {
        self.pool.clear();
        for &n in &self.some {
            for edge in &self.donors[n].edges {
                self.pool.add(edge.slot, edge.cells, self.room[edge.slot]);
            }
        }
        for _ in 0..2.min(self.roomy.len()) {
            let slot = self.roomy[random.below(self.roomy.len())];
            if self.room[slot] > self.crumb() {
                self.pool.add(slot, 0.0, self.room[slot]);
            }
        }
        self.pool.sort();
    }

    /// Deals the pool out. Returns what the exchange may still cost above its lower bound, `None` when it cannot pay.
    fn deal(&mut self, random: &mut Random, fresh: &mut [Relief]) -> Option<f64> {
        let toll = |slot: usize| self.links.toll(slot, self.links.loads[slot].0, self.links.loads[slot].1);
        let cost = |n: &usize| self.bytes[*n] + toll(self.donors[*n].slot);
        // No link of those touched can end up cheaper than free.
        let tolls: f64 = self.pool.slots().map(toll).sum();
        let mut spare = tolls + self.some.iter().map(cost).sum::<f64>() - LEAST_SAVING;
        let (wild, crumb) = (random.below(4), self.crumb());
        for (relief, &n) in fresh.iter_mut().zip(&self.some) {
            let donor = &self.donors[n];
            if !self.pool.deal(donor.surplus, crumb, wild, random, &mut relief.edges) {
                return None;
            }
            let least = |edge: &Edge| self.terms.shape.least(&self.hulls[n], edge.cells);
            relief.bytes = relief.edges.iter().map(least).sum();
            spare -= relief.bytes;
            if spare < 0.0 {
                return None;
            }
        }
        Some(spare)
    }

    /// Lays the slices out and says whether bytes and tolls fall.
    fn lay_out(&mut self, mut spare: f64, fresh: &mut [Relief]) -> bool {
        for (relief, &n) in fresh.iter_mut().zip(&self.some) {
            let (strips, limit) = (&self.donors[n].strips, spare + relief.bytes);
            let served =
                self.terms.shape.serve(strips, &mut relief.edges, self.terms.grain, limit, &mut self.left);
            let Some(bytes) = served else { return false };
            spare = limit - bytes;
            relief.bytes = bytes;
        }
        self.changes.clear();
        let mut saved = -LEAST_SAVING;
        for (relief, &n) in fresh.iter().zip(&self.some) {
            let donor = &self.donors[n];
            saved += self.bytes[n] - relief.bytes;
            for (sign, edges) in [(-1.0, &donor.edges), (1.0, &relief.edges)] {
                for edge in edges {
                    change(&mut self.changes, edge.slot, sign * edge.sent, 0.0);
                    change(&mut self.changes, donor.slot, 0.0, sign * edge.sent);
                }
            }
        }
        for &(slot, into, out) in &self.changes {
            let (old_in, old_out) = self.links.loads[slot];
            let (old, new) =
                (self.links.toll(slot, old_in, old_out), self.links.toll(slot, old_in + into, old_out + out));
            saved += old - new;
        }
        saved > 0.0
    }

    fn keep(&mut self, fresh: &mut [Relief]) {
        for (relief, &n) in fresh.iter_mut().zip(&self.some) {
            let donor = &mut self.donors[n];
            for edge in &donor.edges {
                self.room[edge.slot] += edge.cells;
                self.users[edge.slot].retain(|&user| user != n);
            }
            for edge in &relief.edges {
                self.room[edge.slot] -= edge.cells;
                self.users[edge.slot].push(n);
            }
            std::mem::swap(&mut donor.edges, &mut relief.edges);
            self.bytes[n] = relief.bytes;
        }
        for &(slot, into, out) in &self.changes {
            self.links.loads[slot].0 += into;
            self.links.loads[slot].1 += out;
        }
    }
}

fn change(changes: &mut Vec<(usize, f64, f64)>, slot: usize, into: f64, out: f64) {
    match changes.iter_mut().find(|change| change.0 == slot) {
        Some(change) => (change.1, change.2) = (change.1 + into, change.2 + out),
        None => changes.push((slot, into, out)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::judge::price::Price;

    fn equal(slots: usize) -> Links {
        Links::new(std::iter::repeat_n(1.0, slots))
    }

    fn terms(grain: f64) -> Terms {
        let sent = [Price { there: 1024, back: 0 }, Price { there: 512, back: 0 }];
        Terms { shape: Shape::new(4144.0, 1075.0, sent), grain, tries: 300 }
    }

    /// Donors with one document each, dealt to the last slots in order.
    fn dealt(documents: &[(u32, f64)], rooms: &[f64], heads: f64) -> (Vec<Donor>, Vec<f64>) {
        let mut room: Vec<f64> = documents.iter().map(|_| 0.0).chain(rooms.iter().copied()).collect();
        let mut donors = Vec::new();
        for (slot, &(rows, part)) in documents.iter().enumerate() {
            let rows = f64::from(rows);
            let surplus = heads * rows * (rows + 1.0) / 2.0 * part;
            let (mut need, mut edges) = (surplus, Vec::new());
            for (n, room) in room.iter_mut().enumerate() {
                let cells = need.min(*room);
                if cells > 0.0 {
                    edges.push(Edge { slot: n, cells, sent: 0.0 });
                    (*room, need) = (*room - cells, need - cells);
                }
            }
            edges.sort_by(|a, b| b.cells.total_cmp(&a.cells));
            donors.push(Donor {
                slot,
                surplus: surplus - need,
                strips: vec![Rect::new(heads, 0.0, rows)],
                edges,
            });
        }
        (donors, room)
    }

    /// Two donors, each dealt parts of what would serve the other whole.
    fn crossed(terms: &Terms) -> (Vec<Donor>, f64) {
        let edge = |slot, cells| Edge { slot, cells, sent: 0.0 };
        let donor = |slot, edges: Vec<Edge>| Donor {
            slot,
            surplus: edges.iter().map(|edge| edge.cells).sum(),
            strips: vec![Rect::new(1.0, 0.0, 100_000.0)],
            edges,
        };
        let mut donors =
            vec![donor(0, vec![edge(3, 6e8), edge(2, 4e8)]), donor(1, vec![edge(2, 5e8), edge(4, 1e8)])];
        let room = &mut [0.0, 0.0, 1e8, 0.0, 0.0];
        improve(&mut donors, room, equal(5), terms);
        (donors, room.iter().sum())
    }

    #[test]
    fn the_same_bytes_cost_more_on_a_slow_link() {
        let mut links = Links::new([1.0, 0.5, 0.25].into_iter());
        (links.busiest, links.price) = (4e6, 1.0);
        let [usual, slow, slowest] = [0, 1, 2].map(|slot| links.toll(slot, 1e6, 1e5));
        assert!(usual < 1e-15 && slow > 1e-12 && slow < 1e-3, "{usual} {slow}");
        assert_eq!(slowest, 1.0, "four times as long as a usual link: the busiest");
        links.loads = vec![(0.0, 1e6); 3];
        assert_eq!([0, 1, 2].map(|slot| links.out(slot)), [0.25, 0.5, 1.0]);
    }

    #[test]
    fn crossed_donors_are_sorted_out() {
        let (donors, room) = crossed(&terms(1e4));
        let slots = |n: usize| donors[n].edges.iter().map(|edge| edge.slot).collect::<Vec<_>>();
        assert_eq!((slots(0), slots(1), room), (vec![2], vec![3], 1e8), "{donors:?}");
    }

    proptest! {
        #[test]
        fn exchanges_keep_the_books_and_save_bytes(
            documents in prop::collection::vec((1u32..300_000, 0.0f64..0.9), 1..12),
            rooms in prop::collection::vec(prop_oneof![Just(0.0), 0.0f64..1e3, 0.0f64..1e11], 0..20),
            heads in prop_oneof![Just(1.0), Just(8.0)],
            grain in prop_oneof![Just(0.0), 0.0f64..1e7],
        ) {
            let terms = terms(grain);
            let (mut donors, mut room) = dealt(&documents, &rooms, heads);
            let (before, slots): (Vec<f64>, usize) = (room.clone(), room.len());
            let total = |donors: &[Donor]| {
                let mut left = Vec::new();
                let bytes = donors.iter().filter_map(|donor| {
                    let mut edges = donor.edges.clone();
                    terms.shape.serve(&donor.strips, &mut edges, grain, f64::INFINITY, &mut left)
                });
                bytes.sum::<f64>()
            };
            let (old, mut again) = (donors.clone(), donors.clone());
            improve(&mut donors, &mut room, equal(slots), &terms);
            // Tolls may take bytes for lighter links, but never more than all links are worth, each time they are set.
            let worth = (1.0 + TOLL * room.len() as f64).powi(terms.tries.div_ceil(PERIOD) as i32);
            prop_assert!(total(&donors) <= total(&old) * worth + 1.0);
            let mut taken = vec![0.0; room.len()];
            for (donor, old) in donors.iter().zip(&old) {
                let cells: f64 = donor.edges.iter().map(|edge| edge.cells).sum();
                prop_assert!((cells - old.surplus).abs() <= 1e-6 * old.surplus + 1.0);
                for edge in &donor.edges {
                    prop_assert!(edge.slot != donor.slot && edge.cells > 0.0);
                    taken[edge.slot] += edge.cells;
                }
                for edge in &old.edges {
                    taken[edge.slot] -= edge.cells;
                }
            }
            for ((room, before), taken) in room.iter().zip(&before).zip(&taken) {
                prop_assert!((before - taken - room).abs() <= 1e-6 * before.max(room.abs()) + 1.0);
                prop_assert!(*room >= -1.0 - 1e-6 * before);
            }
            let mut room = before;
            improve(&mut again, &mut room, equal(slots), &terms);
            let slots = |donors: &[Donor]| donors.iter().flat_map(|d| d.edges.clone()).collect::<Vec<_>>();
            prop_assert_eq!(slots(&again), slots(&donors), "the same again");
        }
    }
}
