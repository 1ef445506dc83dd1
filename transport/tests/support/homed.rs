//! Tasks that name homes of their keys.

use std::collections::{BTreeMap, BTreeSet};

use futures::future::join_all;
use outboard_attention::kernel::Results;
use outboard_attention::merge::{Corner, GradientPartial, sum_group};
use outboard_attention::{Direction, Span, Task, TensorView};
use outboard_proto::{GradientHeader, KeyHome};
use outboard_transport::{KeyShare, Keys, TaskOutcome, TaskRequest};

use super::{Bench, Drawn, Held, Kind, Place, Places, Rng, Shape, Spec, compute, drawn};

/// Tasks whose keys are at homes, and what each must give.
pub struct Homed {
    pub tasks: Vec<TaskRequest>,
    expected: Vec<Results>,
}

/// How many parts each document is cut into, at least one; and at which places they are.
#[derive(Clone, Copy)]
pub struct Cut<'a> {
    pub parts: usize,
    pub at: &'a [usize],
}

/// Gives the tokens of a document to homes, part by part at random, and has its tasks name them: those of the same heads
/// share their keys. The document is known by its step.
pub fn at_homes(rng: &mut Rng, drawn: Drawn, step: u64, places: &Places, cut: Cut<'_>) -> Homed {
    let Drawn { mut tasks, keys, geometry, mask } = drawn;
    let tokens = keys[0].len() / (geometry.kv_heads() * geometry.head_dim());
    let mut cuts: BTreeSet<usize> = (1..cut.parts).map(|_| rng.between(0, tokens - 1)).collect();
    cuts.remove(&0);
    let ends = cuts.iter().copied().chain([tokens]);
    let starts = std::iter::once(0).chain(cuts.iter().copied());
    let mut parts: Vec<KeyHome> = Vec::new();
    for (start, end) in starts.zip(ends) {
        let place = &places.0[cut.at[rng.between(0, cut.at.len() - 1)]];
        let (rank, address) = (place.rank, place.address.clone());
        parts.push(KeyHome { tokens: Span::new(start, end).unwrap(), rank, address });
    }
    let id = tasks[0].header.task.document();
    for place in &places.0 {
        let held =
            parts.iter().filter(|part| part.address == place.address).map(|part| part.tokens).collect();
        let held = Held { document: id, keys: keys.clone(), geometry, tokens: held };
        place.home.hold(step, held);
    }
    for TaskRequest { header, .. } in &mut tasks {
        header.step = step;
        // Not all tasks need all keys before them.
        let kv = Span::new(rng.between(0, header.task.q().start()), header.task.kv().end()).unwrap();
        header.task = Task::new(id, header.task.q(), kv, header.task.kv_heads(), &mask).unwrap();
    }
    let expected = tasks.iter().map(|task| compute(&task.header, &task.inputs().unwrap())).collect();
    let mut hulls: BTreeMap<Span, Span> = BTreeMap::new();
    for TaskRequest { header, .. } in &tasks {
        let hull = hulls.entry(header.task.kv_heads()).or_insert(header.task.kv());
        *hull = hull.hull(header.task.kv());
    }
    let mut named: BTreeMap<Span, (Vec<KeyHome>, KeyShare)> = BTreeMap::new();
    for (heads, hull) in hulls {
        // Some clients name just what their tasks need, some all of every home.
        let trim = rng.between(0, 1) == 0;
        let met = parts.iter().filter(|part| part.tokens.meets(hull)).cloned();
        let tokens = |part: &KeyHome| if trim { part.tokens.intersect(hull) } else { part.tokens };
        let homes = met.map(|part| KeyHome { tokens: tokens(&part), ..part }).collect();
        named.insert(heads, (homes, KeyShare::default()));
    }
    for task in &mut tasks {
        let (homes, share) = &named[&task.header.task.kv_heads()];
        task.header.key_homes.clone_from(homes);
        task.keys = Keys::AtHomes(share.clone());
    }
    let homed = Homed { tasks, expected };
    for (place, header) in homed.shares(places).into_iter().flatten() {
        place.home.expect(&header);
    }
    homed
}

