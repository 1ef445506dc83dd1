//! No balancing: every row is computed where it lives.

use std::collections::BTreeMap;

use outboard_attention::{Document, Span};

use super::packing::{Bundle, Packing};
use crate::Slot;
use crate::sheet::{Sheet, Strip};

/// Every row on the slot of its home; what a document has on ranks without a slot goes together to the lightest.
pub(super) fn place(sheets: &[Sheet<'_>], slots: &[Slot]) -> Vec<Vec<Strip>> {
    let slot_of = slots_of_ranks(slots);
    let mut packing = Packing::new(slots);
    let mut homeless: BTreeMap<_, Bundle> = BTreeMap::new();
    for (n, sheet) in sheets.iter().enumerate() {
        for (slot, rows) in stretches(sheet.document, &slot_of) {
            let Some(strip) = Strip::new(sheets, n, sheet.kv_heads, rows) else { continue };
            match slot {
                Some(slot) => packing.give(slot, strip),
                None => homeless.entry(sheet.document.id()).or_default().push(strip),
            }
        }
    }
    packing.pack(homeless.into_values().collect(), |_, _| false);
    packing.into_held()
}

/// The in-place slot of each rank that has one.
pub(super) fn slots_of_ranks(slots: &[Slot]) -> BTreeMap<u32, usize> {
    slots.iter().enumerate().filter_map(|(n, slot)| Some((slot.rank?, n))).collect()
}

/// The document's rows and their home's slot, neighbours of the same slot in one range.
fn stretches(document: &Document, slot_of: &BTreeMap<u32, usize>) -> Vec<(Option<usize>, Span)> {
    let mut stretches: Vec<(Option<usize>, Span)> = Vec::new();
    for home in document.homes() {
        let slot = slot_of.get(&home.rank).copied();
        match stretches.last_mut() {
            Some((last, rows)) if *last == slot => *rows = rows.hull(home.tokens),
            _ => stretches.push((slot, home.tokens)),
        }
    }
    stretches
}
