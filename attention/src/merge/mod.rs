//! Putting a rank's results together from those of its tasks: LSE merge of partial outputs, and sums of partial
//! gradients in plan order. Attention sinks join last.
//!
//! Nothing here adds up in order of arrival: callers collect what arrives and hand it over in plan order.

mod sink;

use crate::math::{exp, ln};
use crate::{InvalidAttention, Span, TensorView};

pub use sink::{InvalidSinks, apply_sinks, sink_gradient};

/// A mutable view `[tokens, heads, dim]` of f32: element `(t, h, d)` is `data[t * stride + h * dim + d]`. A rank's
/// home buffer holds its documents packed one after another, so a token's row is its document's first row plus its
/// position in it.
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    data: &'a mut [f32],
    shape: [usize; 3],
    stride: usize,
}

/// Where a partial result's first element goes in a home buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Corner {
    /// Row of its first token.
    pub row: usize,
    /// Its first head.
    pub head: usize,
}

/// O and LSE at home, merged from the outputs of tasks.
#[derive(Debug)]
pub struct OutputMerge<'a> {
    o: TensorViewMut<'a>,
    lse: TensorViewMut<'a>,
}

/// One task's share of a gradient, or the sum that a server made of a whole reduction group (which is then the only
/// partial of its group).
#[derive(Clone, Copy, Debug)]
pub struct GradientPartial<'a> {
    /// Reduction group.
    pub group: u32,
    /// Place within the group.
    pub position: u32,
    /// Where its first element goes in the home buffer.
    pub at: Corner,
    /// `[tokens, heads, dim]`.
    pub values: TensorView<'a>,
}

impl<'a> TensorViewMut<'a> {
    /// A view of `data`. `stride` is the distance in elements from one token to the next.
    ///
    /// # Errors
    /// [`InvalidAttention::BadTensor`] when `data` is too short, or the stride shorter than a token.
    pub fn new(
        tensor: &'static str,
        data: &'a mut [f32],
        shape: [usize; 3],
        stride: usize,
    ) -> Result<Self, InvalidAttention> {
        TensorView::new(tensor, data, shape, stride)?;
        Ok(TensorViewMut { data, shape, stride })
    }

    /// A view of contiguous data.
    ///
    /// # Errors
    /// [`InvalidAttention::BadTensor`] when `data` does not hold exactly the shape's elements.
    pub fn contiguous(
        tensor: &'static str,
        data: &'a mut [f32],
        shape: [usize; 3],
    ) -> Result<Self, InvalidAttention> {
        let stride = TensorView::contiguous(tensor, data, shape)?.stride();
        Ok(TensorViewMut { data, shape, stride })
    }

    /// `[tokens, heads, dim]`.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Sets every element of the view.
    pub fn fill(&mut self, value: f32) {
        for token in 0..self.shape[0] {
            self.row_mut(Corner { row: token, head: 0 }, self.shape[1]).fill(value);
        }
    }

    /// Adds `values` at `at`.
    ///
    /// # Errors
    /// [`InvalidAttention::OutsideSpan`] or [`InvalidAttention::ShapeMismatch`] when they do not fit there.
    pub fn add(&mut self, at: Corner, values: TensorView<'_>) -> Result<(), InvalidAttention> {
        self.check("partial gradient", at, values)?;
        let [tokens, heads, _] = values.shape();
        for token in 0..tokens {
            let home = self.row_mut(Corner { row: at.row + token, head: at.head }, heads);
            for (home, value) in home.iter_mut().zip(values.token(token)) {
                *home += value;
            }
        }
        Ok(())
    }

    /// All elements of `heads` heads of one token.
    fn row_mut(&mut self, at: Corner, heads: usize) -> &mut [f32] {
        let dim = self.shape[2];
        &mut self.data[at.row * self.stride + at.head * dim..][..heads * dim]
    }

    fn check(
        &self,
        tensor: &'static str,
        at: Corner,
        values: TensorView<'_>,
    ) -> Result<(), InvalidAttention> {
        let [tokens, heads, dim] = values.shape();
        if dim != self.shape[2] {
            let (actual, expected) = (values.shape(), [tokens, heads, self.shape[2]]);
            return Err(InvalidAttention::ShapeMismatch { tensor, actual, expected });
        }
        let (rows, columns) = (Span::at(at.row, tokens), Span::at(at.head, heads));
        for (field, span, bound_name, bound) in [
            ("rows of the partial result", rows, "rows of the home buffer", Span::to(self.shape[0])),
            ("heads of the partial result", columns, "heads of the home buffer", Span::to(self.shape[1])),
        ] {
            if !bound.covers(span) {
                return Err(InvalidAttention::OutsideSpan { field, span, bound_name, bound });
            }
        }
        Ok(())
    }
}

impl<'a> OutputMerge<'a> {
    /// Starts a merge: O becomes zero and LSE `-inf`, which is what rows that no task reaches keep. `o` is
    /// `[rows, q heads, v_head_dim]`, `lse` `[rows, q heads, 1]`.
    ///
    /// # Errors
    /// [`InvalidAttention::ShapeMismatch`] when rows or heads differ.
    pub fn new(mut o: TensorViewMut<'a>, mut lse: TensorViewMut<'a>) -> Result<Self, InvalidAttention> {
        let [rows, heads, _] = o.shape;
        let expected = [rows, heads, 1];
        if lse.shape != expected {
            return Err(InvalidAttention::ShapeMismatch { tensor: "lse", actual: lse.shape, expected });
        }
        o.fill(0.0);
        lse.fill(f32::NEG_INFINITY);
        Ok(OutputMerge { o, lse })
    }

