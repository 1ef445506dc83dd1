//! Which tokens a slot needs for the tasks it has.

use outboard_attention::{HomeRange, MaskPart, Span};

use super::pieces::Piece;
use crate::sheet::extent;

/// Rows and keys that a part of a task uses, every one of them, and for which heads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Need {
    pub(crate) kv_heads: Span,
    pub(crate) rows: Span,
    pub(crate) keys: Span,
    pub(crate) slot: usize,
}

/// Tokens of one home that a slot needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fetch {
    pub(crate) slot: usize,
    /// Their home.
    pub(crate) rank: u32,
    /// Those that no other slot needs.
    pub(crate) alone: u64,
    /// Those that other slots need too.
    pub(crate) shared: u64,
}

/// What one document's tasks use. The rows and keys of a band slice have no gaps, so a need is exact; a task of several
/// slices has several.
pub(crate) fn needs(pieces: &[Piece]) -> Vec<Need> {
    let need = |slot: usize, part: &MaskPart| {
        let (rows, keys) = extent(&part.slice, part.slice.q())?;
        Some(Need { kv_heads: part.kv_heads, rows, keys, slot })
    };
    pieces.iter().flat_map(|p| p.parts.iter().filter_map(move |part| need(p.slot, part))).collect()
}

/// The ranges of kv heads of which each need has all or none, with the needs that have them.
pub(crate) fn by_heads(needs: &[Need]) -> Vec<(u64, Vec<Need>)> {
    let mut borders: Vec<usize> = needs.iter().flat_map(|n| [n.kv_heads.start(), n.kv_heads.end()]).collect();
    borders.sort_unstable();
    borders.dedup();
    let class = |pair: &[usize]| {
        let here = needs.iter().filter(|need| need.kv_heads.contains(pair[0])).copied();
        ((pair[1] - pair[0]) as u64, here.collect())
    };
    borders.windows(2).map(class).collect()
}

/// Who needs how many tokens of which home: `spans` are those of each slot, in any order and number. Tokens that a slot
/// needs twice count once.
pub(crate) fn fetches(mut spans: Vec<(usize, Span)>, homes: &[HomeRange]) -> Vec<Fetch> {
    spans.sort_unstable();
    let mut joined: Vec<(usize, Span)> = Vec::with_capacity(spans.len());
    for (slot, span) in spans {
        match joined.last_mut() {
            Some((same, last)) if *same == slot && span.start() <= last.end() => *last = last.hull(span),
            _ => joined.push((slot, span)),
        }
    }
    let shared = Shared::new(&joined);
    let mut fetches = Vec::with_capacity(joined.len());
    for (slot, span) in joined {
        let first = homes.partition_point(|home| home.tokens.end() <= span.start());
        for home in homes.iter().skip(first).take_while(|home| home.tokens.start() < span.end()) {
            let tokens = home.tokens.intersect(span);
            let shared = shared.within(tokens);
            fetches.push(Fetch { slot, rank: home.rank, alone: tokens.len() as u64 - shared, shared });
        }
    }
    fetches
}

/// Tokens that more than one slot needs.
struct Shared {
    /// Disjoint ranges, ascending, and how many tokens lie in those before each.
    ranges: Vec<(Span, u64)>,
}

impl Shared {
    /// From ranges that are disjoint for each slot.
    fn new(spans: &[(usize, Span)]) -> Shared {
        let mut edges: Vec<(usize, bool)> =
            spans.iter().flat_map(|(_, span)| [(span.start(), true), (span.end(), false)]).collect();
        // At one place ends come first, which leaves no empty ranges behind.
        edges.sort_unstable();
        let (mut open, mut since, mut before) = (0u64, 0, 0);
        let mut ranges = Vec::new();
        for (at, opens) in edges {
            if opens {
                open += 1;
                if open == 2 {
                    since = at;
                }
            } else {
                if open == 2
                    && let Some(range) = Span::new(since, at)
                {
                    ranges.push((range, before));
                    before += range.len() as u64;
                }
                open = open.saturating_sub(1);
            }
        }
        Shared { ranges }
    }

    /// How many of them lie before `token`.
    fn before(&self, token: usize) -> u64 {
        let after = self.ranges.partition_point(|(range, _)| range.start() < token);
        let last = after.checked_sub(1).and_then(|n| self.ranges.get(n));
        last.map_or(0, |(range, before)| before + range.intersect(Span::to(token)).len() as u64)
    }

    fn within(&self, tokens: Span) -> u64 {
        self.before(tokens.end()) - self.before(tokens.start())
    }
}
