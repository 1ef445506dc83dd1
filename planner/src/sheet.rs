//! Sheets and strips: documents as the planner sees them.

use outboard_attention::{BandSlice, Document, Span};

use crate::rows::Rows;

/// A document and those of its kv heads that share one mask.
#[derive(Clone, Debug)]
pub(crate) struct Sheet<'a> {
    pub(crate) document: &'a Document,
    pub(crate) kv_heads: Span,
    /// Empty where the document is causal.
    slices: Vec<BandSlice>,
    rows: Rows,
}

impl Sheet<'_> {
    /// The sheets of documents, in their order and that of heads. Heads that see nothing have none.
    pub(crate) fn of<'a>(documents: &[&'a Document], kv_heads: usize) -> Vec<Sheet<'a>> {
        let mut sheets = Vec::with_capacity(documents.len());
        for document in documents {
            if document.is_causal() {
                let rows = Rows::causal(document.tokens());
                sheets.push(Sheet { document, kv_heads: Span::to(kv_heads), slices: Vec::new(), rows });
            } else {
                sheets.extend(Sheet::masked(document, kv_heads));
            }
        }
        sheets
    }

    fn masked(document: &Document, kv_heads: usize) -> impl Iterator<Item = Sheet<'_>> {
        let mask = document.mask(kv_heads);
        let mut borders: Vec<usize> =
            mask.parts().iter().flat_map(|p| [p.kv_heads.start(), p.kv_heads.end()]).collect();
        borders.sort_unstable();
        borders.dedup();
        let mut classes: Vec<(Span, Vec<BandSlice>)> = Vec::new();
        for pair in borders.windows(2) {
            let heads = Span::at(pair[0], pair[1] - pair[0]);
            let slices: Vec<BandSlice> = mask.slices_of(pair[0]).copied().collect();
            match classes.last_mut() {
                Some((last, same)) if last.end() == heads.start() && *same == slices => {
                    *last = last.hull(heads)
                }
                _ => classes.push((heads, slices)),
            }
        }
        let sheet = |(kv_heads, slices): (Span, Vec<BandSlice>)| {
            let rows = Rows::new(&slices, document.tokens());
            Sheet { document, kv_heads, slices, rows }
        };
        classes.into_iter().filter(|(_, slices)| !slices.is_empty()).map(sheet)
    }

    /// Cells of the rows `q`, for one kv head.
    pub(crate) fn cells(&self, q: Span) -> u64 {
        self.rows.upto(q.end()) - self.rows.upto(q.start())
    }

    /// The most cells that a row of `q` holds, for one kv head.
    pub(crate) fn heaviest(&self, q: Span) -> u64 {
        self.rows.heaviest(q.start(), q.end())
    }

    /// The smallest range of rows that holds all cells of the rows `q`.
    pub(crate) fn trim(&self, q: Span) -> Span {
        if self.is_causal() {
            return q.intersect(Span::to(self.document.tokens()));
        }
        let (before, upto) = (self.rows.upto(q.start()), self.rows.upto(q.end()));
        if before == upto {
            return Span::at(q.start(), 0);
        }
        let start = self.rows.reach(before + 1).saturating_sub(1);
        Span::new(start, self.rows.reach(upto)).unwrap_or_default()
    }

    /// The last rows before `end` that hold `cells` cells, or a little more: where they start.
    pub(crate) fn start_of(&self, end: usize, cells: u64) -> usize {
        let before = self.rows.upto(end).saturating_sub(cells);
        // The last row at which no more than `before` cells lie behind.
        self.rows.reach(before + 1).saturating_sub(1)
    }

    /// The first rows from `start` that hold `cells` cells, or a little more: where they end.
    pub(crate) fn end_of(&self, start: usize, cells: u64) -> usize {
        self.rows.reach(self.rows.upto(start).saturating_add(cells))
    }

    /// From the first to the last key that the rows `q` see.
    pub(crate) fn keys(&self, q: Span) -> Span {
        if self.is_causal() {
            return if q.is_empty() { Span::default() } else { Span::to(q.end()) };
        }
        let seen = |slice: &BandSlice| extent(slice, q).map(|(_, keys)| keys);
        self.slices.iter().filter_map(seen).reduce(Span::hull).unwrap_or_default()
    }

    /// True when every row sees all keys up to its own position and no other.
    pub(crate) fn is_causal(&self) -> bool {
        self.document.is_causal()
    }
}

/// Rows of some kv heads of a sheet with all the keys they see: what a slot holds, and what moves. Holds at least one
/// cell, and its first and last row do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strip {
    /// Index of the sheet.
    pub(crate) sheet: usize,
    pub(crate) kv_heads: Span,
    pub(crate) q: Span,
    /// Cells of one kv head.
    pub(crate) unit: u64,
}

impl Strip {
    /// The strip without rows that see nothing, `None` when that leaves no cell.
    pub(crate) fn new(sheets: &[Sheet<'_>], sheet: usize, kv_heads: Span, q: Span) -> Option<Strip> {
        let rows = sheets.get(sheet)?;
        let q = rows.trim(q);
        let unit = rows.cells(q);
        (unit > 0 && !kv_heads.is_empty()).then_some(Strip { sheet, kv_heads, q, unit })
    }

    /// Cells of all its kv heads.
    pub(crate) fn cells(&self) -> u64 {
        self.unit * self.kv_heads.len() as u64
    }

    /// Order in which equal strips are told apart.
    pub(crate) fn place(&self) -> (usize, Span, Span) {
        (self.sheet, self.kv_heads, self.q)
    }
}

/// From the first to the last row of `q` that sees a key of the slice, and from the first to the last key seen.
pub(crate) fn extent(slice: &BandSlice, q: Span) -> Option<(Span, Span)> {
    let (start, end) = (slice.kv().start() as i64, slice.kv().end() as i64);
    let rows = slice.q().intersect(q);
    // Both ends of a row's keys rise with the row, so the first and the last row that see any have the ends.
    let first = slice.hi().map_or(i64::MIN, |hi| start.saturating_sub(hi)).max(rows.start() as i64);
    let last = slice.lo().map_or(i64::MAX, |lo| end.saturating_sub(lo)).min(rows.end() as i64) - 1;
    let (first, last) = (usize::try_from(first).ok()?, usize::try_from(last).ok()?);
    let rows = Span::new(first, last + 1).filter(|rows| !rows.is_empty())?;
    Some((rows, slice.keys_of(first).hull(slice.keys_of(last))))
}
