//! What moving costs, in bytes of one layer, forward and backward together.

use outboard_attention::{HeadGeometry, Span};

use crate::judge::price::{Fare, Price};
use crate::search::Shape;
use crate::sheet::{Sheet, Strip};

/// Stands for the home among slots.
const HOME: usize = usize::MAX;

/// Of the price of a key that others see too, what a key costs on average.
const KEY_PRICE: f64 = 0.7;

/// Bytes of what a slot gives away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    /// In all, there and back, forward and backward.
    pub(crate) bytes: u64,
    /// To those who take it, forward.
    pub(crate) sent: u64,
}

/// Bytes of a slice, and from them the shape of the cheapest one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// Of a query row of one kv head.
    row: u64,
    /// Of a key of one kv head that others see too, so that its gradient is a partial sum.
    key: u64,
    /// Of a key that nobody else sees.
    own_key: u64,
    /// Of a row and of a key, forward.
    sent: [Price; 2],
    /// The cheapest causal slice of `w` cells ends at row `spread * sqrt(w)`.
    pub(crate) spread: f64,
    /// The cheapest bytes per cell are those of a tail of `tail_area * end * end` cells.
    pub(crate) tail_area: f64,
}

impl Cost {
    pub(crate) fn new(geometry: &HeadGeometry) -> Cost {
        let [row, own_key] = [Fare::of_row(geometry, false), Fare::of_key(geometry, false)];
        let sent = [row.forward, own_key.forward];
        let bytes =
            |Fare { forward, backward }: Fare| forward.there + forward.back + backward.there + backward.back;
        let [row, own_key, key] = [row, own_key, Fare::of_key(geometry, true)].map(bytes);
        Cost { row, key, own_key, sent, spread: 0.0, tail_area: 0.0 }.shaped(1.0)
    }

    /// The same prices, with slices shaped as if keys cost `keys` times as much.
    pub(crate) fn shaped(self, keys: f64) -> Cost {
        // Rows (p - x, p] with keys [0, p) hold p * x - x * x / 2 cells and cost row * x + key * p: minimised over x / p
        // at a fixed number of cells, and over bytes per cell at a fixed p.
        let r = self.row as f64 / (self.key as f64 * keys);
        let (middle, tail) = (1.0 / (1.0 + r), ((1.0 + 2.0 * r).sqrt() - 1.0) / r);
        let area = |x: f64| x - x * x / 2.0;
        Cost { spread: 1.0 / area(middle).sqrt(), tail_area: area(tail), ..self }
    }

    /// Bytes that the slots which are `given` strips move, when the home of all tokens keeps the strips `kept` and nobody
    /// else has any. No two slots have the same rows of a kv head. Saturates.
    pub(crate) fn moved(&self, sheets: &[Sheet<'_>], given: &[(usize, Strip)], kept: &[Strip]) -> Moved {
        let mut strips: Vec<(usize, &Strip)> = given.iter().map(|(slot, strip)| (*slot, strip)).collect();
        strips.extend(kept.iter().map(|strip| (HOME, strip)));
        strips.sort_unstable_by_key(|(_, strip)| strip.sheet);
        let mut all = Moved::default();
        for same in strips.chunk_by(|a, b| a.1.sheet == b.1.sheet) {
            if same.iter().all(|(slot, _)| *slot == HOME) {
                continue;
            }
            let mut heads: Vec<usize> =
                same.iter().flat_map(|(_, s)| [s.kv_heads.start(), s.kv_heads.end()]).collect();
            heads.sort_unstable();
            heads.dedup();
            for pair in heads.windows(2) {
                let here = same.iter().filter(|(_, strip)| strip.kv_heads.contains(pair[0]));
                let sheet = |strip: &Strip| &sheets[strip.sheet];
                let spans = here.map(|(slot, strip)| (*slot, strip.q, sheet(strip).keys(strip.q)));
                let of_head = self.moved_of_head(spans);
                let heads = (pair[1] - pair[0]) as u64;
                all.bytes = all.bytes.saturating_add(of_head.bytes.saturating_mul(heads));
                all.sent = all.sent.saturating_add(of_head.sent.saturating_mul(heads));
            }
        }
        all
    }

    /// The same of one kv head, from the rows and keys of each slot.
    fn moved_of_head(&self, spans: impl Iterator<Item = (usize, Span, Span)>) -> Moved {
        let (mut rows, mut borders) = (0u64, Vec::new());
        let mut keys: Vec<(usize, Span)> = Vec::new();
        for (slot, q, of_q) in spans {
            if slot != HOME {
                rows += q.len() as u64;
            }
            keys.push((slot, of_q));
        }
        keys.sort_unstable();
        // A slot has each key once, whatever strips need it.
        let mut reached = (HOME, 0);
        for (slot, span) in keys {
            let from = if reached.0 == slot { span.start().max(reached.1) } else { span.start() };
            if from < span.end() {
                let away = i64::from(slot != HOME);
                borders.extend([(from, 1, away), (span.end(), -1, -away)]);
                reached = (slot, span.end());
            }
        }
        borders.sort_unstable();
        let (mut at, mut slots, mut away) = (0, 0, 0i64);
        let (mut shared, mut alone) = (0u64, 0u64);
        for (border, more_slots, more_away) in borders {
            let tokens = (border - at) as u64 * away as u64;
            *(if slots > 1 { &mut shared } else { &mut alone }) += tokens;
            (at, slots, away) = (border, slots + more_slots, away + more_away);
        }
        let bytes = |prices: [(u64, u64); 3]| {
            let bytes = prices.map(|(tokens, price)| tokens.saturating_mul(price));
            bytes.into_iter().fold(0, u64::saturating_add)
        };
        let [row, key] = self.sent.map(|price| price.there);
        Moved {
            bytes: bytes([(rows, self.row), (shared, self.key), (alone, self.own_key)]),
            sent: bytes([(rows, row), (shared, key), (alone, key)]),
        }
    }

    /// Bytes of the rows `q` of `kv_heads` kv heads on a slot of `rank`, which has the tokens it is home of. Keys count
    /// `scarcity` times more than they cost: where heads run out, a slice that leaves long rows behind is worth more.
    pub(crate) fn bytes(
        &self,
        sheet: &Sheet<'_>,
        q: Span,
        kv_heads: usize,
        rank: Option<u32>,
        scarcity: f64,
    ) -> f64 {
        let keys = sheet.keys(q);
        let away = |span: Span| match rank {
            Some(rank) => {
                let own = sheet.document.homes().iter().filter(|home| home.rank == rank);
                span.len() - own.map(|home| home.tokens.intersect(span).len()).sum::<usize>()
            }
            None => span.len(),
        };
        let (rows, keys) = (away(q) as u64 * self.row, away(keys) as u64 * self.key);
        kv_heads as f64 * (rows as f64 + keys as f64 * (1.0 + scarcity))
    }

    /// What slices of causal strips cost, in closed form.
    pub(crate) fn shape(&self) -> Shape {
        Shape::new(self.row as f64, KEY_PRICE * self.key as f64, self.sent)
    }

    /// How many kv heads of a strip should carry `cells` cells: this many, or one more.
    pub(crate) fn heads(&self, sheet: &Sheet<'_>, strip: &Strip, cells: u64) -> usize {
        let unit = strip.unit as f64;
        let best = match sheet.is_causal() {
            true => unit.min(self.tail_area * strip.q.end() as f64 * strip.q.end() as f64),
            false => unit,
        };
        ((cells as f64 / best) as usize).clamp(1, strip.kv_heads.len())
    }
}

#[cfg(test)]
mod tests {
    use outboard_attention::{
        DType, Document, DocumentId, HeadShape, HomeRange, PlannedTask, StepPlan, TickPlan,
    };
    use proptest::prelude::*;

