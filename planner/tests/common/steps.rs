//! Steps to plan, by hand and at random.

use outboard_attention::{BandSlice, Document, DocumentId, HeadGeometry, HomeRange, Mask, MaskPart, Span};
use outboard_planner::{Policy, Problem, Slot};
use proptest::prelude::*;
use proptest::sample::Index;

/// Every policy, and how far DistCA's may stay from balance.
pub const POLICIES: [Policy; 7] = [
    Policy::Outboard,
    Policy::Fixed,
    Policy::Wlb,
    Policy::Cp,
    Policy::Distca { tolerance: 0.0 },
    Policy::Distca { tolerance: 0.1 },
    Policy::Distca { tolerance: 1.0 },
];

pub fn geometry(kv_heads: usize) -> HeadGeometry {
    HeadGeometry::standard(4 * kv_heads, kv_heads, 64).expect("sound heads")
}

/// A document of rank `rank` alone.
pub fn document(rank: u32, index: u32, tokens: usize) -> Document {
    spanning(rank, index, &[(rank, tokens)])
}

/// A document whose homes are `(rank, tokens)`, one after the other.
pub fn spanning(rank: u32, index: u32, homes: &[(u32, usize)]) -> Document {
    let mut at = 0;
    let homes = homes.iter().map(|&(rank, tokens)| {
        let tokens = Span::at(at, tokens);
        at = tokens.end();
        HomeRange { rank, tokens }
    });
    let homes = homes.collect();
    Document::new(DocumentId { rank, index }, at, homes).expect("homes in a row")
}

pub fn in_place(ranks: u32) -> Vec<Slot> {
    (0..ranks).map(Slot::in_place).collect()
}

/// Rows, first and last key, band.
type Draw = (Index, Index, Index, Option<i64>, Option<i64>);

/// Disjoint slices: rows in a row, each with its own keys and band, perhaps others for other heads.
pub fn mask(tokens: usize, kv_heads: usize) -> impl Strategy<Value = Mask> {
    let end = || prop_oneof![Just(None), (-600i64..600).prop_map(Some), Just(Some(0))];
    let slice = (any::<Index>(), any::<Index>(), any::<Index>(), end(), end());
    let slices = prop::collection::vec(slice, 1..6);
    let by_rows = move |(border, slices): (usize, Vec<Draw>)| {
        let mut parts = Vec::new();
        for (n, heads) in
            [Span::to(border), Span::new(border, kv_heads).unwrap_or_default()].into_iter().enumerate()
        {
            let mut at = 0;
            for (rows, a, b, lo, hi) in slices.iter().skip(n) {
                if heads.is_empty() || at >= tokens {
                    break;
                }
                let q = Span::at(at, 1 + rows.index(tokens - at));
                let (a, b) = (a.index(tokens), b.index(tokens));
                let kv = Span::at(a.min(b), a.abs_diff(b) + 1);
                let (lo, hi) = match (*lo, *hi) {
                    (Some(lo), Some(hi)) => (Some(lo.min(hi)), Some(lo.max(hi))),
                    ends => ends,
                };
                let slice = BandSlice::new(q, kv, lo, hi).expect("a sound band");
                parts.push(MaskPart { kv_heads: heads, slice });
                at = q.end();
            }
        }
        Mask::new(parts).expect("disjoint rows")
    };
    (0..=kv_heads, slices).prop_map(by_rows)
}

pub fn any_document(index: u32, ranks: u32, kv_heads: usize) -> impl Strategy<Value = Document> {
    let tokens = prop_oneof![1usize..6, 1usize..400, 400usize..6000, 6000usize..40000];
    let homes = tokens.prop_flat_map(move |tokens| {
        let home = (0..ranks, any::<Index>());
        let homes = prop::collection::vec(home, 1..4).prop_map(move |homes| {
            let (mut parts, mut left) = (Vec::new(), tokens);
            for (n, (rank, part)) in homes.iter().enumerate() {
                let len = if n + 1 == homes.len() { left } else { part.index(left + 1) };
                if len > 0 {
                    parts.push((*rank, len));
                    left -= len;
                }
            }
            parts
        });
        (homes, prop::option::of(mask(tokens, kv_heads)))
    });
    (homes, 0u32..3, 0..ranks).prop_map(move |((homes, mask), tick, rank)| {
        let document = spanning(rank, index, &homes).with_tick(tick / 2);
        match mask {
            Some(mask) => document.with_mask(mask).expect("within the document"),
            None => document,
        }
    })
}

pub fn any_problem() -> impl Strategy<Value = Problem> {
    let kv_heads = prop_oneof![Just(1usize), Just(8), 1usize..5];
    (kv_heads, 1u32..6).prop_flat_map(|(kv_heads, ranks)| {
        let documents: Vec<_> = (0..12).map(|n| any_document(n, ranks, kv_heads)).collect();
        let slot = prop_oneof![8 => Just(1.0), 8 => 0.2f64..5.0, 1 => Just(1e-3), 1 => Just(1e3)];
        let link = prop_oneof![3 => Just(1.0), 1 => 0.1f64..10.0];
        let slots = prop::collection::vec((slot, any::<bool>(), link), 1..10);
        (documents, 1usize..=12, slots).prop_map(move |(mut documents, count, slots)| {
            documents.truncate(count);
            let slot = |(n, &(weight, in_place, link)): (u32, &(f64, bool, f64))| Slot {
                rank: (in_place && n < ranks).then_some(n),
                weight,
                link,
                memory: None,
            };
            Problem::new(geometry(kv_heads), documents, (0..).zip(&slots).map(slot).collect())
        })
    })
}
