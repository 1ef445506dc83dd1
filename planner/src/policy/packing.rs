//! Packing: what each slot has been given so far, and who has the least.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use outboard_attention::Span;

use crate::Slot;
use crate::sheet::{Sheet, Strip};

/// What every slot holds.
#[derive(Debug)]
pub(super) struct Packing<'a> {
    slots: &'a [Slot],
    held: Vec<Vec<Strip>>,
    cells: Vec<u64>,
}

/// Rows of one document that go together, with all kv heads: a strip for each of its sheets, or several.
pub(super) type Bundle = Vec<Strip>;

impl<'a> Packing<'a> {
    /// Slots that hold nothing. There is at least one.
    pub(super) fn new(slots: &'a [Slot]) -> Packing<'a> {
        Packing { slots, held: vec![Vec::new(); slots.len()], cells: vec![0; slots.len()] }
    }

    /// What every slot holds in the end.
    pub(super) fn into_held(self) -> Vec<Vec<Strip>> {
        self.held
    }

    /// Gives a strip to a slot.
    pub(super) fn give(&mut self, slot: usize, strip: Strip) {
        self.cells[slot] += strip.cells();
        self.held[slot].push(strip);
    }

    /// Gives every bundle whole to the slot with the least work over weight, the bundle with the most work first. Of
    /// slots with equal work the first takes it, but one that `prefers` it comes before all others.
    pub(super) fn pack(&mut self, mut bundles: Vec<Bundle>, prefers: impl Fn(usize, &Bundle) -> bool) {
        let cells = |bundle: &Bundle| bundle.iter().map(Strip::cells).sum::<u64>();
        bundles.sort_by_cached_key(|bundle| (Reverse(cells(bundle)), bundle.first().map(Strip::place)));
        for bundle in bundles {
            let load = |slot: &usize| self.cells[*slot] as f64 / self.slots[*slot].weight;
            let order = |a: &usize, b: &usize| {
                load(a).total_cmp(&load(b)).then_with(|| prefers(*b, &bundle).cmp(&prefers(*a, &bundle)))
            };
            if let Some(slot) = (0..self.slots.len()).min_by(order) {
                bundle.into_iter().for_each(|strip| self.give(slot, strip));
            }
        }
    }
}

/// Each document whole, in the order of the sheets.
pub(super) fn whole_documents(sheets: &[Sheet<'_>]) -> Vec<Bundle> {
    let mut bundles: BTreeMap<_, Bundle> = BTreeMap::new();
    for (n, sheet) in sheets.iter().enumerate() {
        let strip = Strip::new(sheets, n, sheet.kv_heads, Span::to(sheet.document.tokens()));
        bundles.entry(sheet.document.id()).or_default().extend(strip);
    }
    bundles.into_values().collect()
}