    use super::*;
    use crate::{Problem, Slot, Traffic};

    proptest! {
        /// Documents of rank 0, each cut by rows and heads and given to slots; slot 0 keeps.
        #[test]
        fn what_moves_is_what_the_traffic_counts(
            documents in prop::collection::vec((1usize..3000, 0usize..3, prop::collection::vec((1usize..900, 0usize..4), 1..6)), 1..4),
        ) {
            let shape = HeadShape { q_heads: 6, kv_heads: 2, head_dim: 32, v_head_dim: 48, scale: 0.2, dtype: DType::Bf16, softcap: None };
            let geometry = HeadGeometry::try_from(shape).unwrap();
            let slots = (0..4).map(Slot::in_place).collect();
            let of = |(index, (tokens, ..)): (u32, &(usize, usize, Vec<_>))| {
                let home = HomeRange { rank: 0, tokens: Span::to(*tokens) };
                Document::new(DocumentId { rank: 0, index }, *tokens, vec![home]).unwrap()
            };
            let problem = Problem::new(geometry, (0..).zip(&documents).map(of).collect(), slots);
            let all: Vec<&Document> = problem.documents.iter().collect();
            let sheets = Sheet::of(&all, 2);
            let (mut given, mut kept, mut tasks) = (Vec::new(), Vec::new(), Vec::new());
            for (sheet, (tokens, heads, cuts)) in documents.iter().enumerate() {
                // All heads alike, or the second one left at home whole.
                let (cut, whole) = if *heads == 0 { (Span::to(1), Some(Span::at(1, 1))) } else { (Span::to(2), None) };
                let (mut at, mut pieces) = (0, Vec::new());
                for (rows, slot) in cuts.iter().chain([&(usize::MAX, 0)]) {
                    let q = Span::at(at, (*rows).min(tokens - at));
                    at = q.end();
                    pieces.extend(Strip::new(&sheets, sheet, cut, q).map(|strip| (*slot, strip)));
                }
                pieces.extend(whole.and_then(|heads| Strip::new(&sheets, sheet, heads, Span::to(*tokens))).map(|s| (0, s)));
                for (slot, strip) in pieces {
                    let task = PlannedTask {
                        document: problem.documents[sheet].id(), q: strip.q, kv: sheets[sheet].keys(strip.q),
                        kv_heads: strip.kv_heads, slot: slot as u32, group: 0, position: 0,
                    };
                    tasks.push(task);
                    if slot == 0 { kept.push(strip) } else { given.push((slot, strip)) }
                }
            }
            let moved = Cost::new(&geometry).moved(&sheets, &given, &kept);
            let traffic = Traffic::of(&StepPlan { ticks: vec![TickPlan { tick: 0, tasks }], slots: 4 }, &problem);
            prop_assert_eq!(moved.bytes, traffic.forward.total + traffic.backward.total);
            prop_assert_eq!(moved.sent, traffic.forward.bytes_out[0]);
        }
    }
}
