//! Outlines of band slices, in tokens: keys to the right, queries down.

use outboard_attention::BandSlice;

/// A corner: key, query.
pub(super) type Point = [f64; 2];

/// The corners of a slice's cells, in order; they form a convex polygon. The steps of the diagonal are drawn as a line
/// through their middles, which leaves the area what it is.
pub(super) fn outline(slice: &BandSlice) -> Vec<Point> {
    let (left, right) = (slice.kv().start() as f64, slice.kv().end() as f64);
    let (top, bottom) = (slice.q().start() as f64, slice.q().end() as f64);
    let corners = vec![[left, top], [right, top], [right, bottom], [left, bottom]];
    let corners = match slice.hi() {
        Some(hi) => clipped(&corners, |[key, query]| hi as f64 + 0.5 - (key - query)),
        None => corners,
    };
    match slice.lo() {
        Some(lo) => clipped(&corners, |[key, query]| (key - query) - (lo as f64 - 0.5)),
        None => corners,
    }
}

/// The part of a convex polygon where `inside`, which is linear, is not below zero.
fn clipped(corners: &[Point], inside: impl Fn(Point) -> f64) -> Vec<Point> {
    let next = corners.iter().cycle().skip(1);
    let mut kept = Vec::with_capacity(corners.len() + 1);
    for (&from, &to) in corners.iter().zip(next) {
        let (a, b) = (inside(from), inside(to));
        if a >= 0.0 {
            kept.push(from);
        }
        if (a > 0.0 && b < 0.0) || (a < 0.0 && b > 0.0) {
            let part = a / (a - b);
            kept.push([from[0] + (to[0] - from[0]) * part, from[1] + (to[1] - from[1]) * part]);
        }
    }
    kept
}

/// The area of a polygon, and its centre.
pub(super) fn centre(corners: &[Point]) -> (f64, Point) {
    let Some(&origin) = corners.first() else { return (0.0, [0.0, 0.0]) };
    let (mut twice, mut sum) = (0.0, [0.0, 0.0]);
    for pair in corners.windows(2) {
        let [a, b] = [pair[0], pair[1]].map(|p| [p[0] - origin[0], p[1] - origin[1]]);
        let cross = a[0] * b[1] - a[1] * b[0];
        twice += cross;
        sum = [sum[0] + cross * (a[0] + b[0]) / 3.0, sum[1] + cross * (a[1] + b[1]) / 3.0];
    }
    if twice == 0.0 {
        return (0.0, origin);
    }
    (twice.abs() / 2.0, [origin[0] + sum[0] / twice, origin[1] + sum[1] / twice])
}

/// How far a convex polygon reaches along an axis (0: keys, 1: queries) through a point inside.
pub(super) fn reach(corners: &[Point], [x, y]: Point, axis: usize) -> f64 {
    let (through, other) = if axis == 0 { (y, 1) } else { (x, 0) };
    let next = corners.iter().cycle().skip(1);
    let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
    for (from, to) in corners.iter().zip(next) {
        let (a, b) = (from[other] - through, to[other] - through);
        if (a <= 0.0) == (b <= 0.0) {
            continue;
        }
        let crossing = from[axis] + (to[axis] - from[axis]) * a / (a - b);
        (low, high) = (low.min(crossing), high.max(crossing));
    }
    (high - low).max(0.0)
}

#[cfg(test)]
mod tests {
    use outboard_attention::Span;

    use super::*;

    fn slice(q: Span, kv: Span, lo: Option<i64>, hi: Option<i64>) -> BandSlice {
        BandSlice::new(q, kv, lo, hi).unwrap()
    }

    #[test]
    fn an_outline_has_the_area_of_the_cells() {
        let cases = [
            slice(Span::to(1000), Span::to(1000), None, Some(0)),
            slice(Span::at(600, 300), Span::to(900), None, Some(0)),
            slice(Span::to(1000), Span::to(1000), Some(-100), Some(0)),
            slice(Span::at(200, 700), Span::at(100, 500), Some(-250), Some(50)),
            slice(Span::at(200, 300), Span::at(100, 200), None, None),
            slice(Span::at(200, 300), Span::at(100, 200), Some(-150), None),
        ];
        for slice in cases {
            let (area, middle) = centre(&outline(&slice));
            let cells = slice.cells() as f64;
            assert!((area / cells - 1.0).abs() < 0.005, "{slice:?}: {area} of {cells}");
            assert!(slice.q().contains(middle[1] as usize) && slice.kv().contains(middle[0] as usize));
        }
    }

    #[test]
    fn one_cell_is_seen() {
        for (lo, hi) in [(None, Some(0)), (Some(0), Some(0)), (None, None)] {
            let (area, _) = centre(&outline(&slice(Span::at(5, 1), Span::at(5, 1), lo, hi)));
            assert!(area > 0.7, "{lo:?} {hi:?}: {area}");
        }
    }

    #[test]
    fn a_triangle_reaches_as_far_as_its_side() {
        let corners = outline(&slice(Span::to(100), Span::to(100), None, Some(0)));
        assert!((reach(&corners, [10.0, 50.0], 0) - 50.5).abs() < 1e-9);
        assert!((reach(&corners, [10.0, 50.0], 1) - 90.5).abs() < 1e-9);
        assert_eq!(reach(&[], [0.0, 0.0], 0), 0.0);
    }
}
