//! Bytes that a slot and those who relieve it move, by the judge's rules.

use outboard_attention::{HomeRange, Span};

use crate::cost::Cost;
use crate::sheet::{Sheet, Strip};

/// Stands for the slot that gives.
const DONOR: usize = usize::MAX;

/// A strip that a slot takes over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taken {
    pub(crate) slot: usize,
    /// The rank whose tokens that slot has.
    pub(crate) rank: Option<u32>,
    pub(crate) strip: Strip,
}

/// Bytes of what a slot holds and gives away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    /// In all, there and back, forward and backward.
    pub(crate) bytes: u64,
    /// To those who take it, forward.
    pub(crate) sent: u64,
}

/// Bytes that move when the slot on the device of `rank` keeps some strips and others take some. Who else has anything of
/// the same documents is left out. Saturates.
pub(crate) fn moved(
    sheets: &[Sheet<'_>],
    cost: &Cost,
    rank: Option<u32>,
    kept: &[Strip],
    taken: &[Taken],
) -> Moved {
    let mut strips: Vec<Taken> = taken.to_vec();
    strips.extend(kept.iter().map(|strip| Taken { slot: DONOR, rank, strip: *strip }));
    strips.sort_unstable_by_key(|taken| taken.strip.sheet);
    let mut all = Moved::default();
    for same in strips.chunk_by(|a, b| a.strip.sheet == b.strip.sheet) {
        let sheet = &sheets[same[0].strip.sheet];
        let homes = sheet.document.homes();
        let at_home = homes.iter().all(|home| Some(home.rank) == rank);
        if at_home && same.iter().all(|taken| taken.slot == DONOR) {
            continue;
        }
        let mut heads: Vec<usize> =
            same.iter().flat_map(|t| [t.strip.kv_heads.start(), t.strip.kv_heads.end()]).collect();
        heads.sort_unstable();
        heads.dedup();
        let all_keys = same.iter().all(|taken| taken.strip.kv == sheet.all_keys());
        for pair in heads.windows(2) {
            let here = same.iter().filter(|taken| taken.strip.kv_heads.contains(pair[0]));
            let rows = here.clone().map(|t| Holding { slot: t.slot, rank: t.rank, span: t.strip.q });
            // Rows that go with all their keys go to one slot.
            let rows = if all_keys { Away::apart(homes, rows) } else { Away::of(homes, rows.collect()) };
            let keys = here.map(|t| Holding { slot: t.slot, rank: t.rank, span: t.strip.keys(sheets) });
            let keys = Away::of(homes, keys.collect());
            let heads = (pair[1] - pair[0]) as u64;
            all.add(Moved::of_head(cost, rows, keys), heads);
        }
    }
    all
}

impl Moved {
    /// Of one kv head.
    fn of_head(cost: &Cost, rows: Away, keys: Away) -> Moved {
        let sum = |tokens: &[u64], prices: &[u64]| {
            let bytes = tokens.iter().zip(prices).map(|(tokens, price)| tokens.saturating_mul(*price));
            bytes.fold(0, u64::saturating_add)
        };
        let tokens = [rows.alone, rows.shared, keys.alone, keys.shared];
        let prices = [cost.row, cost.part_of_row, cost.own_key, cost.key];
        let sent = cost.sent.map(|price| price.there);
        Moved { bytes: sum(&tokens, &prices), sent: sum(&[rows.sent, keys.sent], &sent) }
    }

    fn add(&mut self, other: Moved, times: u64) {
        self.bytes = self.bytes.saturating_add(other.bytes.saturating_mul(times));
        self.sent = self.sent.saturating_add(other.sent.saturating_mul(times));
    }
}

/// Tokens that a slot on the device of a rank needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Holding {
    slot: usize,
    rank: Option<u32>,
    span: Span,
}

/// Tokens that are needed away from home.
#[derive(Clone, Copy, Debug, Default)]
struct Away {
    /// Those that no other slot needs.
    alone: u64,
    /// Those that others need too.
    shared: u64,
    /// Those that others than the donor need.
    sent: u64,
}

impl Away {
    /// No two slots need the same token.
    fn apart(homes: &[HomeRange], holdings: impl Iterator<Item = Holding>) -> Away {
        let mut away = Away::default();
        for holding in holdings {
            let own: usize = holding.own(homes, holding.span).map(|own| own.len()).sum();
            let tokens = (holding.span.len() - own) as u64;
            away.alone += tokens;
            away.sent += if holding.slot == DONOR { 0 } else { tokens };
        }
        away
    }

    /// A slot has each token once, whatever strips need it.
    fn of(homes: &[HomeRange], mut holdings: Vec<Holding>) -> Away {
        holdings.sort_unstable();
        let mut tokens = Away::default();
        // Where a slot begins and ceases to need tokens, and whether they are away.
        let mut borders = Vec::with_capacity(4 * holdings.len());
        let mut reached = (DONOR, 0);
        for holding in holdings {
            let (start, end) = (holding.span.start(), holding.span.end());
            let start = if reached.0 == holding.slot { start.max(reached.1) } else { start };
            let Some(fresh) = Span::new(start, end).filter(|fresh| !fresh.is_empty()) else { continue };
            reached = (holding.slot, end);
            borders.extend([(start, 1, 1), (end, -1, -1)]);
            let mut away = fresh.len();
            for own in holding.own(homes, fresh) {
                away -= own.len();
                borders.extend([(own.start(), 0, -1), (own.end(), 0, 1)]);
            }
            tokens.sent += if holding.slot == DONOR { 0 } else { away as u64 };
        }
        borders.sort_unstable();
        let (mut at, mut slots, mut away) = (0, 0, 0i64);
        for (border, more_slots, more_away) in borders {
            let here = (border - at) as u64 * away.unsigned_abs();
            *(if slots > 1 { &mut tokens.shared } else { &mut tokens.alone }) += here;
            (at, slots, away) = (border, slots + more_slots, away + more_away);
        }
        tokens
    }
}

