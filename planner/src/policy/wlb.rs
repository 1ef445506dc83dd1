//! Whole documents, packed by their work.

use super::fixed::slots_of_ranks;
use super::packing::{Bundle, Packing, whole_documents};
use crate::Slot;
use crate::sheet::{Sheet, Strip};

/// Every document whole on the slot that had the least work when its turn came.
pub(super) fn place(sheets: &[Sheet<'_>], slots: &[Slot]) -> Vec<Vec<Strip>> {
    let slot_of = slots_of_ranks(slots);
    let lives_at = |slot: usize, bundle: &Bundle| {
        let document = bundle.first().and_then(|strip| sheets.get(strip.sheet)).map(|sheet| sheet.document);
        let mut homes = document.into_iter().flat_map(|document| document.homes());
        homes.any(|home| slot_of.get(&home.rank) == Some(&slot))
    };
    let mut packing = Packing::new(slots);
    packing.pack(whole_documents(sheets), lives_at);
    packing.into_held()
}
