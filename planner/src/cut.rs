//! Cuts: which slices of what a slot holds go to the slots that relieve it.

use outboard_attention::Span;

use crate::cost::{Cost, Moved};
use crate::sheet::{Sheet, Strip};

/// Rows are cut at multiples of this many tokens.
const BLOCK: usize = 128;
/// The smallest step that balance may force.
const SMALLEST_STEP: usize = 1;
/// Of all strips the longest are considered: short documents cost more bytes per cell, and they may be many.
const CONSIDERED: usize = 16;
/// What rounding left over is worth a slice of its own when it is this many times what may be misplaced.
const CRUMB: i128 = 2;
/// To meet a need on block borders, a slice may move by this many blocks,
const NEARBY: usize = 16;
/// and by this part of where it ends: that close to the cheapest place, bytes hardly change.
const FLAT: usize = 16;

/// What a slot takes over from another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Edge {
    /// Who takes.
    pub(crate) slot: usize,
    /// The rank whose tokens it has.
    pub(crate) rank: Option<u32>,
    /// How much, in cells.
    pub(crate) cells: u64,
    /// Cells that may be misplaced.
    pub(crate) slack: u64,
}

/// A cut of what a slot holds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cut {
    /// What stays.
    pub(crate) kept: Vec<Strip>,
    /// What moves, and to which slot.
    pub(crate) given: Vec<(usize, Strip)>,
    /// Cells asked for that no slice could provide.
    pub(crate) missing: u64,
    pub(crate) moved: Moved,
}

