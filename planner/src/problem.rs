//! What is to be planned.

use std::collections::BTreeMap;

use outboard_attention::{Document, HeadGeometry};

use crate::{PlanError, Profile, Rates};

/// The tolerance of a problem that names none: the busiest slot within 1% of the mean.
pub const DEFAULT_TOLERANCE: f64 = 0.01;

/// Largest number of cells of a step, summed over kv heads, so that sums of work fit 64 bits with room to spare.
const MAX_CELLS: u64 = 1 << 61;
/// Largest number of ranks to place documents on.
const MAX_RANKS: u32 = 1 << 20;
/// Largest number of slots.
const MAX_SLOTS: usize = 1 << 20;
/// Least of a link, relative to the others; the most is its inverse.
pub const MIN_LINK: f64 = 1e-6;
/// Largest ratio of the weights' sum to the smallest weight.
const MAX_WEIGHT_RATIO: f64 = 1e12;

/// One unit of a job's planned parallelism.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slot {
    /// The rank whose device the slot shares, `None` for a slot of a dedicated pool.
    pub rank: Option<u32>,
    /// How much work the slot takes, relative to the others: finite and above zero.
    pub weight: f64,
    /// How much its link carries, each way, relative to [`Rates::bytes_per_second`]: finite and above zero.
    pub link: f64,
    /// Bytes of tokens from other ranks that it may hold at once: O and LSE of one layer, and Q, K and V of as many as
    /// [`Problem::kept`] says.
    pub memory: Option<u64>,
}

impl Slot {
    /// A slot of weight and link 1 on the device of `rank`.
    pub fn in_place(rank: u32) -> Slot {
        Slot { rank: Some(rank), weight: 1.0, link: 1.0, memory: None }
    }

    /// A slot of weight and link 1 with a device of its own.
    pub fn dedicated() -> Slot {
        Slot { rank: None, weight: 1.0, link: 1.0, memory: None }
    }
}

/// One step of a job (of one tensor-parallel lane): documents to compute and slots to compute them.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// Heads of the layers; bytes are counted with its element type.
    pub geometry: HeadGeometry,
    /// The step's documents, in any order; they are planned in the order of their ids.
    pub documents: Vec<Document>,
    /// The job's slots; a task's slot is an index into them.
    pub slots: Vec<Slot>,
    /// How far the busiest slot may lie above the mean, as a fraction of it: 0 to 1. More tolerance moves fewer bytes.
    pub tolerance: f64,
    /// How fast slots compute and links carry. When given, layer time is what counts, and the tolerance does not: slow
    /// links leave work at home, fast ones spread it evenly. Without, the plan balances within the tolerance, and moves
    /// the fewest bytes that allow it.
    pub rates: Option<Rates>,
    /// How long a device of speed 1 takes for tasks of each shape. Where given, what it predicts is balanced, and not
    /// cells, and layer time is counted by it, and not by the rates' FLOPs a second.
    pub profile: Option<Profile>,
    /// In how many layers at once slots keep the Q, K and V of a tick, at least 1: the layers times the micro-batches in
    /// flight, where they are kept from the forward to the backward pass. Counts where memory is limited.
    pub kept: u64,
    /// Ranks below this number may hold documents that come without homes, besides those that have a slot or that other
    /// documents of the tick name: the job's ranks where some of them have no slot, 0 where all have.
    pub ranks: u32,
}

impl Problem {
    /// A problem with the [`DEFAULT_TOLERANCE`].
    pub fn new(geometry: HeadGeometry, documents: Vec<Document>, slots: Vec<Slot>) -> Problem {
        let tolerance = DEFAULT_TOLERANCE;
        Problem { geometry, documents, slots, tolerance, rates: None, profile: None, kept: 1, ranks: 0 }
    }

    /// Checks that the problem can be planned.
    ///
    /// # Errors
    /// The first [`PlanError`] found.
    pub fn check(&self) -> Result<(), PlanError> {
        if let Some(document) = self.documents.iter().find(|document| !document.is_placed()) {
            return Err(PlanError::NoHome { document: document.id() });
        }
        self.check_all_but_homes()
    }

    /// The same for documents whose homes may be still to be chosen.
    pub(crate) fn check_all_but_homes(&self) -> Result<(), PlanError> {
        self.check_slots()?;
        if !(0.0..=1.0).contains(&self.tolerance) {
            return Err(PlanError::BadTolerance { tolerance: self.tolerance });
        }
        if self.kept == 0 {
            return Err(PlanError::NothingKept);
        }
        if self.ranks > MAX_RANKS {
            return Err(PlanError::TooManyRanks { ranks: self.ranks, max: MAX_RANKS });
        }
        if let Some(Rates { flops_per_second, bytes_per_second }) = self.rates {
            let rates = [("flops_per_second", flops_per_second), ("bytes_per_second", bytes_per_second)];
            if let Some((name, rate)) = rates.into_iter().find(|(_, rate)| !(rate.is_finite() && *rate > 0.0))
            {
                return Err(PlanError::BadRate { name, rate });
            }
        }
        let mut ids: Vec<_> = self.documents.iter().map(Document::id).collect();
        ids.sort_unstable();
        if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(PlanError::DuplicateDocument { document: pair[0] });
        }
        let kv_heads = self.geometry.kv_heads();
        let mut cells = 0u128;
        for document in &self.documents {
            cells += cells_of(document, kv_heads);
            if cells > u128::from(MAX_CELLS) {
                return Err(PlanError::TooManyCells { cells, kv_heads, max: MAX_CELLS });
            }
        }
        Ok(())
    }

    fn check_slots(&self) -> Result<(), PlanError> {
        if self.slots.is_empty() {
            return Err(PlanError::NoSlots);
        }
        if self.slots.len() > MAX_SLOTS {
            return Err(PlanError::TooManySlots { slots: self.slots.len(), max: MAX_SLOTS });
        }
        let mut of_rank = BTreeMap::new();
        let (mut total, mut smallest) = (0.0, f64::INFINITY);
        for (slot, &Slot { rank, weight, link, .. }) in self.slots.iter().enumerate() {
            if !(MIN_LINK..=1.0 / MIN_LINK).contains(&link) {
                return Err(PlanError::BadLink { slot, link, least: MIN_LINK, most: 1.0 / MIN_LINK });
            }
            if !(weight.is_finite() && weight > 0.0) {
                return Err(PlanError::BadWeight { slot, weight });
            }
            (total, smallest) = (total + weight, weight.min(smallest));
            if let Some(rank) = rank
                && let Some(first) = of_rank.insert(rank, slot)
            {
                return Err(PlanError::SharedRank { rank, first, second: slot });
            }
        }
        let ratio = total / smallest;
        if total.is_finite() && ratio <= MAX_WEIGHT_RATIO {
            Ok(())
        } else {
            Err(PlanError::WeightRange { total, smallest })
        }
    }
}

/// Cells of a document, summed over kv heads.
fn cells_of(document: &Document, kv_heads: usize) -> u128 {
    if document.is_causal() {
        let tokens = document.tokens() as u128;
        return tokens * (tokens + 1) / 2 * kv_heads as u128;
    }
    let mask = document.mask(kv_heads);
    mask.parts().iter().map(|p| u128::from(p.slice.cells()) * p.kv_heads.len() as u128).sum()
}
