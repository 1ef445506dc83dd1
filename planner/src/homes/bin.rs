//! Ranks as bins, what they hold of long documents, and what that costs.

/// Rows `[lo, hi)` of a causal document. Positions are whole numbers: they are kept as doubles because everything that is
/// computed from them is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Segment {
    pub(super) document: usize,
    pub(super) lo: f64,
    pub(super) hi: f64,
}

/// What ranks should hold and what it costs when they do not.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// Cells that a token of a short document brings with it: what is not filled with long ones is filled with these.
    pub(super) density: f64,
    /// Bytes of a row over those of a key, both passes.
    pub(super) row: f64,
    /// kv heads that may be given away by themselves.
    pub(super) heads: f64,
    /// Slices cost so many times what they do at best.
    pub(super) dear: f64,
    /// What a bin of which all tokens need as many keys pays besides: to its fourth power less.
    pub(super) toll: f64,
    /// Tokens of an average bin.
    pub(super) tokens: f64,
    /// Documents are cut at multiples of this many tokens.
    pub(super) block: f64,
    /// Rows of the cheapest tail, of the prefix that it ends, and its cells, of the prefix squared.
    pub(super) tail: f64,
    pub(super) area: f64,
}

/// What a bin has room for. Work is counted in excess of what tokens of short documents would bring.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Room {
    /// Cells of one kv head above those of short documents.
    pub(super) excess: f64,
    pub(super) tokens: f64,
}

/// A rank.
#[derive(Clone, Debug)]
pub(super) struct Bin {
    pub(super) segments: Vec<Segment>,
    /// What is left; below zero where there is too much.
    pub(super) room: Room,
    /// In keys of all heads.
    pub(super) cost: f64,
}

/// Keys that a cheapest slice has at least, as if there were a document of so many tokens.
const SHORT: f64 = 1000.0;
/// What a token too many costs, in keys.
const CROWD: f64 = 4.0;
/// Where all heads are not enough, the rest costs this many times as much.
const SPENT: f64 = 2.0;

/// Of a bin whose tokens need more keys each than this, the toll is that of this many.
const HIGHEST_TOLL: f64 = 8.0;

/// Cells of the rows `[lo, hi)` of a causal document.
pub(super) fn cells(lo: f64, hi: f64) -> f64 {
    (hi * (hi + 1.0) - lo * (lo + 1.0)) / 2.0
}

impl Terms {
    pub(super) fn new(row: f64, heads: f64, tokens: f64, block: f64, density: f64) -> Terms {
        let tail = ((1.0 + 2.0 * row).sqrt() - 1.0) / row;
        let area = tail - tail * tail / 2.0;
        Terms { density, row, heads, dear: 1.0, toll: 0.0, tokens, block, tail, area }
    }

    /// Cells of a segment above those of as many tokens of short documents.
    pub(super) fn excess(&self, segment: &Segment) -> f64 {
        cells(segment.lo, segment.hi) - self.density * (segment.hi - segment.lo)
    }

    /// About what it costs to move `over` cells of each head from a bin whose longest prefix is `longest`, as slices of some
    /// of its heads: the crate's README has the formulas.
    fn slices(&self, over: f64, longest: f64) -> f64 {
        if over <= 0.0 {
            return 0.0;
        }
        let (cells, r) = (over * self.heads, self.row);
        let area = self.area * longest * longest;
        let keys = if cells <= area {
            (2.0 * (1.0 + 2.0 * r) * cells).sqrt()
        } else {
            cells / area * (1.0 + r * self.tail) * longest
        };
        let spent = if cells > self.heads * area { SPENT } else { 1.0 };
        self.dear * keys / self.heads * spent
    }

    /// Where the rows that end a segment begin, if they are to fit.
    pub(super) fn start_of_tail(&self, segment: &Segment, room: Room) -> f64 {
        // a^2 / 2 + a b = excess(0, hi) - room
        let b = 0.5 - self.density;
        let c = self.excess(&Segment { lo: 0.0, ..*segment }) - room.excess;
        let start = -b + (b * b + 2.0 * c).max(0.0).sqrt();
        let start = start.max(segment.hi - room.tokens).max(segment.lo);
        ((start / self.block).ceil() * self.block).min(segment.hi)
    }

    /// Where the rows that begin a segment end, if they are to fit.
    pub(super) fn end_of_head(&self, segment: &Segment, room: Room) -> f64 {
        let b = 0.5 - self.density;
        let c = self.excess(&Segment { lo: 0.0, hi: segment.lo, ..*segment }) + room.excess;
        let end = -b + (b * b + 2.0 * c).max(0.0).sqrt();
        let end = end.min(segment.lo + room.tokens).min(segment.hi);
        if end == segment.hi { end } else { ((end / self.block).floor() * self.block).max(segment.lo) }
    }
}

impl Room {
    pub(super) fn fits(self, excess: f64, tokens: f64) -> bool {
        self.excess >= excess && self.tokens >= tokens
    }
}

impl Bin {
    pub(super) fn new(room: Room) -> Bin {
        Bin { segments: Vec::new(), room, cost: 0.0 }
    }

    pub(super) fn put(&mut self, terms: &Terms, segment: Segment) {
        self.room.tokens -= segment.hi - segment.lo;
        self.room.excess -= terms.excess(&segment);
        self.segments.push(segment);
    }

    /// Joins segments that touch, and counts what the bin costs: the keys that it lacks of each document's longest prefix,
    /// slices of what is too much work, and a toll.
    pub(super) fn settle(&mut self, terms: &Terms) {
        join(&mut self.segments);
        let (mut keys, mut longest) = (0.0, SHORT);
        for (n, segment) in self.segments.iter().enumerate() {
            keys -= segment.hi - segment.lo;
            let last = self.segments.get(n + 1).is_none_or(|next| next.document != segment.document);
            if last {
                keys += segment.hi;
                longest = segment.hi.max(longest);
            }
        }
        let crowd = CROWD * (-self.room.tokens).max(0.0);
        let slices = terms.slices(-self.room.excess, longest);
        let load = ((keys + slices) / terms.tokens).min(HIGHEST_TOLL);
        self.cost = keys + crowd + slices + terms.toll * load * load * load * load;
    }
}

/// Orders segments and joins those that touch.
pub(super) fn join(segments: &mut Vec<Segment>) {
    segments.sort_unstable_by(|a, b| a.document.cmp(&b.document).then(a.lo.total_cmp(&b.lo)));
    segments.dedup_by(|next, last| {
        let touch = last.document == next.document && last.hi == next.lo;
        if touch {
            last.hi = next.hi;
        }
        touch
    });
}
