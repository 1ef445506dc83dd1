//! A naive f64 reference: what every kernel is tested against.
//!
//! Plain loops over the cells of a task's mask, one score at a time, sharing nothing with the kernels but the types.

use crate::{HeadGeometry, InvalidAttention, Task, TensorView};

/// O and LSE of a task, contiguous, shaped as [`Task::shapes`] says.
#[derive(Clone, Debug, PartialEq)]
pub struct Forward {
    /// `[tokens, q heads, v_head_dim]`; zero for a row without keys.
    pub o: Vec<f64>,
    /// `[tokens, q heads]`, natural log; `-inf` for a row without keys.
    pub lse: Vec<f64>,
}

/// Q, K and V of a task.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// `[tokens, q heads, head_dim]`.
    pub q: TensorView<'a>,
    /// `[keys, kv heads, head_dim]`.
    pub k: TensorView<'a>,
    /// `[keys, kv heads, v_head_dim]`.
    pub v: TensorView<'a>,
}

/// What the backward pass needs besides Q, K and V.
#[derive(Clone, Copy, Debug)]
pub struct OutputGradient<'a> {
    /// `[tokens, q heads, v_head_dim]`.
    pub d_o: TensorView<'a>,
    /// LSE over all keys of each row, those of other tasks included: `[tokens, q heads]`.
    pub lse: &'a [f64],
    /// D = rowsum(dO * O) over the final O: `[tokens, q heads]`.
    pub d: &'a [f64],
}

/// dQ, dK and dV of a task, contiguous, shaped as Q, K and V.
#[derive(Clone, Debug, PartialEq)]
pub struct Backward {
    /// `[tokens, q heads, head_dim]`.
    pub dq: Vec<f64>,
    /// `[keys, kv heads, head_dim]`.
    pub dk: Vec<f64>,
    /// `[keys, kv heads, v_head_dim]`.
    pub dv: Vec<f64>,
}

/// O and LSE of `task`.
///
/// # Errors
/// [`InvalidAttention`] when the task does not fit the geometry, or a tensor the task.
pub fn forward(
    geometry: &HeadGeometry,
    task: &Task,
    inputs: Inputs<'_>,
) -> Result<Forward, InvalidAttention> {
    check(geometry, task, inputs)?;
    let shapes = task.shapes(geometry);
    let [rows, q_heads, dim] = shapes.o;
    let mut out =
        Forward { o: vec![0.0; rows * q_heads * dim], lse: vec![f64::NEG_INFINITY; rows * q_heads] };
    for row in 0..rows {
        for head in 0..q_heads {
            let at = row * q_heads + head;
            let cells = scores(geometry, task, inputs, row, head);
            let max = cells.iter().map(|c| c.score).fold(f64::NEG_INFINITY, f64::max);
            if cells.is_empty() {
                continue;
            }
            let sum: f64 = cells.iter().map(|c| (c.score - max).exp()).sum();
            out.lse[at] = max + sum.ln();
            for cell in &cells {
                let p = (cell.score - max).exp() / sum;
                let v = inputs.v.row(cell.key, head / geometry.group());
                for (o, v) in out.o[at * dim..][..dim].iter_mut().zip(v) {
                    *o += p * f64::from(*v);
                }
            }
        }
    }
    Ok(out)
}

/// dQ, dK and dV of `task`, from the LSE and D given.
///
/// # Errors
/// [`InvalidAttention`] when the task does not fit the geometry, or a tensor the task.
pub fn backward(
    geometry: &HeadGeometry,
    task: &Task,
    inputs: Inputs<'_>,
    gradient: OutputGradient<'_>,
) -> Result<Backward, InvalidAttention> {
    check(geometry, task, inputs)?;
    let shapes = task.shapes(geometry);
    gradient.d_o.expect("d_o", shapes.o)?;
    let [rows, q_heads, _] = shapes.row;
    for (tensor, data) in [("lse", gradient.lse), ("d", gradient.d)] {
        if data.len() != rows * q_heads {
            let (shape, actual, needed) = (shapes.row, data.len(), rows * q_heads);
            return Err(InvalidAttention::BadTensor { tensor, actual, shape, stride: q_heads, needed });
        }
    }
    let elements = |shape: [usize; 3]| vec![0.0; shape.iter().product()];
    let mut out = Backward { dq: elements(shapes.q), dk: elements(shapes.k), dv: elements(shapes.v) };
    let (dim, v_dim, scale) = (geometry.head_dim(), geometry.v_head_dim(), f64::from(geometry.scale()));
    for row in 0..rows {
        for head in 0..q_heads {
            let at = row * q_heads + head;
            let kv_head = head / geometry.group();
            let (q, d_o) = (inputs.q.row(row, head), gradient.d_o.row(row, head));
            for cell in scores(geometry, task, inputs, row, head) {
                let (k, v) = (inputs.k.row(cell.key, kv_head), inputs.v.row(cell.key, kv_head));
                let p = (cell.score - gradient.lse[at]).exp();
                let dp = dot(d_o, v);
                let ds = p * (dp - gradient.d[at]) * cell.slope * scale;
                let key = cell.key * shapes.k[1] + kv_head;
                for d in 0..dim {
                    out.dq[at * dim + d] += ds * f64::from(k[d]);
                    out.dk[key * dim + d] += ds * f64::from(q[d]);
                }
                for (dv, d_o) in out.dv[key * v_dim..][..v_dim].iter_mut().zip(d_o) {
                    *dv += p * f64::from(*d_o);
                }
            }
        }
    }
    Ok(out)
}

/// D = rowsum(dO * O): `[tokens, q heads]`, with `o` contiguous and shaped as `d_o`.
pub fn row_dots(d_o: TensorView<'_>, o: &[f64]) -> Vec<f64> {
    let [rows, heads, dim] = d_o.shape();
    let dots = (0..rows * heads).map(|at| {
        let o = &o[at * dim..][..dim];
        d_o.row(at / heads, at % heads).iter().zip(o).map(|(a, b)| f64::from(*a) * b).sum()
    });
    dots.collect()
}

struct Cell {
    /// Index among the task's keys.
    key: usize,
    score: f64,
    /// Derivative of the score by the scaled product; one without softcap.
    slope: f64,
}

/// The cells of one row and query head (both counted within the task), slice by slice.
fn scores(geometry: &HeadGeometry, task: &Task, inputs: Inputs<'_>, row: usize, head: usize) -> Vec<Cell> {
    let kv_head = head / geometry.group();
    let mut cells = Vec::new();
    for slice in task.mask().slices_of(task.kv_heads().start() + kv_head) {
        for position in slice.keys_of(task.q().start() + row).iter() {
            let key = position - task.kv().start();
            let scaled =
                dot(inputs.q.row(row, head), inputs.k.row(key, kv_head)) * f64::from(geometry.scale());
            let (score, slope) = match geometry.softcap().map(f64::from) {
                None => (scaled, 1.0),
                Some(cap) => {
                    let t = (scaled / cap).tanh();
                    (cap * t, 1.0 - t * t)
                }
            };
            cells.push(Cell { key, score, slope });
        }
    }
    cells
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn check(geometry: &HeadGeometry, task: &Task, inputs: Inputs<'_>) -> Result<(), InvalidAttention> {
    task.check(geometry)?;
    let shapes = task.shapes(geometry);
    inputs.q.expect("q", shapes.q)?;
    inputs.k.expect("k", shapes.k)?;
    inputs.v.expect("v", shapes.v)
}
