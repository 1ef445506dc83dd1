//! One tick's documents and ranks, and how a setting places them.

use std::collections::BTreeMap;

use outboard_attention::{Document, DocumentId, HomeRange, Span};

use super::anneal::{anneal, cost};
use super::bin::{Bin, Room, Segment, Terms, cells};
use super::fill::{Load, Short, fill};
use super::pack::{Whim, pack};
use crate::cost::Cost;
use crate::search::Random;
use crate::sheet::Sheet;
use crate::{PlanError, Problem};

/// Documents are cut at multiples of this many tokens where ranks may differ by as many.
const BLOCK: usize = 128;
/// Work that bins are filled up to, of their shares.
const CAP: f64 = 1.007;
/// What a rank without a slot is taken to compute when short documents are dealt out, of what the others do on average.
const IDLE: f64 = 0.01;

/// Whole documents of no more than this part of a rank's work are not cut to balance it.
const SMALL: f64 = 0.02;
/// Few ranks get as many exchanges as this many, or as this many for each long document.
const FEW: usize = 64;
const EACH: usize = 8;

/// How a tick is packed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setting {
    /// How dear slices are taken to be.
    pub(super) dear: f64,
    /// What ranks that fetch much pay besides.
    pub(super) toll: f64,
    /// For each rank, of as many as [`FEW`] at least.
    pub(super) exchanges: usize,
}

/// Who holds which tokens of documents.
pub(super) type Homes = BTreeMap<DocumentId, Vec<HomeRange>>;

/// Tokens `[from, to)` of the `document`-th without homes, on the `rank`-th rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Part {
    document: usize,
    from: usize,
    to: usize,
    rank: usize,
}

/// A tick's documents, long and short, and the long ones in bins: cut where they do not fit, and whole.
#[derive(Clone, Debug)]
pub(super) struct Sorted {
    pub(super) short: Vec<Short>,
    long: usize,
    pub(super) terms: Terms,
    pub(super) empty: Vec<Room>,
    pub(super) packed: [Vec<Bin>; 2],
}

impl Sorted {
    /// How many documents are long.
    pub(super) fn long(&self) -> usize {
        self.long
    }
}

/// What a setting makes of a tick.
#[derive(Clone, Debug, Default)]
pub(super) struct Draft {
    /// Long documents, and those that were parted: in order of documents and tokens.
    parts: Vec<Part>,
    /// Short documents that stay whole.
    whole: Vec<Part>,
}

/// One tick: what is to be placed, and where.
pub(super) struct Field<'a> {
    /// Those without homes.
    pub(super) free: Vec<Free<'a>>,
    pub(super) ranks: Vec<Rank>,
    /// Bytes of a row over those of a key.
    row: f64,
    pub(super) kv_heads: f64,
    /// Cells of one kv head on average.
    all: f64,
    pub(super) mean_tokens: f64,
    pub(super) block: usize,
}

pub(super) struct Free<'a> {
    document: &'a Document,
    /// Cells of one kv head on average.
    cells: f64,
}

pub(super) struct Rank {
    pub(super) rank: u32,
    /// Tokens that it may hold besides those it is home of.
    pub(super) space: usize,
    pub(super) tokens: usize,
    pub(super) cells: f64,
    /// Its part of all work.
    share: f64,
    /// The same, and a little of a rank without a slot.
    pub(super) weight: f64,
}

