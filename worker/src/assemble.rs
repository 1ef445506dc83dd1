//! A rank's result of one layer, put together from the results of its tasks in plan order.

use std::sync::Arc;

use outboard_attention::kernel::Results;
use outboard_attention::merge::{Corner, GradientPartial, OutputMerge, TensorViewMut, add_gradients};
use outboard_attention::{InvalidAttention, Span, Task, TensorView};
use outboard_proto::{GradientHeader, KeyRange};
use outboard_transport::KeyGradient;

use crate::{Attended, LayerCall, QkvGradient};

/// A task and its place in the rank's packed activations and in the plan.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// The task.
    pub(crate) task: Task,
    /// Row of its first query.
    pub(crate) q_row: usize,
    /// Row of its first key; `None` where keys have homes of their own, to which their gradients are delivered.
    pub(crate) kv_row: Option<usize>,
    /// Reduction group.
    pub(crate) group: u32,
    /// Place within the group.
    pub(crate) position: u32,
}

/// Merges the forward results of `finished`, which are in plan order. Rows that no task reaches have zero output and an
/// LSE of -inf.
pub(crate) fn merge_outputs(
    call: &LayerCall,
    finished: &[(Part, Results)],
) -> Result<Attended, InvalidAttention> {
    let (rows, heads, dim) = (call.rows(), call.geometry.q_heads(), call.geometry.v_head_dim());
    let (mut o, mut lse) = (vec![0.0; rows * heads * dim], vec![0.0; rows * heads]);
    let mut merge = OutputMerge::new(
        TensorViewMut::contiguous("o", &mut o, [rows, heads, dim])?,
        TensorViewMut::contiguous("lse", &mut lse, [rows, heads, 1])?,
    )?;
    for (part, results) in finished {
        if let Results::Forward { o, lse } = results {
            let shapes = part.task.shapes(&call.geometry);
            let o = TensorView::contiguous("o", o, shapes.o)?;
            let lse = TensorView::contiguous("lse", lse, shapes.row)?;
            merge.add(query_corner(call, part), o, lse)?;
        }
    }
    Ok(Attended { o, lse: Arc::new(lse) })
}

/// Sums the backward results of `finished`, and the shares that were delivered, in plan order.
pub(crate) fn sum_gradients(
    call: &LayerCall,
    finished: &[(Part, Results)],
    delivered: &[KeyGradient],
) -> Result<QkvGradient, InvalidAttention> {
    let geometry = &call.geometry;
    let (mut of_q, mut of_k, mut of_v) = (Vec::new(), Vec::new(), Vec::new());
    for (part, results) in finished {
        if let Results::Backward { dq, dk, dv } = results {
            let shapes = part.task.shapes(geometry);
            let partial =
                |at, values| GradientPartial { group: part.group, position: part.position, at, values };
            of_q.push(partial(query_corner(call, part), TensorView::contiguous("dq", dq, shapes.q)?));
            if let Some(row) = part.kv_row {
                let keys = Corner { row, head: part.task.kv_heads().start() };
                of_k.push(partial(keys, TensorView::contiguous("dk", dk, shapes.k)?));
                of_v.push(partial(keys, TensorView::contiguous("dv", dv, shapes.v)?));
            }
        }
    }
    for KeyGradient { header, dk, dv } in delivered {
        let GradientHeader { range: KeyRange { document, tokens, kv_heads, .. }, group, position, .. } =
            header;
        let (field, bound_name, span) = ("keys of a delivered gradient", "the document's rows", *tokens);
        let outside = || InvalidAttention::OutsideSpan { field, span, bound_name, bound: Span::default() };
        let row = call.row_of(*document, *tokens).ok_or_else(outside)?;
        let (tokens, heads, at) = (tokens.len(), kv_heads.len(), Corner { row, head: kv_heads.start() });
        let partial = |values| GradientPartial { group: *group, position: *position, at, values };
        of_k.push(partial(TensorView::contiguous("dk", dk, [tokens, heads, geometry.head_dim()])?));
        of_v.push(partial(TensorView::contiguous("dv", dv, [tokens, heads, geometry.v_head_dim()])?));
    }
    let sum = |name, heads: usize, dim: usize, partials| {
        let mut home = vec![0.0; call.rows() * heads * dim];
        let mut view = TensorViewMut::contiguous(name, &mut home, [call.rows(), heads, dim])?;
        add_gradients(&mut view, partials)?;
        Ok(home)
    };
    Ok(QkvGradient {
        dq: sum("dq", geometry.q_heads(), geometry.head_dim(), of_q)?,
        dk: sum("dk", geometry.kv_heads(), geometry.head_dim(), of_k)?,
        dv: sum("dv", geometry.kv_heads(), geometry.v_head_dim(), of_v)?,
    })
}

fn query_corner(call: &LayerCall, part: &Part) -> Corner {
    let head = call.geometry.q_heads_of(part.task.kv_heads()).start();
    Corner { row: part.q_row, head }
}
