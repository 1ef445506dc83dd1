//! Ready-made sparse masks: blocks, and vertical columns with slashes.

use super::{BandSlice, Mask, check_heads, check_range, check_slices, check_tokens};
use crate::{InvalidAttention, MAX_TOKENS, Span};

impl Mask {
    /// Block-sparse attention: the document is cut into blocks of `block` tokens, the last of which may be shorter, and
    /// the queries of block `a` see the keys of block `b` for each `(a, b)` of `blocks`, a set in any order. With
    /// `causal`, only the keys up to the query among them: blocks on the diagonal are cut along it, those beyond it
    /// have no cell. The mask may turn out empty.
    ///
    /// Adjacent blocks of a row share a slice, and so do equal runs of adjacent rows, and runs of adjacent rows that
    /// start together and end on a causal diagonal.
    ///
    /// # Errors
    /// [`InvalidAttention::OutOfRange`] unless `tokens` and `block` are within `1..=`[`MAX_TOKENS`], for a block that
    /// the document does not have, or for more than [`MAX_MASK_SLICES`](crate::MAX_MASK_SLICES) slices;
    /// [`InvalidAttention::EmptySpan`] or [`InvalidAttention::OutsideSpan`] for no heads or heads from
    /// [`MAX_HEADS`](crate::MAX_HEADS) on.
    pub fn block_sparse(
        tokens: usize,
        block: usize,
        blocks: &[(usize, usize)],
        causal: bool,
        kv_heads: Span,
    ) -> Result<Mask, InvalidAttention> {
        check_tokens(tokens)?;
        check_range("block of block_sparse", block, 1, MAX_TOKENS)?;
        check_heads(kv_heads)?;
        let last = (tokens - 1) / block;
        for (q, kv) in blocks {
            check_range("query block of block_sparse", *q, 0, last)?;
            check_range("key block of block_sparse", *kv, 0, last)?;
        }
        let mut cells: Vec<_> = blocks.iter().copied().filter(|(q, kv)| !causal || kv <= q).collect();
        cells.sort_unstable();
        cells.dedup();
        let runs = cells.chunk_by(|a, b| a.0 == b.0 && a.1 + 1 == b.1).filter_map(|run| {
            let (row, first) = *run.first()?;
            let end = first + run.len();
            let diagonal = causal && end == row + 1;
            Some(BlockRun { rows: Span::at(row, 1), keys: Span::at(first, run.len()), diagonal })
        });
        let runs = join_rows(runs);
        check_slices(runs.len())?;
        let positions = |blocks: Span| {
            let end = blocks.end().saturating_mul(block).min(tokens);
            Span::at(blocks.start() * block, end - blocks.start() * block)
        };
        let slices = runs.into_iter().map(|run| BandSlice {
            q: positions(run.rows),
            kv: positions(run.keys),
            lo: None,
            hi: run.diagonal.then_some(0),
        });
        Ok(Mask::of(slices, kv_heads))
    }

    /// Vertical columns and slashes (MInference): query `i` sees key `j <= i` when `j` is one of `columns`, or the
    /// distance `i - j` lies in one of the ranges `slashes`. Both are sets in any order, and may overlap; a cell counts
    /// once. The distance zero is the token itself: leave it out, and a query may see nothing.
    ///
    /// Slashes that overlap or touch become one band of one slice. Adjacent columns are taken together and cut where
    /// bands cross them: one slice below, above and between each two bands, so at most two for a single band.
    ///
    /// # Errors
    /// [`InvalidAttention::OutOfRange`] unless `tokens` is within `1..=`[`MAX_TOKENS`], for a column outside the
    /// document, or when columns and bands would make more than [`MAX_MASK_SLICES`](crate::MAX_MASK_SLICES) slices in a
    /// document without end; [`InvalidAttention::EmptySpan`] or
    /// [`InvalidAttention::OutsideSpan`] for a slash without distances or with one of `tokens` or more, and for no heads
    /// or heads from [`MAX_HEADS`](crate::MAX_HEADS) on.
    pub fn vertical_slash(
        tokens: usize,
        columns: &[usize],
        slashes: &[Span],
        kv_heads: Span,
    ) -> Result<Mask, InvalidAttention> {
        check_tokens(tokens)?;
        check_heads(kv_heads)?;
        let bound = Span::to(tokens);
        for column in columns {
            check_range("column of vertical_slash", *column, 0, tokens - 1)?;
        }
        for span in slashes.iter().copied() {
            let (field, bound_name) = ("slash of vertical_slash", "the document's distances");
            if span.is_empty() {
                return Err(InvalidAttention::EmptySpan { field, span });
            }
            if !bound.covers(span) {
                return Err(InvalidAttention::OutsideSpan { field, span, bound_name, bound });
            }
        }
        let bands = union(slashes.iter().copied());
        let columns = union(columns.iter().map(|column| Span::at(*column, 1)));
        let gaps = complement(&bands, tokens);
        check_slices(bands.len().saturating_add(columns.len().saturating_mul(gaps.len())))?;
        let mut slices: Vec<_> = bands.iter().filter_map(|band| diagonal(*band, bound, tokens)).collect();
        for column in columns {
            slices.extend(gaps.iter().filter_map(|gap| diagonal(*gap, column, tokens)));
        }
        Ok(Mask::of(slices, kv_heads))
    }
}