impl<'a> Field<'a> {
    /// Of a tick's documents, with and without homes. There is at least one without.
    pub(super) fn new(
        problem: &'a Problem,
        documents: &[&'a Document],
        slack: f64,
    ) -> Result<Field<'a>, PlanError> {
        let mut ranks = ranks(problem, documents);
        let work = work(problem, documents, &mut ranks);
        let tokens: usize = documents.iter().map(|document| document.tokens()).sum();
        let mean_tokens = tokens as f64 / ranks.len().max(1) as f64;
        // Nothing is spread more evenly than to a token.
        let most = ((1.0 + slack) * mean_tokens).max(mean_tokens.ceil()) as usize;
        for rank in ranks.values_mut() {
            rank.space = most.checked_sub(rank.tokens).ok_or_else(|| too_many(rank, most, documents))?;
        }
        let mut block = BLOCK;
        while block > 1 && 2 * block > most - mean_tokens as usize {
            block /= 2;
        }
        let cells = |document: &Document| work.get(&document.id()).copied().unwrap_or(0.0);
        let free = documents.iter().filter(|document| !document.is_placed());
        let free: Vec<Free<'a>> = free.map(|&document| Free { document, cells: cells(document) }).collect();
        if let (true, Some(free)) = (ranks.is_empty(), free.first()) {
            return Err(PlanError::NoRank { document: free.document.id() });
        }
        let Cost { row, key, .. } = Cost::new(&problem.geometry);
        Ok(Field {
            free,
            ranks: ranks.into_values().collect(),
            row: row as f64 / key as f64,
            kv_heads: problem.geometry.kv_heads() as f64,
            all: work.values().sum(),
            mean_tokens,
            block,
        })
    }

    /// Tells long documents, which have this part of a rank's work, from short ones.
    pub(super) fn sort(&self, long: f64) -> Sorted {
        let all = self.all;
        let mean = all / self.ranks.len() as f64;
        let (mut segments, mut short) = (Vec::new(), Vec::new());
        for (document, Free { document: of, cells }) in self.free.iter().enumerate() {
            if of.is_causal() && *cells > long * mean {
                segments.push(Segment { document, lo: 0.0, hi: of.tokens() as f64 });
            } else {
                short.push(Short { document, from: 0, to: of.tokens(), cells: *cells });
            }
        }
        let tokens: usize = short.iter().map(|short| short.to).sum();
        let density = short.iter().map(|short| short.cells).sum::<f64>() / tokens.max(1) as f64;
        let terms = Terms::new(self.row, self.kv_heads, self.mean_tokens, self.block as f64, density);
        let room = |rank: &Rank| Room {
            excess: CAP * rank.share * all - rank.cells - density * (self.mean_tokens - rank.tokens as f64),
            tokens: rank.space as f64,
        };
        let empty: Vec<Room> = self.ranks.iter().map(room).collect();
        let packed = [0.0, 1.0].map(|whole| {
            let mut bins: Vec<Bin> = empty.iter().map(|room| Bin::new(*room)).collect();
            let whim = Whim { whole, ..Whim::default() };
            pack(&terms, &mut bins, &mut segments.clone(), &mut Vec::new(), whim, &mut Random::new(0));
            bins
        });
        Sorted { short, long: segments.len(), terms, empty, packed }
    }

    /// Homes of those without, by a setting.
    pub(super) fn draft(&self, sorted: &Sorted, setting: Setting) -> Draft {
        let Sorted { short, empty, .. } = sorted;
        let toll = setting.toll * self.mean_tokens;
        let terms = Terms { dear: setting.dear, toll, ..sorted.terms };
        let [cut, mut bins] = sorted.packed.clone().map(|mut bins| {
            bins.iter_mut().for_each(|bin| bin.settle(&terms));
            bins
        });
        if cost(&cut) <= cost(&bins) {
            bins = cut;
        }
        anneal(&terms, &mut bins, empty, self.exchanges(sorted, setting.exchanges), &mut Random::new(1));
        self.finish(bins, short.clone())
    }

    /// So many for each rank.
    pub(super) fn exchanges(&self, sorted: &Sorted, each: usize) -> usize {
        each * self.ranks.len().max(FEW.min(EACH * sorted.long()))
    }

