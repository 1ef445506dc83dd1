//! Context parallelism of each document: a chunk near its head and one near its tail for every slot.

use outboard_attention::Span;

use super::packing::{Packing, whole_documents};
use crate::Slot;
use crate::sheet::{Sheet, Strip};

/// Of `2 N` chunks of each document, slot `i` of `N` has chunks `i` and `2 N - 1 - i`.
pub(super) fn place(sheets: &[Sheet<'_>], slots: &[Slot]) -> Vec<Vec<Strip>> {
    let chunks = 2 * slots.len();
    let mut packing = Packing::new(slots);
    for (n, sheet) in sheets.iter().enumerate() {
        let tokens = sheet.document.tokens();
        if tokens < chunks {
            continue;
        }
        // Lengths stay below 2^31 and slots below 2^21, so products fit.
        let border = |chunk: usize| (tokens as u64 * chunk as u64 / chunks as u64) as usize;
        let chunk = |chunk: usize| Span::new(border(chunk), border(chunk + 1));
        for slot in 0..slots.len() {
            let (head, tail) = (chunk(slot), chunk(chunks - 1 - slot));
            // The two chunks of the last slot are neighbours.
            let rows = match (head, tail) {
                (Some(head), Some(tail)) if head.end() == tail.start() => [Some(head.hull(tail)), None],
                pair => pair.into(),
            };
            for strip in rows.into_iter().flatten().filter_map(|q| Strip::new(sheets, n, sheet.kv_heads, q)) {
                packing.give(slot, strip);
            }
        }
    }
    let mut short = whole_documents(sheets);
    short.retain(|bundle| {
        let tokens = |strip: &Strip| sheets[strip.sheet].document.tokens();
        bundle.first().is_some_and(|strip| tokens(strip) < chunks)
    });
    packing.pack(short, |_, _| false);
    packing.into_held()
}
