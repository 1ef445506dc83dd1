//! Every cell in exactly one task.

use std::collections::BTreeMap;

use outboard_attention::{
    Document, DocumentId, HeadGeometry, InvalidAttention, Mask, MaskPart, PlannedTask, Span, StepPlan,
};

use super::Fault;
use super::pieces::{Piece, Shelf};

/// A task and its number among all of the plan.
pub(super) type Numbered<'a> = (usize, &'a PlannedTask);

/// The plan's tasks, by the documents they cut, which come sorted by tick and id.
pub(super) fn by_document<'a>(
    plan: &'a StepPlan,
    documents: &[&Document],
    slots: usize,
) -> Result<Vec<Vec<Numbered<'a>>>, Fault> {
    let places: BTreeMap<(u32, DocumentId), usize> =
        documents.iter().enumerate().map(|(n, d)| ((d.tick(), d.id()), n)).collect();
    let mut tasks: Vec<Vec<Numbered<'a>>> = vec![Vec::new(); documents.len()];
    for (number, (tick, task)) in plan.tasks().enumerate() {
        let document = task.document;
        let of_document = places.get(&(tick, document)).and_then(|&n| tasks.get_mut(n));
        let of_document = of_document.ok_or(Fault::UnknownDocument { task: number, document, tick })?;
        if task.slot as usize >= slots {
            return Err(Fault::UnknownSlot { task: number, document, slot: task.slot, slots });
        }
        of_document.push((number, task));
    }
    Ok(tasks)
}

/// A document's tasks, each with its part of `mask`, after making sure that they hold each of its cells once.
pub(super) fn pieces_of(
    document: &Document,
    mask: &Mask,
    tasks: &[Numbered<'_>],
    geometry: &HeadGeometry,
) -> Result<Vec<Piece>, Fault> {
    let id = document.id();
    let shelf = Shelf::new(mask);
    let mut pieces = Vec::with_capacity(tasks.len());
    for &(number, task) in tasks {
        in_range(document, number, task, geometry)?;
        let piece = shelf.piece(task);
        if piece.parts.is_empty() {
            let &PlannedTask { q, kv, kv_heads, .. } = task;
            return Err(Fault::Empty { task: number, document: id, q, kv, kv_heads });
        }
        pieces.push(piece);
    }
    if let Some((first, second)) = overlap(&pieces) {
        let number = |n: usize| tasks.get(n).map_or(n, |&(number, _)| number);
        return Err(Fault::Overlap { document: id, first: number(first), second: number(second) });
    }
    let (planned, needed) = (pieces.iter().map(Piece::cells).sum(), mask.cells());
    if planned == needed { Ok(pieces) } else { Err(Fault::Missing { document: id, planned, needed }) }
}

fn in_range(
    document: &Document,
    number: usize,
    task: &PlannedTask,
    geometry: &HeadGeometry,
) -> Result<(), Fault> {
    let (tokens, heads) = (Span::to(document.tokens()), Span::to(geometry.kv_heads()));
    for (field, span, bound) in
        [("q", task.q, tokens), ("kv", task.kv, tokens), ("kv_heads", task.kv_heads, heads)]
    {
        if !bound.covers(span) {
            return Err(Fault::OutOfRange { task: number, document: document.id(), field, span, bound });
        }
    }
    Ok(())
}

/// Two pieces that hold a common cell, the first of them first. Parts of one piece never do.
fn overlap(pieces: &[Piece]) -> Option<(usize, usize)> {
    let parts: Vec<MaskPart> = pieces.iter().flat_map(|piece| piece.parts.iter().copied()).collect();
    let Err(InvalidAttention::Overlap { first, second }) = Mask::new(parts) else { return None };
    let mut ends = Vec::with_capacity(pieces.len());
    let mut end = 0;
    for piece in pieces {
        end += piece.parts.len();
        ends.push(end);
    }
    let owner = |part: usize| ends.partition_point(|&end| end <= part);
    Some((owner(first), owner(second)))
}