    /// Documents in their order fill rank after rank up to the mean number of tokens, and are cut where one is full: the
    /// homes that trainers give which look at no lengths.
    pub(super) fn in_order(&self) -> Draft {
        let mut draft = Draft::default();
        let full = self.mean_tokens.ceil() as usize;
        let mut ranks = self.ranks.iter().map(|rank| full.saturating_sub(rank.tokens)).enumerate();
        let (mut rank, mut space) = (0, 0);
        for (document, free) in self.free.iter().enumerate() {
            let (mut from, tokens) = (0, free.document.tokens());
            while from < tokens {
                if space == 0 {
                    let Some(next) = ranks.next() else { return draft };
                    (rank, space) = next;
                    continue;
                }
                let to = tokens.min(from + space);
                let part = Part { document, from, to, rank };
                if to - from == tokens {
                    draft.whole.push(part)
                } else {
                    draft.parts.push(part)
                }
                space -= to - from;
                from = to;
            }
        }
        draft
    }

    /// Fills the ranks with short documents.
    pub(super) fn finish(&self, mut bins: Vec<Bin>, mut short: Vec<Short>) -> Draft {
        self.within_space(&mut bins, &mut short);
        let load = |(rank, bin): (&Rank, &Bin)| {
            let held: f64 = bin.segments.iter().map(|segment| segment.hi - segment.lo).sum();
            let cells: f64 = bin.segments.iter().map(|segment| cells(segment.lo, segment.hi)).sum();
            Load {
                space: rank.space - held as usize,
                wanted: self.mean_tokens - rank.tokens as f64 - held,
                cells: rank.cells + cells,
                weight: rank.weight,
            }
        };
        let mut loads: Vec<Load> = self.ranks.iter().zip(&bins).map(load).collect();
        let mut draft = Draft::default();
        for (rank, bin) in bins.iter().enumerate() {
            let part =
                |s: &Segment| Part { document: s.document, from: s.lo as usize, to: s.hi as usize, rank };
            draft.parts.extend(bin.segments.iter().map(part));
        }
        fill(short, &mut loads, self.block, |rank, Short { document, from, to, .. }| {
            let whole = from == 0 && to == self.free[document].document.tokens();
            let part = Part { document, from, to, rank };
            if whole { draft.whole.push(part) } else { draft.parts.push(part) }
        });
        draft.parts.sort_unstable();
        draft
    }

    /// Homes of all documents of a draft.
    pub(super) fn homes(&self, draft: &Draft) -> Homes {
        self.homes_of(draft.parts.iter().chain(&draft.whole))
    }

    /// Homes by parts, those of one document in order of tokens.
    fn homes_of<'b>(&self, parts: impl Iterator<Item = &'b Part>) -> Homes {
        let mut homes = Homes::new();
        for &Part { document, from, to, rank } in parts {
            let (rank, tokens) = (self.ranks[rank].rank, Span::at(from, to - from));
            let homes = homes.entry(self.free[document].document.id()).or_default();
            match homes.last_mut() {
                Some(last) if last.rank == rank => last.tokens = last.tokens.hull(tokens),
                _ => homes.push(HomeRange { rank, tokens }),
            }
        }
        homes
    }

    /// The same of documents that may have to move, and cells that each rank has besides, all kv heads together.
    /// All documents where their `shapes` count.
    pub(super) fn what_may_move(&self, draft: &Draft, shapes: bool) -> (Homes, BTreeMap<u32, u64>) {
        let mut besides: BTreeMap<u32, f64> = BTreeMap::new();
        let mut rest = Vec::new();
        for part in &draft.whole {
            let rank = &self.ranks[part.rank];
            let small = self.free[part.document].cells <= SMALL * self.all / self.ranks.len() as f64;
            if rank.share > 0.0 && small && !shapes {
                *besides.entry(rank.rank).or_default() += self.free[part.document].cells * self.kv_heads;
            } else {
                rest.push(part);
            }
        }
        let homes = self.homes_of(draft.parts.iter().chain(rest));
        (homes, besides.into_iter().map(|(rank, cells)| (rank, cells as u64)).collect())
    }

    /// Takes from bins what is more tokens than they may hold: the first rows of their longest segments.
    fn within_space(&self, bins: &mut [Bin], short: &mut Vec<Short>) {
        for (bin, rank) in bins.iter_mut().zip(&self.ranks) {
            let tokens = |segment: &Segment| segment.hi - segment.lo;
            let mut over = bin.segments.iter().map(tokens).sum::<f64>() - rank.space as f64;
            while over > 0.0 {
                let longest = bin.segments.iter_mut().max_by(|a, b| tokens(a).total_cmp(&tokens(b)));
                let Some(segment) = longest else { break };
                let block = self.block as f64;
                let end = ((segment.lo + over) / block).ceil() * block;
                let (from, to) = (segment.lo, end.min(segment.hi));
                let document = segment.document;
                short.push(Short { document, from: from as usize, to: to as usize, cells: cells(from, to) });
                segment.lo = to;
                over -= to - from;
                bin.segments.retain(|segment| segment.lo < segment.hi);
            }
        }
    }
}

