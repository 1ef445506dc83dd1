//! Step plans: every task of a step and the slot that computes it.

use std::collections::BTreeMap;

use crate::{Document, DocumentId, HeadGeometry, InvalidAttention, Mask, Span, Task};

/// A task as planned: its rectangle, its slot, and its place in a reduction group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedTask {
    /// The document it cuts.
    pub document: DocumentId,
    /// Query positions.
    pub q: Span,
    /// Key positions.
    pub kv: Span,
    /// The kv heads, all their query heads with them.
    pub kv_heads: Span,
    /// Who computes it, in units of planned parallelism.
    pub slot: u32,
    /// Reduction group, unique within the plan: its tasks' partial dK and dV are summed from zero by `position`, and
    /// group sums are added at home in the order of group numbers.
    pub group: u32,
    /// Place within the group, from zero.
    pub position: u32,
}

impl PlannedTask {
    /// The task with its part of the document's mask.
    ///
    /// # Errors
    /// As [`Task::new`].
    pub fn task(&self, mask: &Mask) -> Result<Task, InvalidAttention> {
        Task::new(self.document, self.q, self.kv, self.kv_heads, mask)
    }
}

/// What is computed together: one nano-batch.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct TickPlan {
    /// The tick's number.
    pub tick: u32,
    /// Its tasks in plan order.
    pub tasks: Vec<PlannedTask>,
}

/// Every task of a step; the same for all layers and both directions.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct StepPlan {
    /// Ticks in order of their numbers.
    pub ticks: Vec<TickPlan>,
    /// How many slots there are; every task's slot is below.
    pub slots: u32,
}

/// A plan that does not compute a step exactly once.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidPlan {
    /// A task of a document that the step does not hold in that tick.
    #[error("tick {tick} plans document {document}, which the step does not hold in that tick")]
    UnknownDocument {
        /// The tick.
        tick: u32,
        /// The document.
        document: DocumentId,
    },
    /// A task on a slot that does not exist.
    #[error("a task of document {document} is on slot {slot}; there are {slots}")]
    UnknownSlot {
        /// The document.
        document: DocumentId,
        /// The slot.
        slot: u32,
        /// How many there are.
        slots: u32,
    },
    /// Two tasks that compute the same cell.
    #[error("two tasks of document {document} overlap: queries {q}, keys {kv}, kv heads {kv_heads}")]
    Overlap {
        /// The document.
        document: DocumentId,
        /// Common queries.
        q: Span,
        /// Common keys.
        kv: Span,
        /// Common kv heads.
        kv_heads: Span,
    },
    /// Cells that no task computes.
    #[error("document {document}: its tasks hold {planned} cells, its mask {needed}")]
    Uncovered {
        /// The document.
        document: DocumentId,
        /// Cells planned.
        planned: u64,
        /// Cells of the mask.
        needed: u64,
    },
    /// A task that is no valid piece of its document.
    #[error("document {document}: {source}")]
    BadTask {
        /// The document.
        document: DocumentId,
        /// What is wrong with it.
        source: InvalidAttention,
    },
}

impl StepPlan {
    /// All tasks, tick by tick in plan order.
    pub fn tasks(&self) -> impl Iterator<Item = (u32, &PlannedTask)> {
        self.ticks.iter().flat_map(|tick| tick.tasks.iter().map(move |task| (tick.tick, task)))
    }

    /// Checks that every cell of every document is computed exactly once, on slots that exist.
    ///
    /// # Errors
    /// The first [`InvalidPlan`] found.
    pub fn check(&self, documents: &[Document], geometry: &HeadGeometry) -> Result<(), InvalidPlan> {
        let mut by_document: BTreeMap<(u32, DocumentId), Vec<&PlannedTask>> =
            documents.iter().map(|d| ((d.tick(), d.id()), Vec::new())).collect();
        for (tick, task) in self.tasks() {
            let document = task.document;
            if task.slot >= self.slots {
                return Err(InvalidPlan::UnknownSlot { document, slot: task.slot, slots: self.slots });
            }
            let tasks = by_document.get_mut(&(tick, document));
            tasks.ok_or(InvalidPlan::UnknownDocument { tick, document })?.push(task);
        }
        for document in documents {
            let tasks = &by_document[&(document.tick(), document.id())];
            check_document(document, tasks, geometry)?;
        }
        Ok(())
    }
}

fn check_document(
    document: &Document,
    tasks: &[&PlannedTask],
    geometry: &HeadGeometry,
) -> Result<(), InvalidPlan> {
    let id = document.id();
    let mask = document.mask(geometry.kv_heads());
    let mut planned = 0u64;
    for (n, a) in tasks.iter().enumerate() {
        let bad = |source| InvalidPlan::BadTask { document: id, source };
        let task = a.task(&mask).map_err(bad)?;
        task.check(geometry).map_err(bad)?;
        planned = task.cells().saturating_add(planned);
        for b in &tasks[..n] {
            let (q, kv) = (a.q.intersect(b.q), a.kv.intersect(b.kv));
            let kv_heads = a.kv_heads.intersect(b.kv_heads);
            if mask.clip(q, kv, kv_heads).cells() > 0 {
                return Err(InvalidPlan::Overlap { document: id, q, kv, kv_heads });
            }
        }
    }
    let needed = mask.cells();
    if planned == needed { Ok(()) } else { Err(InvalidPlan::Uncovered { document: id, planned, needed }) }
}