impl Homed {
    /// What is delivered of each task: the home, and the share's header.
    fn shares<'a>(&self, places: &'a Places) -> Vec<Vec<(&'a Place, GradientHeader)>> {
        let shares = |task: &TaskRequest| {
            let header = &task.header;
            if header.direction == Direction::Forward {
                return Vec::new();
            }
            let mut shares = Vec::new();
            for home in &header.key_homes {
                let tokens = home.tokens.intersect(header.task.kv());
                if !tokens.is_empty() {
                    let (range, group, position) = (header.key_range(tokens), header.group, header.position);
                    shares.push((
                        places.at(&home.address),
                        GradientHeader { range, group, position, summed: 0 },
                    ));
                }
            }
            shares
        };
        self.tasks.iter().map(shares).collect()
    }

    /// True when a task reads keys of a place.
    pub fn reads(&self, task: usize, place: &Place) -> bool {
        self.tasks[task].header.key_homes.iter().any(|home| home.address == place.address)
    }

    /// True when a share of a task is delivered to a place.
    pub fn delivers(&self, task: usize, places: &Places, place: &Place) -> bool {
        self.shares(places)[task].iter().any(|(at, _)| at.address == place.address)
    }

    /// Bytes that are delivered over the network, and that are fetched so where all goes well.
    pub fn network_bytes(&self, places: &Places) -> (u64, u64) {
        let remote = |address: &str| places.at(address).spec != Spec::Beside;
        let row = |task: &TaskRequest, bytes: usize| {
            let geometry = &task.header.geometry;
            task.header.task.kv_heads().len() * (geometry.head_dim() + geometry.v_head_dim()) * bytes
        };
        let mut fetched: BTreeMap<Span, u64> = BTreeMap::new();
        let mut delivered = 0;
        for (task, shares) in self.tasks.iter().zip(self.shares(places)) {
            let homes = task.header.key_homes.iter().filter(|home| remote(&home.address));
            let tokens: usize = homes.map(|home| home.tokens.len()).sum();
            let bytes = (tokens * row(task, task.header.geometry.dtype().bytes())) as u64;
            fetched.insert(task.header.task.kv_heads(), bytes);
            let shares = shares.iter().filter(|(place, _)| remote(&place.address));
            delivered +=
                shares.map(|(_, share)| share.range.tokens.len() * row(task, 4)).sum::<usize>() as u64;
        }
        (delivered, fetched.values().sum())
    }

    /// Makes one reduction group of all tasks, which must have the same heads. Gives back its keys when one task reads all
    /// of them: then they are delivered as a sum.
    pub fn group(&mut self, places: &Places) -> Option<Span> {
        let count = self.tasks.len() as u32;
        for (position, TaskRequest { header, .. }) in (0..).zip(&mut self.tasks) {
            (header.group, header.position, header.group_tasks) = (7, position, count);
        }
        let read = || self.tasks.iter().map(|task| task.header.task.kv());
        let hull = read().reduce(Span::hull)?;
        for (place, header) in self.shares(places).into_iter().flatten() {
            place.home.expect(&header);
        }
        for (place, header) in self.sums(places, hull) {
            place.home.expect(&header);
        }
        read().any(|kv| kv == hull).then_some(hull)
    }

    fn sums<'a>(&self, places: &'a Places, hull: Span) -> Vec<(&'a Place, GradientHeader)> {
        let header = &self.tasks[0].header;
        let parts = header.key_homes.iter().map(|home| (home, home.tokens.intersect(hull)));
        let sum = |(home, tokens): (&KeyHome, Span)| {
            let reads = |task: &&TaskRequest| !task.header.task.kv().intersect(tokens).is_empty();
            let (range, summed) = (header.key_range(tokens), self.tasks.iter().filter(reads).count() as u32);
            (places.at(&home.address), GradientHeader { range, group: 7, position: 0, summed })
        };
        parts.filter(|(_, tokens)| !tokens.is_empty()).map(sum).collect()
    }

    /// Every home has got its part of the sum, with the bits of one that is made at home, and nothing else of the step.
    pub fn check_sum(&self, places: &Places, hull: Span) {
        let gradients = |tensor: usize| -> (usize, Vec<f32>) {
            let parts = self.tasks.iter().zip(&self.expected).map(|(task, expected)| {
                let Results::Backward { dk, dv, .. } = expected else { panic!("a forward task in a sum") };
                (task.header.task.kv(), [dk, dv][tensor])
            });
            let parts: Vec<(Span, &[f32])> = parts.map(|(kv, values)| (kv, &values[..])).collect();
            let width = parts[0].1.len() / parts[0].0.len();
            let mut partials = Vec::new();
            for (position, &(kv, values)) in (0..).zip(&parts) {
                let values = TensorView::contiguous("part", values, [kv.len(), 1, width]).unwrap();
                let at = Corner { row: kv.start(), head: 0 };
                partials.push(GradientPartial { group: 7, position, at, values });
            }
            (width, sum_group(&partials, width).unwrap().2)
        };
        let [dk, dv] = [0, 1].map(gradients);
        for (place, header) in self.sums(places, hull) {
            let tokens = header.range.tokens;
            let rows = |(width, whole): &(usize, Vec<f32>)| {
                whole[(tokens.start() - hull.start()) * width..(tokens.end() - hull.start()) * width].to_vec()
            };
            let got = place.home.taken(&header).unwrap_or_else(|| panic!("the sum of {tokens} did not come"));
            assert!(got.dk == rows(&dk) && got.dv == rows(&dv), "the sum of {tokens} differs");
        }
        let step = self.tasks[0].header.step;
        let taken: usize = places.0.iter().map(|place| place.home.count_taken(step)).sum();
        assert_eq!(taken, self.sums(places, hull).len(), "homes took more than the sum");
    }

    /// A task's result is that of the direct computation; its gradients of keys have gone home.
    pub fn check(&self, task: usize, outcome: &TaskOutcome) {
        let (dq, none) = match &self.expected[task] {
            Results::Backward { dq, .. } => (dq.clone(), Vec::new()),
            forward => {
                return assert!(outcome.results == *forward, "results differ from the direct computation");
            }
        };
        let expected = Results::Backward { dq, dk: none.clone(), dv: none };
        assert!(outcome.results == expected, "dQ differs from the direct computation, or more than dQ came");
    }

    /// Every home has got what is its own of these tasks, and no more of their step.
    pub fn check_delivered(&self, places: &Places, tasks: impl IntoIterator<Item = usize>) {
        let shares = self.shares(places);
        let mut count = 0;
        for task in tasks {
            let Results::Backward { dk, dv, .. } = &self.expected[task] else { continue };
            let kv = self.tasks[task].header.task.kv();
            let mut at = kv.start();
            for (place, header) in &shares[task] {
                let tokens = header.range.tokens;
                let rows = |whole: &[f32]| -> Vec<f32> {
                    let row = whole.len() / kv.len();
                    whole[(tokens.start() - kv.start()) * row..(tokens.end() - kv.start()) * row].to_vec()
                };
                let got = place.home.taken(header);
                let got = got.unwrap_or_else(|| panic!("{} did not come", header.range));
                assert!(got.dk == rows(dk) && got.dv == rows(dv), "{} differ", header.range);
                assert_eq!(tokens.start(), at, "the shares leave a gap");
                (at, count) = (tokens.end(), count + 1);
            }
            assert_eq!(at, kv.end(), "the shares do not add up to the task's keys");
        }
        let step = self.tasks[0].header.step;
        assert_eq!(
            places.0.iter().map(|place| place.home.count_taken(step)).sum::<usize>(),
            count,
            "homes took shares that are none"
        );
    }
}

/// Any part of the document may be anywhere.
pub fn everywhere(places: &Places) -> Vec<usize> {
    (0..places.0.len()).collect()
}

/// Ships and awaits all, each equal to the direct computation, its gradients delivered.
pub async fn check_all(bench: &Bench, places: &Places, homed: &Homed) {
    for (n, outcome) in join_all(bench.transport.ship(homed.tasks.clone())).await.into_iter().enumerate() {
        homed.check(n, &outcome.expect("the task succeeds"));
    }
    homed.check_delivered(places, 0..homed.tasks.len());
}

/// Tasks whose keys lie partly at the second place.
pub fn reading_second(rng: &mut Rng, kind: Kind, direction: Direction, step: u64, places: &Places) -> Homed {
    loop {
        let drawn = drawn(rng, few_keys(kind, direction));
        let homed = at_homes(rng, drawn, step, places, Cut { parts: 6, at: &[0, 1, 1] });
        if homed.reads(0, &places.0[1]) {
            return homed;
        }
    }
}

pub fn few_keys(kind: Kind, direction: Direction) -> Shape {
    Shape { tasks: 6, tokens: 120, kv_heads: 1, ..kind.small(direction) }
}