/// Those with a slot, and those that are home of something. Where none has a slot, all are taken to compute alike.
fn ranks(problem: &Problem, documents: &[&Document]) -> BTreeMap<u32, Rank> {
    let all: f64 = problem.slots.iter().map(|slot| slot.weight).sum();
    let with_slot: Vec<(u32, f64)> =
        problem.slots.iter().filter_map(|slot| Some((slot.rank?, slot.weight / all))).collect();
    let mean = with_slot.iter().map(|(_, share)| share).sum::<f64>() / with_slot.len().max(1) as f64;
    let idle = if with_slot.is_empty() { 1.0 } else { IDLE * mean };
    let empty =
        |rank: u32, share: f64, weight: f64| Rank { rank, space: 0, tokens: 0, cells: 0.0, share, weight };
    let mut ranks: BTreeMap<u32, Rank> =
        with_slot.into_iter().map(|(rank, share)| (rank, empty(rank, share, share))).collect();
    for rank in 0..problem.ranks {
        ranks.entry(rank).or_insert_with(|| empty(rank, 0.0, idle));
    }
    for home in documents.iter().flat_map(|document| document.homes()) {
        let rank = ranks.entry(home.rank).or_insert_with(|| empty(home.rank, 0.0, idle));
        rank.tokens += home.tokens.len();
    }
    ranks
}

/// Cells of each document, for one kv head on average; adds to the ranks those that they are home of.
fn work(
    problem: &Problem,
    documents: &[&Document],
    ranks: &mut BTreeMap<u32, Rank>,
) -> BTreeMap<DocumentId, f64> {
    let mut work: BTreeMap<DocumentId, f64> = BTreeMap::new();
    let kv_heads = problem.geometry.kv_heads();
    for sheet in Sheet::of(documents, kv_heads) {
        let heads = sheet.kv_heads.len() as f64 / kv_heads as f64;
        *work.entry(sheet.document.id()).or_default() += heads * sheet.cells(sheet.all_keys()) as f64;
        for home in sheet.document.homes() {
            if let Some(rank) = ranks.get_mut(&home.rank) {
                rank.cells += heads * sheet.cells(home.tokens) as f64;
            }
        }
    }
    work
}

/// A rank is home of more than it may hold.
fn too_many(rank: &Rank, most: usize, documents: &[&Document]) -> PlanError {
    let tick = documents.first().map_or(0, |document| document.tick());
    let held = |document: &&&Document| -> usize {
        let homes = document.homes().iter().filter(|home| home.rank == rank.rank);
        homes.map(|home| home.tokens.len()).sum()
    };
    let largest = documents.iter().max_by_key(held).map(|document| document.id());
    PlanError::PinnedTooMany {
        rank: rank.rank,
        tick,
        tokens: rank.tokens,
        most,
        document: largest.unwrap_or(DocumentId { rank: rank.rank, index: 0 }),
    }
}
