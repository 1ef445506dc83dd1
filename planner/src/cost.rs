//! What moving costs, in bytes of one layer, forward and backward together.

use outboard_attention::{HeadGeometry, Span};

use crate::judge::price::{Fare, Price};
use crate::search::Shape;
use crate::sheet::{Sheet, Strip};

/// Of the price of a key that others see too, what a key costs on average.
const KEY_PRICE: f64 = 0.7;

/// Bytes of a slice, and from them the shape of the cheapest one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// Of a query row of one kv head.
    pub(crate) row: u64,
    /// Of a row of which others compute parts too, so that its results are partial.
    pub(crate) part_of_row: u64,
    /// Of a key of one kv head that others see too, so that its gradient is a partial sum.
    pub(crate) key: u64,
    /// Of a key that nobody else sees.
    pub(crate) own_key: u64,
    /// Of a row and of a key, forward.
    pub(crate) sent: [Price; 2],
    /// The cheapest causal slice of `w` cells ends at row `spread * sqrt(w)`.
    pub(crate) spread: f64,
    /// The cheapest bytes per cell are those of a tail of `tail_area * end * end` cells.
    pub(crate) tail_area: f64,
    /// A slice of some keys has so many keys for each of its rows; `None` where none is taken.
    pub(crate) keys_a_row: Option<f64>,
    /// How much more than they cost keys count where slices are chosen.
    scarcity: f64,
}

impl Cost {
    pub(crate) fn new(geometry: &HeadGeometry) -> Cost {
        let [row, own_key] = [Fare::of_row(geometry, false), Fare::of_key(geometry, false)];
        let sent = [row.forward, own_key.forward];
        let bytes =
            |Fare { forward, backward }: Fare| forward.there + forward.back + backward.there + backward.back;
        let [row, own_key] = [row, own_key].map(bytes);
        let [part_of_row, key] = [Fare::of_row(geometry, true), Fare::of_key(geometry, true)].map(bytes);
        let unshaped = Cost {
            row,
            part_of_row,
            key,
            own_key,
            sent,
            spread: 0.0,
            tail_area: 0.0,
            keys_a_row: None,
            scarcity: 0.0,
        };
        unshaped.shaped(1.0)
    }

    /// Whether some keys of rows cost fewer bytes for their cells than all keys of fewer rows: `2 sqrt(r' w)` keys
    /// against `sqrt(2 (1 + 2 r) w)`.
    pub(crate) fn favours_some_keys(&self) -> bool {
        2.0 * self.part_of_row as f64 <= (self.key + 2 * self.row) as f64
    }

    /// The same prices, where rows may go with some of their keys.
    pub(crate) fn with_some_keys(self) -> Cost {
        Cost { keys_a_row: Some(1.0), ..self }.shaped(1.0)
    }

    /// The same prices, with slices shaped as if keys cost `keys` times as much.
    pub(crate) fn shaped(self, keys: f64) -> Cost {
        // Rows (p - x, p] with keys [0, p) hold p * x - x * x / 2 cells and cost row * x + key * p: minimised over x / p
        // at a fixed number of cells, and over bytes per cell at a fixed p.
        let r = self.row as f64 / (self.key as f64 * keys);
        let (middle, tail) = (1.0 / (1.0 + r), ((1.0 + 2.0 * r).sqrt() - 1.0) / r);
        let area = |x: f64| x - x * x / 2.0;
        // Rows x with keys k each hold x * k cells and cost part_of_row * x + key * k.
        let keys_a_row = self.keys_a_row.map(|_| self.part_of_row as f64 / (self.key as f64 * keys));
        Cost { spread: 1.0 / area(middle).sqrt(), tail_area: area(tail), keys_a_row, ..self }
    }

    /// Bytes of the rows `q` with keys `kv` of one kv head on a slot of `rank`, which has the tokens it is home of, and the
    /// first `known` keys besides. Keys count more than they cost where they are scarce.
    pub(crate) fn bytes(&self, sheet: &Sheet<'_>, q: Span, kv: Span, rank: Option<u32>, known: usize) -> f64 {
        let keys = sheet.seen(kv).keys(q);
        let keys = Span::new(keys.start().max(known), keys.end()).unwrap_or_default();
        let row = if kv.covers(Span::to(q.end())) { self.row } else { self.part_of_row };
        let away = |span: Span| match rank {
            Some(rank) => {
                let own = sheet.document.homes().iter().filter(|home| home.rank == rank);
                span.len() - own.map(|home| home.tokens.intersect(span).len()).sum::<usize>()
            }
            None => span.len(),
        };
        let (rows, keys) = (away(q) as u64 * row, away(keys) as u64 * self.key);
        rows as f64 + keys as f64 * (1.0 + self.scarcity)
    }

    /// The same prices, but keys count `scarcity` times more than they cost: where heads run out, a slice that leaves long
    /// rows behind is worth more.
    pub(crate) fn with_scarce_keys(self, scarcity: f64) -> Cost {
        Cost { scarcity, ..self }
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
