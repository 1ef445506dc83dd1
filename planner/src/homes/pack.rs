//! Packing: long documents into bins, cut where they do not fit.

use super::bin::{Bin, Segment, Terms};
use crate::search::Random;

/// How a packing differs from the plain one.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Whim {
    /// Segments come in order of their excess give or take this part of it.
    pub(super) noise: f64,
    /// How often a segment goes to any bin where it fits, not the tightest.
    pub(super) loose: f64,
    /// How often a cut is made for any bin, not the one that takes most.
    pub(super) anywhere: f64,
    /// How often a segment that fits nowhere stays whole in the roomiest bin: slices will relieve that.
    pub(super) whole: f64,
}

/// Segments are cut so many times for each of them at most.
const CUTS: usize = 64;

/// Puts all segments into bins, those with the most excess first, each into the tightest bin that it fits. What fits
/// nowhere is cut: its last rows fill a bin, or its first rows a small gap.
pub(super) fn pack(
    terms: &Terms,
    bins: &mut [Bin],
    segments: &mut Vec<Segment>,
    queue: &mut Vec<(f64, Segment)>,
    whim: Whim,
    random: &mut Random,
) {
    queue.clear();
    for segment in segments.drain(..) {
        let noise = if whim.noise > 0.0 { 1.0 + whim.noise * (random.unit() - 0.5) } else { 1.0 };
        queue.push((terms.excess(&segment) * noise, segment));
    }
    queue.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then_with(|| order(&a.1, &b.1)));
    let mut cuts = CUTS * queue.len();
    while let Some((_, segment)) = queue.pop() {
        let (excess, tokens) = (terms.excess(&segment), segment.hi - segment.lo);
        let loose = whim.loose > 0.0 && random.unit() < whim.loose;
        let mut best: Option<(f64, usize)> = None;
        for (n, bin) in bins.iter().enumerate() {
            if bin.room.fits(excess, tokens) {
                let key = if loose { random.unit() } else { bin.room.excess };
                if best.is_none_or(|(least, _)| key < least) {
                    best = Some((key, n));
                }
            }
        }
        if let Some((_, n)) = best {
            bins[n].put(terms, segment);
            continue;
        }
        if (whim.whole > 0.0 && random.unit() < whim.whole) || cuts == 0 {
            let roomiest = most(bins, |bin| (bin.room.tokens >= tokens).then_some(bin.room.excess));
            if let Some(n) = roomiest.or_else(|| most(bins, |bin| Some(bin.room.excess))) {
                bins[n].put(terms, segment);
            }
            continue;
        }
        cuts -= 1;
        let rest = match cut(terms, bins, &segment, whim, random) {
            Some((n, part, rest)) => {
                bins[n].put(terms, part);
                rest
            }
            None => {
                let room = |bin: &Bin| Some(bin.room.excess.min(terms.tokens * bin.room.tokens));
                if let Some(n) = most(bins, room) {
                    bins[n].put(terms, segment);
                }
                continue;
            }
        };
        if rest.lo < rest.hi {
            let excess = terms.excess(&rest);
            let at = queue.partition_point(|other| other.0 < excess);
            queue.insert(at, (excess, rest));
        }
    }
}

fn order(a: &Segment, b: &Segment) -> std::cmp::Ordering {
    a.document.cmp(&b.document).then(a.lo.total_cmp(&b.lo))
}

/// The bin with the most of something, of equals the first.
fn most(bins: &[Bin], of: impl Fn(&Bin) -> Option<f64>) -> Option<usize> {
    let mut best: Option<(f64, usize)> = None;
    for (n, bin) in bins.iter().enumerate() {
        if let Some(value) = of(bin)
            && best.is_none_or(|(most, _)| value > most)
        {
            best = Some((value, n));
        }
    }
    best.map(|(_, n)| n)
}

/// A bin, the part of the segment that it takes, and the rest.
fn cut(
    terms: &Terms,
    bins: &[Bin],
    segment: &Segment,
    whim: Whim,
    random: &mut Random,
) -> Option<(usize, Segment, Segment)> {
    let anywhere = whim.anywhere > 0.0 && random.unit() < whim.anywhere;
    let roomiest = bins.iter().map(|bin| bin.room.excess).fold(f64::NEG_INFINITY, f64::max);
    let mut tail: Option<(f64, usize, f64)> = None;
    let mut head: Option<(f64, usize, f64)> = None;
    for (n, bin) in bins.iter().enumerate() {
        if bin.room.tokens < terms.block || bin.room.excess <= 0.0 {
            continue;
        }
        let start = terms.start_of_tail(segment, bin.room);
        let key = if anywhere { random.unit() } else { start };
        if start < segment.hi && tail.is_none_or(|(least, ..)| key < least) {
            tail = Some((key, n, start));
        }
        let end = terms.end_of_head(segment, bin.room);
        let rest = terms.excess(&Segment { lo: end, ..*segment });
        if end >= segment.lo + terms.block && end < segment.hi && rest <= roomiest {
            let key = if anywhere { random.unit() } else { end };
            if head.is_none_or(|(least, ..)| key < least) {
                head = Some((key, n, end));
            }
        }
    }
    let use_head = match (head, tail) {
        (Some(_), None) => true,
        (Some(head), Some(tail)) => {
            if anywhere {
                random.below(2) == 0
            } else {
                head.0 < tail.0
            }
        }
        _ => false,
    };
    if use_head {
        let (_, n, end) = head?;
        return Some((n, Segment { hi: end, ..*segment }, Segment { lo: end, ..*segment }));
    }
    let (_, n, start) = tail?;
    Some((n, Segment { lo: start, ..*segment }, Segment { hi: start, ..*segment }))
}