/// Blocks that become one slice, counted in blocks.
#[derive(Clone, Copy, Debug)]
struct BlockRun {
    rows: Span,
    keys: Span,
    /// Its last block of each row lies on a causal diagonal.
    diagonal: bool,
}

/// Joins runs of adjacent rows. They come, and go, by row and then by key.
fn join_rows(runs: impl Iterator<Item = BlockRun>) -> Vec<BlockRun> {
    let mut joined: Vec<BlockRun> = Vec::new();
    // Which of those joined may still grow: the previous row's and this row's, both by key.
    let (mut previous, mut current) = (Vec::new(), Vec::new());
    let mut row = 0;
    let mut at = 0;
    for run in runs {
        if run.rows.start() != row {
            previous = if run.rows.start() == row + 1 { std::mem::take(&mut current) } else { Vec::new() };
            current.clear();
            (row, at) = (run.rows.start(), 0);
        }
        let before = |index: &usize| joined[*index].keys.start() < run.keys.start();
        at += previous[at..].iter().take_while(|index| before(index)).count();
        let grows = previous.get(at).copied().filter(|index| {
            let above = &joined[*index];
            let alike = above.keys == run.keys || run.diagonal && above.keys.start() == run.keys.start();
            above.diagonal == run.diagonal && alike
        });
        let index = grows.unwrap_or(joined.len());
        match grows {
            Some(index) => {
                joined[index].rows = joined[index].rows.hull(run.rows);
                joined[index].keys = joined[index].keys.hull(run.keys);
            }
            None => joined.push(run),
        }
        current.push(index);
    }
    joined
}

/// The cells of the keys `kv` whose query comes `distances` after them, `None` when the document ends before it.
fn diagonal(distances: Span, kv: Span, tokens: usize) -> Option<BandSlice> {
    let (nearest, farthest) = (distances.start(), distances.end() - 1);
    let q = Span::new(kv.start() + nearest, (kv.end() + farthest).min(tokens))?;
    let kv = kv.intersect(Span::to(tokens - nearest));
    // Farther than any query of the document is no bound.
    let lo = (kv.start() + farthest + 1 < tokens).then_some(-(farthest as i64));
    (!q.is_empty() && !kv.is_empty()).then_some(BandSlice { q, kv, lo, hi: Some(-(nearest as i64)) })
}

/// The same elements in as few spans as possible, in order.
fn union(spans: impl Iterator<Item = Span>) -> Vec<Span> {
    let mut spans: Vec<Span> = spans.collect();
    spans.sort_unstable();
    spans.dedup_by(|next, last| {
        let touch = next.start() <= last.end();
        if touch {
            *last = last.hull(*next);
        }
        touch
    });
    spans
}

/// What `spans`, apart and in order, leave of `[0, end)`.
fn complement(spans: &[Span], end: usize) -> Vec<Span> {
    let starts = [0].into_iter().chain(spans.iter().map(|s| s.end()));
    let ends = spans.iter().map(|s| s.start()).chain([end]);
    starts.zip(ends).filter_map(|(start, end)| Span::new(start, end)).filter(|s| !s.is_empty()).collect()
}
