//! What moving costs, in bytes of one layer, forward and backward together.

use outboard_attention::{HeadGeometry, Span};

use crate::search::Shape;
use crate::sheet::{Sheet, Strip};

/// Bytes of one kv head that cross a link, by direction of travel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Price {
    /// To the server.
    pub(crate) there: u64,
    /// From the server.
    pub(crate) back: u64,
}

/// What a query row or a key costs in one pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PassPrice {
    pub(crate) row: Price,
    pub(crate) key: Price,
}

impl PassPrice {
    /// Forward: Q, K, V out; O and LSE back. `partial`: the result travels in f32, since others hold parts of it.
    pub(crate) fn forward(geometry: &HeadGeometry, partial: bool) -> PassPrice {
        let Sizes { group, head, v_head, element, result } = Sizes::new(geometry, partial);
        PassPrice {
            row: Price { there: group * head * element, back: group * (v_head * result + 4) },
            key: Price { there: (head + v_head) * element, back: 0 },
        }
    }

    /// Backward, by a server that still has Q, K, V: dO, LSE and D out; dQ, dK, dV back.
    pub(crate) fn backward(geometry: &HeadGeometry, partial: bool) -> PassPrice {
        let Sizes { group, head, v_head, element, result } = Sizes::new(geometry, partial);
        PassPrice {
            row: Price { there: group * (v_head * element + 8), back: group * head * result },
            key: Price { there: 0, back: (head + v_head) * result },
        }
    }
}

struct Sizes {
    group: u64,
    head: u64,
    v_head: u64,
    element: u64,
    result: u64,
}

impl Sizes {
    fn new(geometry: &HeadGeometry, partial: bool) -> Sizes {
        let element = geometry.dtype().bytes() as u64;
        Sizes {
            group: geometry.group() as u64,
            head: geometry.head_dim() as u64,
            v_head: geometry.v_head_dim() as u64,
            element,
            result: if partial { 4 } else { element },
        }
    }
}

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
    /// Of a key of one kv head that others see too, so that its gradient is a partial sum,
    key: u64,
    /// and of one that nobody else sees.
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
        let (forward, rows) = (PassPrice::forward(geometry, false), PassPrice::backward(geometry, false));
        let keys = PassPrice::backward(geometry, true);
        let row = forward.row.there + forward.row.back + rows.row.there + rows.row.back;
        let key = forward.key.there + keys.key.back;
        let own_key = forward.key.there + rows.key.back;
        let sent = [forward.row, forward.key];
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

    /// Bytes that the slots `given` strips move, when `home` keeps the strips `kept`. No two slots have the same rows of
    /// a kv head. Every token counts as the home's.
    pub(crate) fn moved(&self, sheets: &[Sheet<'_>], given: &[(usize, Strip)], kept: &[Strip]) -> Moved {
        let mut all = Moved::default();
        let mut touched: Vec<usize> = given.iter().map(|(_, strip)| strip.sheet).collect();
        touched.sort_unstable();
        touched.dedup();
        for sheet in touched {
            let others = kept.iter().filter(|s| s.sheet == sheet).map(|s| (usize::MAX, s));
            let strips: Vec<(usize, &Strip, Span)> = given
                .iter()
                .filter(|(_, s)| s.sheet == sheet)
                .map(|(slot, s)| (*slot, s))
                .chain(others)
                .map(|(slot, s)| (slot, s, sheets[sheet].keys(s.q)))
                .collect();
            let mut heads: Vec<usize> =
                strips.iter().flat_map(|(_, s, _)| [s.kv_heads.start(), s.kv_heads.end()]).collect();
            heads.sort_unstable();
            heads.dedup();
            let mut here: Vec<(usize, &Strip, Span)> = Vec::new();
            let mut borders = Vec::new();
            for pair in heads.windows(2) {
                here.clear();
                here.extend(strips.iter().filter(|(_, s, _)| s.kv_heads.contains(pair[0])));
                let (mut of_head, mut sent) = (0, 0);
                borders.clear();
                for (slot, strip, keys) in &here {
                    if *slot != usize::MAX {
                        of_head += strip.q.len() as u64 * self.row;
                        sent += strip.q.len() as u64 * self.sent[0].there;
                    }
                    borders.extend([keys.start(), keys.end()]);
                }
                borders.sort_unstable();
                borders.dedup();
                for keys in borders.windows(2) {
                    let sees = |n: usize| here[n].2.contains(keys[0]);
                    // Each slot once, whatever strips it has.
                    let first = |n: &usize| sees(*n) && !(0..*n).any(|m| here[m].0 == here[*n].0 && sees(m));
                    let (mut slots, mut away) = (0, 0);
                    for n in (0..here.len()).filter(first) {
                        slots += 1;
                        away += u64::from(here[n].0 != usize::MAX);
                    }
                    let price = if slots > 1 { self.key } else { self.own_key };
                    of_head += away * (keys[1] - keys[0]) as u64 * price;
                    sent += away * (keys[1] - keys[0]) as u64 * self.sent[1].there;
                }
                all.bytes += of_head * (pair[1] - pair[0]) as u64;
                all.sent += sent * (pair[1] - pair[0]) as u64;
            }
        }
        all
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

    /// The same for causal strips in closed form.
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
