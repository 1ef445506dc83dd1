//! Cuts: which slices of what a slot holds go to the slots that relieve it.

use outboard_attention::Span;

use crate::cost::Cost;
use crate::moved::{Moved, Taken, moved};
use crate::sheet::{Seen, Sheet, Strip};

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
#[derive(Clone, Debug)]
pub(crate) struct Edge {
    /// Who takes.
    pub(crate) slot: usize,
    /// The rank whose tokens it has.
    pub(crate) rank: Option<u32>,
    /// How much, in cells.
    pub(crate) cells: u64,
    /// Cells that may be misplaced.
    pub(crate) slack: u64,
    /// What it holds of the giver's sheets already, with all their kv heads: it has the keys of these.
    pub(crate) kin: Vec<Strip>,
}

impl Edge {
    /// The sheet's keys before this one are there already.
    fn known(&self, sheet: usize) -> usize {
        self.kin.iter().filter(|strip| strip.sheet == sheet).map(|strip| strip.q.end()).max().unwrap_or(0)
    }
}

/// A cut of what a slot holds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cut {
    /// What stays.
    pub(crate) kept: Vec<Strip>,
    /// What moves.
    pub(crate) given: Vec<Taken>,
    /// Cells asked for that no slice could provide.
    pub(crate) missing: u64,
    pub(crate) moved: Moved,
}

/// Serves the edges in their order, each with the slices that cost the fewest bytes. The strips are those of a slot on
/// the device of `rank`.
pub(crate) fn carve(
    sheets: &[Sheet<'_>],
    cost: &Cost,
    rank: Option<u32>,
    strips: &[Strip],
    edges: &[Edge],
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
            let Some((n, slice)) = cheapest(sheets, cost, &cut.kept, edge, wanted) else { break };
            let Some(strip) = cut.kept.get(n).copied() else { break };
            let taken = slice.parts(sheets, &strip, wanted, edge.slack);
            let cells: u64 = taken.iter().map(Strip::cells).sum();
            if cells == 0 || u128::from(cells) >= 2 * u128::from(wanted) {
                break;
            }
            need -= i128::from(cells);
            cut.kept.remove(n);
            for part in &taken {
                cut.given.push(Taken { slot: edge.slot, rank: edge.rank, strip: *part });
            }
            for rest in without(sheets, &strip, &taken) {
                let key = (rest.cells(), rest.place());
                let at = cut.kept.partition_point(|s| (s.cells(), s.place()) < key);
                cut.kept.insert(at, rest);
            }
        }
    }
    cut.missing = need.max(0) as u64;
    let kin = edges.iter().flat_map(|edge| {
        edge.kin.iter().map(|strip| Taken { slot: edge.slot, rank: edge.rank, strip: *strip })
    });
    let taken: Vec<Taken> = cut.given.iter().copied().chain(kin).collect();
    cut.moved = moved(sheets, cost, rank, &cut.kept, &taken);
    cut
}