/// Serves the edges in their order, each with the slices that cost the fewest bytes.
pub(crate) fn carve(
    sheets: &[Sheet<'_>],
    cost: &Cost,
    strips: &[Strip],
    edges: &[Edge],
    scarcity: f64,
) -> Cut {
    let mut cut = Cut { kept: strips.to_vec(), ..Cut::default() };
    cut.kept.sort_unstable_by_key(|strip| (strip.cells(), strip.place()));
    // What an edge got too much or too little is made up for by the next.
    let mut need = 0i128;
    for edge in edges {
        need += i128::from(edge.cells);
        let crumb = i128::from(edge.slack) * CRUMB;
        while need > crumb {
            let wanted = need as u64;
            let Some((n, slice)) = cheapest(sheets, cost, &cut.kept, edge, wanted, scarcity) else { break };
            let Some(strip) = cut.kept.get(n).copied() else { break };
            let taken = slice.parts(sheets, &strip, wanted, edge.slack);
            let cells: u64 = taken.iter().map(Strip::cells).sum();
            if cells == 0 || u128::from(cells) >= 2 * u128::from(wanted) {
                break;
            }
            need -= i128::from(cells);
            cut.kept.remove(n);
            for part in &taken {
                cut.given.push((edge.slot, *part));
            }
            for rest in without(sheets, &strip, &taken) {
                let key = (rest.cells(), rest.place());
                let at = cut.kept.partition_point(|s| (s.cells(), s.place()) < key);
                cut.kept.insert(at, rest);
            }
        }
    }
    cut.missing = need.max(0) as u64;
    cut.moved = cost.moved(sheets, &cut.given, &cut.kept);
    cut
}

/// Part of a strip: rows `q` of its first `heads` kv heads. Where it must hold a given number of cells, one end of `q`
/// moves.
#[derive(Clone, Copy, Debug)]
struct Slice {
    heads: usize,
    q: Span,
    moves: Option<End>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Start,
    Last,
}

/// The slice of about `need` cells that costs the fewest bytes, and the index of its strip.
fn cheapest(
    sheets: &[Sheet<'_>],
    cost: &Cost,
    strips: &[Strip],
    edge: &Edge,
    need: u64,
    scarcity: f64,
) -> Option<(usize, Slice)> {
    let mut best: Option<(f64, usize, Slice)> = None;
    let first = strips.len().saturating_sub(CONSIDERED);
    for (n, strip) in strips.iter().enumerate().skip(first).rev() {
        let sheet = &sheets[strip.sheet];
        let few = cost.heads(sheet, strip, need);
        for heads in few..=strip.kv_heads.len().min(few + 1) {
            let holds = strip.unit as f64 * heads as f64;
            for slice in slices(sheet, cost, strip, heads, need) {
                // A strip that holds less than is needed is priced as if it held enough.
                let price =
                    cost.bytes(sheet, slice.q, heads, edge.rank, scarcity) * (need as f64 / holds).max(1.0);
                if best.is_none_or(|(least, ..)| price < least) {
                    best = Some((price, n, slice));
                }
            }
        }
    }
    best.map(|(_, n, slice)| (n, slice))
}

/// Where in a strip to take `need` cells from `heads` kv heads: worth pricing.
fn slices(
    sheet: &Sheet<'_>,
    cost: &Cost,
    strip: &Strip,
    heads: usize,
    need: u64,
) -> impl Iterator<Item = Slice> {
    let (lo, hi) = (strip.q.start(), strip.q.end());
    let per_head = need.div_ceil(heads as u64).max(1);
    let fits = u128::from(strip.unit) * heads as u128 <= u128::from(need);
    let whole = fits.then_some(Slice { heads, q: strip.q, moves: None });
    // The tail; the end that is best for a causal slice, or a few for any other mask; the head.
    let ends = match sheet.is_causal() {
        _ if whole.is_some() => [0; 4],
        true => [hi, (cost.spread * (per_head as f64).sqrt()) as usize, 0, 0],
        false => [hi, lo + (hi - lo) / 4 * 3, lo + (hi - lo) / 2, lo + (hi - lo) / 4],
    };
    let before = ends.into_iter().filter_map(move |end| {
        let end = if end < hi { round(end, BLOCK) } else { end };
        let fits = lo < end && end <= hi && sheet.cells(Span::new(lo, end)?) >= per_head;
        let q = Span::new(sheet.start_of(end, per_head).max(lo), end)?;
        fits.then_some(Slice { heads, q, moves: Some(End::Start) })
    });
    let head = Span::new(lo, sheet.end_of(lo, per_head).min(hi)).filter(|_| whole.is_none());
    whole.into_iter().chain(before).chain(head.map(|q| Slice { heads, q, moves: Some(End::Last) }))
}

/// A slice on block borders: `longer` of its kv heads take the rows `more`, the others `less`.
#[derive(Clone, Copy, Debug)]
struct Fitted {
    more: Span,
    less: Span,
    longer: usize,
    cells: u64,
}

impl Slice {
    /// The slice as strips that hold `need` cells, give or take `slack` where the document allows.
    fn parts(&self, sheets: &[Sheet<'_>], strip: &Strip, need: u64, slack: u64) -> Vec<Strip> {
        let fitted = self.fit(&sheets[strip.sheet], strip, need, slack);
        let longer = Span::at(strip.kv_heads.start(), fitted.longer);
        let others = Span::at(longer.end(), self.heads - fitted.longer);
        let part = |(kv_heads, q)| Strip::new(sheets, strip.sheet, kv_heads, q);
        [(longer, fitted.more), (others, fitted.less)].into_iter().filter_map(part).collect()
    }

    /// The slice on whole blocks, moved by a few of them to meet the need; on parts of blocks where that fails.
    fn fit(&self, sheet: &Sheet<'_>, strip: &Strip, need: u64, slack: u64) -> Fitted {
        let whole = Fitted { more: self.q, less: self.q, longer: self.heads, cells: need };
        let mut best: Option<(u64, Fitted)> = None;
        let Some(moves) = self.moves else { return whole };
        let mut step = BLOCK;
        while step >= SMALLEST_STEP {
            for end in self.ends(strip) {
                let rows = match moves {
                    End::Start => {
                        let per_head = need.div_ceil(self.heads as u64).max(1);
                        Span::new(sheet.start_of(end, per_head).max(strip.q.start()), end)
                    }
                    End::Last => Some(self.q),
                };
                let Some(rows) = rows else { continue };
                let fitted = self.on_steps(sheet, strip, rows, step, need);
                let error = fitted.cells.abs_diff(need);
                if best.is_none_or(|(least, _)| error < least) {
                    best = Some((error, fitted));
                }
                if error <= slack {
                    return fitted;
                }
            }
            step /= 2;
        }
        best.map_or(whole, |(_, fitted)| fitted)
    }

    /// Where the slice may end: where it costs least, then on block borders nearby, where it costs hardly more.
    fn ends(&self, strip: &Strip) -> impl Iterator<Item = usize> {
        let (end, lo, hi) = (self.q.end(), strip.q.start(), strip.q.end());
        let far = match self.moves {
            // A slice at the strip's end stays there, or it would leave a crumb behind.
            Some(End::Start) if end < hi => (end / FLAT / BLOCK).min(NEARBY),
            _ => 0,
        };
        let below = end.div_ceil(BLOCK) * BLOCK;
        let nearby = (1..=far)
            .flat_map(move |n| [below.checked_sub(n * BLOCK), Some(end / BLOCK * BLOCK + n * BLOCK)]);
        [end].into_iter().chain(nearby.flatten().filter(move |&end| lo < end && end < hi))
    }

    /// The rows with their moving end on a multiple of `step`. Where a step of all heads is too much, some heads take a
    /// step more than the others: that costs no bytes and spares a finer cut.
    fn on_steps(&self, sheet: &Sheet<'_>, strip: &Strip, rows: Span, step: usize, need: u64) -> Fitted {
        let (start, end) = (rows.start(), rows.end());
        let between = |a: usize, b: usize| Span::new(a, b).unwrap_or_default();
        let (more, less) = match self.moves {
            None => (rows, rows),
            Some(End::Start) => {
                let coarse = start / step * step;
                (between(coarse.max(strip.q.start()), end), between((coarse + step).min(end), end))
            }
            Some(End::Last) => {
                let coarse = end.div_ceil(step) * step;
                (
                    between(start, coarse.min(strip.q.end())),
                    between(start, coarse.saturating_sub(step).max(start)),
                )
            }
        };
        let (few, many, heads) = (sheet.cells(less), sheet.cells(more), self.heads as u64);
        let missing = need.saturating_sub(few.saturating_mul(heads));
        let longer = match many - few {
            0 => heads,
            // A slice of no cells would be none.
            block => ((missing + block / 2) / block).clamp(u64::from(few == 0), heads),
        };
        Fitted { more, less, longer: longer as usize, cells: few * (heads - longer) + many * longer }
    }
}

/// The largest step at which cutting rows of `q`, for one kv head, moves no more than `cells` cells at once.
pub(crate) fn step(sheet: &Sheet<'_>, q: Span, cells: u64) -> usize {
    let row = sheet.heaviest(q);
    let mut step = BLOCK;
    while step > SMALLEST_STEP && step as u64 * row > cells {
        step /= 2;
    }
    step
}

/// The nearest multiple of `step`.
pub(crate) fn round(row: usize, step: usize) -> usize {
    (row + step / 2) / step * step
}

/// What is left of a strip: `taken` are rows of disjoint ranges of its kv heads.
fn without(sheets: &[Sheet<'_>], strip: &Strip, taken: &[Strip]) -> Vec<Strip> {
    let mut rest = Vec::new();
    let mut keep = |heads: Option<Span>, q: Option<Span>| {
        if let (Some(heads), Some(q)) = (heads, q) {
            rest.extend(Strip::new(sheets, strip.sheet, heads, q));
        }
    };
    let mut at = strip.kv_heads.start();
    for part in taken {
        keep(Some(part.kv_heads), Span::new(strip.q.start(), part.q.start()));
        keep(Some(part.kv_heads), Span::new(part.q.end(), strip.q.end()));
        at = part.kv_heads.end();
    }
    keep(Span::new(at, strip.kv_heads.end()), Some(strip.q));
    rest
}