    /// Merges one task's output, whose keys must be disjoint from those merged before. The first output of a row is
    /// copied bit by bit; tasks that share a row must come in plan order.
    ///
    /// # Errors
    /// [`InvalidAttention::OutsideSpan`] or [`InvalidAttention::ShapeMismatch`] when the output does not fit at `at`.
    pub fn add(
        &mut self,
        at: Corner,
        o: TensorView<'_>,
        lse: TensorView<'_>,
    ) -> Result<(), InvalidAttention> {
        self.o.check("partial O", at, o)?;
        let [tokens, heads, _] = o.shape();
        lse.expect("partial LSE", [tokens, heads, 1])?;
        for token in 0..tokens {
            for head in 0..heads {
                let at = Corner { row: at.row + token, head: at.head + head };
                let home_lse = &mut self.lse.row_mut(at, 1)[0];
                merge_row(self.o.row_mut(at, 1), home_lse, o.row(token, head), lse.row(token, head)[0]);
            }
        }
        Ok(())
    }
}

/// Merges `(o, lse)` into `(home, home_lse)`.
fn merge_row(home: &mut [f32], home_lse: &mut f32, o: &[f32], lse: f32) {
    if *home_lse == f32::NEG_INFINITY {
        home.copy_from_slice(o);
        *home_lse = lse;
        return;
    }
    if lse == f32::NEG_INFINITY {
        return;
    }
    let (a, b) = (f64::from(*home_lse), f64::from(lse));
    let max = if b > a { b } else { a };
    let (wa, wb) = (exp(a - max), exp(b - max));
    let sum = wa + wb;
    *home_lse = (max + ln(sum)) as f32;
    for (home, o) in home.iter_mut().zip(o) {
        *home = ((f64::from(*home) * wa + f64::from(*o) * wb) / sum) as f32;
    }
}

/// Adds partial gradients to `home` in plan order, whatever order they are given in: a group's partials are summed
/// from zero by position, then the group sums are added to `home` by group number.
///
/// # Errors
/// [`InvalidAttention::OutsideSpan`] or [`InvalidAttention::ShapeMismatch`] when a partial does not fit; `home` then
/// holds the groups before it.
pub fn add_gradients(
    home: &mut TensorViewMut<'_>,
    mut partials: Vec<GradientPartial<'_>>,
) -> Result<(), InvalidAttention> {
    partials.sort_by_key(|p| (p.group, p.position));
    for group in partials.chunk_by(|a, b| a.group == b.group) {
        match group {
            // Zero plus a partial is that partial: a sum starts at +0 and so is never -0 anyway.
            [only] => home.add(only.at, only.values)?,
            _ => {
                let (at, shape, sum) = sum_group(group, home.shape[2])?;
                home.add(at, TensorView::contiguous("group sum", &sum, shape)?)?;
            }
        }
    }
    Ok(())
}

/// Sums a group's partials from zero in the order given: the hull's corner, shape `[tokens, heads, dim]` and elements.
///
/// # Errors
/// [`InvalidAttention::ShapeMismatch`] when a partial's last dimension is not `dim`.
pub fn sum_group(
    group: &[GradientPartial<'_>],
    dim: usize,
) -> Result<(Corner, [usize; 3], Vec<f32>), InvalidAttention> {
    let spans = group.iter().map(|p| {
        let [tokens, heads, _] = p.values.shape();
        (Span::at(p.at.row, tokens), Span::at(p.at.head, heads))
    });
    let hull = spans.reduce(|(rows, heads), (r, h)| (rows.hull(r), heads.hull(h)));
    let (rows, heads) = hull.unwrap_or_default();
    let shape = [rows.len(), heads.len(), dim];
    let mut sum = vec![0.0; shape.iter().product()];
    let mut view = TensorViewMut::contiguous("group sum", &mut sum, shape)?;
    for partial in group {
        let at = Corner { row: partial.at.row - rows.start(), head: partial.at.head - heads.start() };
        view.add(at, partial.values)?;
    }
    Ok((Corner { row: rows.start(), head: heads.start() }, shape, sum))
}

/// D = rowsum(dO * O), f32 per row and head: `[tokens, heads]`, contiguous. Elements are summed in a fixed order, the
/// same on every machine.
///
/// # Errors
/// [`InvalidAttention::ShapeMismatch`] when `o` is not shaped as `d_o`.
pub fn row_dots(d_o: TensorView<'_>, o: TensorView<'_>) -> Result<Vec<f32>, InvalidAttention> {
    o.expect("o", d_o.shape())?;
    let [tokens, heads, _] = d_o.shape();
    let mut dots = Vec::with_capacity(tokens * heads);
    for token in 0..tokens {
        dots.extend((0..heads).map(|head| dot(d_o.row(token, head), o.row(token, head))));
    }
    Ok(dots)
}

/// Eight running sums, then a tree over them.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (a_chunks, a_rest) = a.as_chunks::<8>();
    let (b_chunks, b_rest) = b.as_chunks::<8>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    for (lane, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        sums[lane] += a * b;
    }
    ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]))
}
