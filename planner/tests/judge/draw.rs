//! Random steps, valid plans of them, and broken ones.

use std::collections::BTreeMap;

use outboard_attention::{
    BandSlice, DType, Document, DocumentId, HeadGeometry, HeadShape, HomeRange, Mask, MaskPart, PlannedTask,
    Span, StepPlan, TickPlan,
};
use outboard_planner::{Problem, Slot};
use proptest::prelude::*;
use proptest::sample::Index;

use crate::oracle::{cells_of, inside};

fn geometry() -> impl Strategy<Value = HeadGeometry> {
    let dtype = prop_oneof![Just(DType::Bf16), Just(DType::F32)];
    (1usize..4, 1usize..4, 1usize..4, 1usize..4, dtype).prop_map(
        |(kv_heads, group, head_dim, v_head_dim, dtype)| {
            let (q_heads, scale, softcap) = (kv_heads * group, 1.0, None);
            HeadShape { q_heads, kv_heads, head_dim, v_head_dim, scale, dtype, softcap }
                .try_into()
                .expect("sound heads")
        },
    )
}

/// A span within `[0, len)`, not empty.
fn span(len: usize) -> impl Strategy<Value = Span> + Clone {
    (any::<Index>(), any::<Index>()).prop_map(move |(a, b)| {
        let (a, b) = (a.index(len), b.index(len));
        Span::at(a.min(b), a.abs_diff(b) + 1)
    })
}

/// Random slices; those that overlap what came before are left out.
fn mask(tokens: usize, kv_heads: usize) -> impl Strategy<Value = Mask> {
    let end = || prop::option::of(-(tokens as i64)..tokens as i64);
    let slice = (span(tokens), span(tokens), end(), end(), span(kv_heads));
    prop::collection::vec(slice, 0..8).prop_map(|slices| {
        let part = |(q, kv, lo, hi, kv_heads)| {
            Some(MaskPart { kv_heads, slice: BandSlice::new(q, kv, lo, hi).ok()? })
        };
        slices
            .into_iter()
            .filter_map(part)
            .fold(Mask::default(), |mask, part| Mask::new([mask.parts(), &[part]].concat()).unwrap_or(mask))
    })
}

fn document(index: u32, longest: usize, kv_heads: usize) -> impl Strategy<Value = Document> {
    let tokens = prop_oneof![1..longest.min(9), 1..longest];
    let drawn = tokens.prop_flat_map(move |tokens| {
        let borders = prop::collection::btree_set(any::<Index>().prop_map(move |i| i.index(tokens)), 0..3);
        let homes = (borders, prop::collection::vec(0u32..4, 4)).prop_map(move |(mut borders, ranks)| {
            borders.extend([0, tokens]);
            let borders: Vec<usize> = borders.into_iter().collect();
            let home = |(pair, &rank): (&[usize], &u32)| HomeRange {
                rank,
                tokens: Span::at(pair[0], pair[1] - pair[0]),
            };
            borders.windows(2).zip(&ranks).map(home).collect::<Vec<_>>()
        });
        (Just(tokens), homes, prop::option::of(mask(tokens, kv_heads)))
    });
    (drawn, 0u32..2).prop_map(move |((tokens, homes, mask), tick)| {
        let document = Document::new(DocumentId { rank: 0, index }, tokens, homes).expect("homes in a row");
        let document = document.with_tick(tick * 3);
        mask.map_or(document.clone(), |mask| document.with_mask(mask).expect("within the document"))
    })
}

pub fn problem(longest: usize) -> impl Strategy<Value = Problem> {
    let slots = prop::collection::vec(
        (0.25f64..4.0, any::<bool>(), 0.25f64..4.0, prop::option::of(1u64..100_000)),
        1..5,
    );
    (geometry(), slots).prop_flat_map(move |(geometry, slots)| {
        let slot = |(rank, &(weight, in_place, link, memory)): (u32, &(f64, bool, f64, Option<u64>))| Slot {
            rank: in_place.then_some(rank),
            weight,
            link,
            memory,
        };
        let slots: Vec<Slot> = (0..).zip(&slots).map(slot).collect();
        let documents: Vec<_> = (0..4).map(|n| document(n, longest, geometry.kv_heads())).collect();
        (documents, 1usize..=4).prop_map(move |(mut documents, count)| {
            documents.truncate(count);
            Problem::new(geometry, documents, slots.clone())
        })
    })
}

/// Which task, whether its queries, keys or heads, where, and on which slot.
pub type Draw = (Index, u8, Index, Index);

pub fn draws(most: usize) -> impl Strategy<Value = Vec<Draw>> {
    prop::collection::vec((any::<Index>(), 0u8..3, any::<Index>(), any::<Index>()), 0..most)
}

fn side(task: &mut PlannedTask, which: u8) -> &mut Span {
    match which {
        0 => &mut task.q,
        1 => &mut task.kv,
        _ => &mut task.kv_heads,
    }
}

/// A valid plan by random cuts. Tasks reach wherever their cuts let them, cells or not.
pub fn cut(problem: &Problem, cuts: &[Draw]) -> StepPlan {
    let mut ticks: BTreeMap<u32, Vec<PlannedTask>> = BTreeMap::new();
    let kv_heads = problem.geometry.kv_heads();
    for document in &problem.documents {
        let all = Span::to(document.tokens());
        let (id, heads) = (document.id(), Span::to(kv_heads));
        let first =
            PlannedTask { document: id, q: all, kv: all, kv_heads: heads, slot: 0, group: 0, position: 0 };
        let mut tasks = vec![first];
        for (which, by, at, slot) in cuts {
            let n = which.index(tasks.len());
            let mut rest = tasks[n];
            let whole = *side(&mut rest, *by);
            let border = whole.start() + at.index(whole.len());
            *side(&mut tasks[n], *by) = Span::new(whole.start(), border).expect("forwards");
            *side(&mut rest, *by) = Span::new(border, whole.end()).expect("forwards");
            rest.slot = slot.index(problem.slots.len()) as u32;
            tasks.push(rest);
            tasks.retain(|task| !task.q.is_empty() && !task.kv.is_empty() && !task.kv_heads.is_empty());
        }
        let cells = cells_of(document, kv_heads);
        tasks.retain(|task| cells.iter().any(|cell| inside(task, cell)));
        ticks.entry(document.tick()).or_default().append(&mut tasks);
    }
    let ticks = ticks.into_iter().map(|(tick, tasks)| TickPlan { tick, tasks }).collect();
    StepPlan { ticks, slots: problem.slots.len() as u32 }
}

/// Changes one thing of the plan, which most often breaks it.
pub fn damage(plan: &mut StepPlan, kind: u8, &(which, by, at, slot): &Draw) {
    let ticks = plan.ticks.len();
    let Some(tick) = plan.ticks.get_mut(slot.index(ticks.max(1))) else { return };
    let count = tick.tasks.len();
    let Some(task) = tick.tasks.get_mut(which.index(count.max(1))) else { return };
    let changed = side(task, by);
    let (start, end) = (changed.start(), changed.end());
    let moved = at.index(end - start + 4);
    match kind {
        0 => *changed = Span::at(start, moved),
        1 => *changed = Span::at(end.saturating_sub(moved), moved.min(end)),
        2 => *changed = Span::at(start + moved, end - start),
        3 => task.slot += at.index(8) as u32,
        4 => task.document.index += at.index(3) as u32,
        5 => tick.tick += at.index(2) as u32 * 3,
        6 => {
            let twice = *task;
            tick.tasks.insert(at.index(count + 1), twice);
        }
        _ => {
            tick.tasks.remove(which.index(count));
        }
    }
}