/// Part of a strip: rows `q` of its first `heads` kv heads, with those of their keys that lie in `kv`. Where it must hold
/// a given number of cells, one end of `q` moves.
#[derive(Clone, Copy, Debug)]
struct Slice {
    heads: usize,
    q: Span,
    kv: Span,
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
) -> Option<(usize, Slice)> {
    let mut best: Option<(f64, usize, Slice)> = None;
    let first = strips.len().saturating_sub(CONSIDERED);
    for (n, strip) in strips.iter().enumerate().skip(first).rev() {
        let sheet = &sheets[strip.sheet];
        let few = cost.heads(sheet, strip, need);
        let all = strip.kv_heads.len();
        // Keys that are there already are best used by all heads.
        let known = edge.known(strip.sheet);
        let more = Some(all).filter(|&all| known > 0 && all > few + 1);
        for heads in (few..=all.min(few + 1)).chain(more) {
            let holds = strip.unit as f64 * heads as f64;
            let per_head = need.div_ceil(heads as u64).max(1);
            let some_keys = some_keys(sheet, cost, strip, edge.rank, per_head);
            let some_keys = some_keys.map(|(kv, q, end)| Slice { heads, q, kv, moves: Some(end) });
            for slice in slices(sheet, cost, strip, heads, need).chain(some_keys) {
                // A strip that holds less than is needed is priced as if it held enough.
                let price = heads as f64
                    * cost.bytes(sheet, slice.q, slice.kv, edge.rank, known)
                    * (need as f64 / holds).max(1.0);
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
    let (lo, hi, kv) = (strip.q.start(), strip.q.end(), strip.kv);
    let seen = sheet.seen(kv);
    let per_head = need.div_ceil(heads as u64).max(1);
    let fits = u128::from(strip.unit) * heads as u128 <= u128::from(need);
    let whole = fits.then_some(Slice { heads, q: strip.q, kv, moves: None });
    // The tail; the end that is best for a causal slice, or a few for any other mask; the head.
    let ends = match sheet.is_causal() {
        _ if whole.is_some() => [0; 4],
        true => [hi, kv.start() + (cost.spread * (per_head as f64).sqrt()) as usize, 0, 0],
        false => [hi, lo + (hi - lo) / 4 * 3, lo + (hi - lo) / 2, lo + (hi - lo) / 4],
    };
    let before = ends.into_iter().filter_map(move |end| {
        let end = if end < hi { round(end, BLOCK) } else { end };
        let fits = lo < end && end <= hi && seen.cells(Span::new(lo, end)?) >= per_head;
        let q = Span::new(seen.start_of(end, per_head).max(lo), end)?;
        fits.then_some(Slice { heads, q, kv, moves: Some(End::Start) })
    });
    let head = Span::new(lo, seen.end_of(lo, per_head).min(hi)).filter(|_| whole.is_none());
    whole.into_iter().chain(before).chain(head.map(|q| Slice { heads, q, kv, moves: Some(End::Last) }))
}

/// Rows of a causal strip with some of their keys that hold `per_head` cells: the first keys, as many as cost least, and
/// keys of which `rank` is home. The rows are the strip's last ones, or for the first keys also the first that see all of
/// them; the end that moves.
fn some_keys(
    sheet: &Sheet<'_>,
    cost: &Cost,
    strip: &Strip,
    rank: Option<u32>,
    per_head: u64,
) -> impl Iterator<Item = (Span, Span, End)> {
    let keys_a_row = cost.keys_a_row.filter(|_| sheet.is_causal());
    let (lo, hi, kv) = (strip.q.start(), strip.q.end(), strip.kv);
    let first = keys_a_row.map(|ratio| {
        let keys = round((per_head as f64 * ratio).sqrt() as usize, BLOCK).max(BLOCK);
        Span::at(kv.start(), keys).intersect(kv)
    });
    let homes = sheet.document.homes();
    let homes = if keys_a_row.is_some() && homes.len() > 1 { homes } else { &[] };
    let own =
        homes.iter().filter(move |home| Some(home.rank) == rank).map(move |home| home.tokens.intersect(kv));
    let tails = first.into_iter().chain(own).filter(move |keys| keys.end() < hi && !keys.is_empty());
    let tails = tails.filter_map(move |keys| {
        let seen = sheet.seen(keys);
        let q = Span::new(seen.start_of(hi, per_head).max(lo), hi)?;
        (seen.cells(q) >= per_head).then_some((keys, q, End::Start))
    });
    let head = first.and_then(move |keys| {
        let (seen, from) = (sheet.seen(keys), keys.end().max(lo));
        let q = Span::new(from, seen.end_of(from, per_head).min(hi)).filter(|q| !q.is_empty())?;
        (seen.cells(q) >= per_head).then_some((keys, q, End::Last))
    });
    tails.chain(head)
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
        let fitted = self.fit(&sheets[strip.sheet].seen(self.kv), strip, need, slack);
        let longer = Span::at(strip.kv_heads.start(), fitted.longer);
        let others = Span::at(longer.end(), self.heads - fitted.longer);
        let part = |(kv_heads, q)| Strip::with_keys(sheets, strip.sheet, kv_heads, q, self.kv);
        [(longer, fitted.more), (others, fitted.less)].into_iter().filter_map(part).collect()
    }

    /// The slice on whole blocks, moved by a few of them to meet the need; on parts of blocks where that fails.
    fn fit(&self, seen: &Seen<'_>, strip: &Strip, need: u64, slack: u64) -> Fitted {
        let whole = Fitted { more: self.q, less: self.q, longer: self.heads, cells: need };
        let mut best: Option<(u64, Fitted)> = None;
        let Some(moves) = self.moves else { return whole };
        let mut step = BLOCK;
        while step >= SMALLEST_STEP {
            for end in self.ends(strip) {
                let rows = match moves {
                    End::Start => {
                        let per_head = need.div_ceil(self.heads as u64).max(1);
                        Span::new(seen.start_of(end, per_head).max(strip.q.start()), end)
                    }
                    End::Last => Some(self.q),
                };
                let Some(rows) = rows else { continue };
                let fitted = self.on_steps(seen, strip, rows, step, need);
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
    fn on_steps(&self, seen: &Seen<'_>, strip: &Strip, rows: Span, step: usize, need: u64) -> Fitted {
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
        let (few, many, heads) = (seen.cells(less), seen.cells(more), self.heads as u64);
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
pub(crate) fn step(seen: &Seen<'_>, q: Span, cells: u64) -> usize {
    let row = seen.heaviest(q);
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

/// What is left of a strip: `taken` are rows of disjoint ranges of its kv heads, with all or some of their keys.
fn without(sheets: &[Sheet<'_>], strip: &Strip, taken: &[Strip]) -> Vec<Strip> {
    let mut rest = Vec::new();
    let mut keep = |heads: Option<Span>, q: Option<Span>, kv: Option<Span>| {
        if let (Some(heads), Some(q), Some(kv)) = (heads, q, kv) {
            rest.extend(Strip::with_keys(sheets, strip.sheet, heads, q, kv));
        }
    };
    let mut at = strip.kv_heads.start();
    for part in taken {
        let heads = Some(part.kv_heads);
        keep(heads, Span::new(strip.q.start(), part.q.start()), Some(strip.kv));
        keep(heads, Span::new(part.q.end(), strip.q.end()), Some(strip.kv));
        keep(heads, Some(part.q), Span::new(strip.kv.start(), part.kv.start()));
        keep(heads, Some(part.q), Span::new(part.kv.end(), strip.kv.end()));
        at = part.kv_heads.end();
    }
    keep(Span::new(at, strip.kv_heads.end()), Some(strip.q), Some(strip.kv));
    rest
}
