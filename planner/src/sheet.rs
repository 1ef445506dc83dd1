//! Sheets and strips: documents as the planner sees them.

use outboard_attention::{BandSlice, Document, Span};

use crate::rows::{Ramps, Rows};

/// A document and those of its kv heads that share one mask.
#[derive(Clone, Debug)]
pub(crate) struct Sheet<'a> {
    pub(crate) document: &'a Document,
    pub(crate) kv_heads: Span,
    /// `None` where the document is causal.
    masked: Option<Masked>,
}

#[derive(Clone, Debug)]
struct Masked {
    slices: Vec<BandSlice>,
    ramps: Ramps,
}

/// A sheet's rows with those of their keys that lie in a range. Only causal documents are cut by keys: of any other
/// the range has all of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen<'a> {
    sheet: &'a Sheet<'a>,
    kv: Span,
    rows: Rows<'a>,
}

impl Sheet<'_> {
    /// The sheets of documents, in their order and that of heads. Heads that see nothing have none.
    pub(crate) fn of<'a>(documents: &[&'a Document], kv_heads: usize) -> Vec<Sheet<'a>> {
        let mut sheets = Vec::with_capacity(documents.len());
        for document in documents {
            if document.is_causal() {
                sheets.push(Sheet { document, kv_heads: Span::to(kv_heads), masked: None });
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
            let ramps = Ramps::new(&slices, document.tokens());
            Sheet { document, kv_heads, masked: Some(Masked { slices, ramps }) }
        };
        classes.into_iter().filter(|(_, slices)| !slices.is_empty()).map(sheet)
    }

    /// All of the document's keys.
    pub(crate) fn all_keys(&self) -> Span {
        Span::to(self.document.tokens())
    }

    /// Cells of the rows `q`, for one kv head.
    pub(crate) fn cells(&self, q: Span) -> u64 {
        self.seen(self.all_keys()).cells(q)
    }

    /// The rows with those of their keys that lie in `kv`.
    pub(crate) fn seen(&self, kv: Span) -> Seen<'_> {
        let rows = match &self.masked {
            None => Rows::causal(self.document.tokens(), kv),
            Some(masked) => Rows::Ramps(&masked.ramps),
        };
        Seen { sheet: self, kv, rows }
    }

    /// True when every row sees all keys up to its own position and no other.
    pub(crate) fn is_causal(&self) -> bool {
        self.masked.is_none()
    }
}

impl Seen<'_> {
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
        if self.sheet.is_causal() {
            return q.intersect(Span::new(self.kv.start(), self.sheet.document.tokens()).unwrap_or_default());
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
        let Some(masked) = &self.sheet.masked else {
            return if q.is_empty() { Span::default() } else { self.kv.intersect(Span::to(q.end())) };
        };
        let seen = |slice: &BandSlice| extent(slice, q).map(|(_, keys)| keys);
        masked.slices.iter().filter_map(seen).reduce(Span::hull).unwrap_or_default()
    }
}

/// Rows of some kv heads of a sheet with the keys they see, all or those of a range: what a slot holds, and what moves.
/// Holds at least one cell, and its first and last row do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strip {
    /// Index of the sheet.
    pub(crate) sheet: usize,
    pub(crate) kv_heads: Span,
    pub(crate) q: Span,
    /// Keys outside are another strip's.
    pub(crate) kv: Span,
    /// Cells of one kv head.
    pub(crate) unit: u64,
}

impl Strip {
    /// Rows with all the keys they see, without rows that see nothing; `None` when that leaves no cell.
    pub(crate) fn new(sheets: &[Sheet<'_>], sheet: usize, kv_heads: Span, q: Span) -> Option<Strip> {
        Strip::with_keys(sheets, sheet, kv_heads, q, sheets.get(sheet)?.all_keys())
    }

    /// The same with the keys of a range only.
    pub(crate) fn with_keys(
        sheets: &[Sheet<'_>],
        sheet: usize,
        kv_heads: Span,
        q: Span,
        kv: Span,
    ) -> Option<Strip> {
        let seen = sheets.get(sheet)?.seen(kv);
        let q = seen.trim(q);
        let unit = seen.cells(q);
        let some = unit > 0 && !kv_heads.is_empty() && !kv.is_empty();
        some.then_some(Strip { sheet, kv_heads, q, kv, unit })
    }

    /// Some rows and kv heads of it, with its keys.
    pub(crate) fn part(&self, sheets: &[Sheet<'_>], kv_heads: Span, q: Span) -> Option<Strip> {
        Strip::with_keys(sheets, self.sheet, kv_heads, q, self.kv)
    }

    /// From the first to the last key that it sees.
    pub(crate) fn keys(&self, sheets: &[Sheet<'_>]) -> Span {
        sheets[self.sheet].seen(self.kv).keys(self.q)
    }

    /// Cells of all its kv heads.
    pub(crate) fn cells(&self) -> u64 {
        self.unit * self.kv_heads.len() as u64
    }

    /// Order in which equal strips are told apart.
    pub(crate) fn place(&self) -> (usize, Span, Span, Span) {
        (self.sheet, self.kv_heads, self.q, self.kv)
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