impl Holding {
    /// What of a span the slot's own rank is home of.
    fn own(&self, homes: &[HomeRange], span: Span) -> impl Iterator<Item = Span> {
        let first = homes.partition_point(|home| home.tokens.end() <= span.start());
        let near = homes.iter().skip(first).take_while(move |home| home.tokens.start() < span.end());
        near.filter(|home| Some(home.rank) == self.rank).map(move |home| home.tokens.intersect(span))
    }
}

#[cfg(test)]
mod tests {
    use outboard_attention::{
        DType, Document, DocumentId, HeadGeometry, HeadShape, PlannedTask, StepPlan, TickPlan,
    };
    use proptest::prelude::*;

    use super::*;
    use crate::{Problem, Slot, Traffic};

    /// Rows from the last cut on, who computes them, and from which key on somebody else does.
    type Draw = (usize, usize, Option<(usize, usize)>);

    /// Rows, whether the second head stays whole, cuts, and homes as ranks and tokens.
    type Drawn = (usize, bool, Vec<Draw>, Vec<(u32, usize)>);

    fn documents() -> impl Strategy<Value = Vec<Drawn>> {
        let cut = (1usize..900, 0usize..4, prop::option::of((0usize..3000, 0usize..4)));
        let home = (0u32..4, 1usize..1500);
        let homes = prop_oneof![Just(vec![(0, 3000)]), prop::collection::vec(home, 1..4)];
        let document = (1usize..3000, any::<bool>(), prop::collection::vec(cut, 1..6), homes);
        prop::collection::vec(document, 1..4)
    }

    proptest! {
        /// Documents, each cut by rows, heads and keys and given to slots; slot 0 keeps.
        #[test]
        fn what_moves_is_what_the_traffic_counts(drawn in documents()) {
            let shape = HeadShape { q_heads: 6, kv_heads: 2, head_dim: 32, v_head_dim: 48, scale: 0.2, dtype: DType::Bf16, softcap: None };
            let geometry = HeadGeometry::try_from(shape).unwrap();
            let slots = (0..4).map(Slot::in_place).collect();
            let of = |(index, (tokens, _, _, homes)): (u32, &Drawn)| {
                let mut at = 0;
                let homes = homes.iter().chain([&(0, usize::MAX)]).filter_map(|&(rank, len)| {
                    let tokens = Span::at(at, len.min(tokens - at));
                    at = tokens.end();
                    (!tokens.is_empty()).then_some(HomeRange { rank, tokens })
                });
                let homes = homes.collect();
                Document::new(DocumentId { rank: 0, index }, *tokens, homes).unwrap()
            };
            let problem = Problem::new(geometry, (0..).zip(&drawn).map(of).collect(), slots);
            let all: Vec<&Document> = problem.documents.iter().collect();
            let sheets = Sheet::of(&all, 2);
            let (mut taken, mut kept, mut tasks) = (Vec::new(), Vec::new(), Vec::new());
            for (sheet, (tokens, whole, cuts, _)) in drawn.iter().enumerate() {
                let cut = Span::to(if *whole { 1 } else { 2 });
                let (mut at, mut pieces) = (0, Vec::new());
                for (rows, slot, keys) in cuts.iter().chain([&(usize::MAX, 0, None)]) {
                    let q = Span::at(at, (*rows).min(tokens - at));
                    at = q.end();
                    let (border, other) = keys.unwrap_or((*tokens, 0));
                    let (first, rest) = (Span::to(border.min(*tokens)), Span::new(border, *tokens).unwrap_or_default());
                    for (kv, slot) in [(first, *slot), (rest, other)] {
                        pieces.extend(Strip::with_keys(&sheets, sheet, cut, q, kv).map(|strip| (slot, strip)));
                    }
                }
                if *whole {
                    pieces.extend(Strip::new(&sheets, sheet, Span::at(1, 1), Span::to(*tokens)).map(|strip| (0, strip)));
                }
                for (slot, strip) in pieces {
                    let task = PlannedTask {
                        document: problem.documents[sheet].id(), q: strip.q, kv: strip.keys(&sheets),
                        kv_heads: strip.kv_heads, slot: slot as u32, group: 0, position: 0,
                    };
                    tasks.push(task);
                    match slot {
                        0 => kept.push(strip),
                        _ => taken.push(Taken { slot, rank: Some(slot as u32), strip }),
                    }
                }
            }
            let moved = moved(&sheets, &Cost::new(&geometry), Some(0), &kept, &taken);
            let traffic = Traffic::of(&StepPlan { ticks: vec![TickPlan { tick: 0, tasks }], slots: 4 }, &problem);
            prop_assert_eq!(moved.bytes, traffic.forward.total + traffic.backward.total);
            if problem.documents.iter().all(|document| document.homes().iter().all(|home| home.rank == 0)) {
                prop_assert_eq!(moved.sent, traffic.forward.bytes_out[0]);
            }
        }
    }
}
