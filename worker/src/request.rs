//! A layer's planned tasks as requests: headers, and slices of the rank's own tensors.

use std::collections::BTreeMap;
use std::sync::Arc;

use outboard_attention::{
    DType, Direction, DocumentId, Elements, InvalidAttention, Span, TensorLayout, TensorSlice,
};
use outboard_proto::TaskHeader;
use outboard_transport::{GradientInputs, TaskInputs, TaskRequest};

use crate::assemble::Part;
use crate::plan::{PlacedTask, RankPlan};
use crate::{JobOptions, LayerCall, OutputGradient, Qkv};

/// A task ready to ship, and where it is planned.
#[derive(Clone, Debug)]
pub(crate) struct PlacedRequest {
    pub(crate) part: Part,
    pub(crate) server: u64,
    pub(crate) request: TaskRequest,
}

/// What the requests of one call have in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shipping<'a> {
    pub(crate) options: &'a JobOptions,
    pub(crate) numerics_id: &'a str,
    pub(crate) plan: &'a RankPlan,
}

/// The requests of one call, in plan order. Tasks of one document and kv-head range on one server share one slice of K
/// and one of V, which hold the hull of the keys they need, so that keys travel once.
pub(crate) fn requests(
    shipping: Shipping<'_>,
    call: &LayerCall,
    qkv: &Qkv,
    gradient: Option<&OutputGradient>,
) -> Result<Vec<PlacedRequest>, InvalidAttention> {
    let rows: BTreeMap<DocumentId, Span> = call.documents.iter().map(|d| (d.id, d.rows)).collect();
    let tasks: Vec<_> = shipping.plan.tasks.iter().filter(|t| t.tick == call.tick).collect();
    let keys = KeySlices::new(&tasks, &rows, call, qkv)?;
    let request = |placed: &&PlacedTask| {
        let document_rows = rows_of(&rows, placed)?;
        let source = Source { call, placed, first_row: document_rows.start() };
        let (k, v) = keys.of(placed);
        let inputs = source.inputs(qkv, (k, v), gradient)?;
        let request = TaskRequest { header: header(shipping, call, placed, gradient.is_some()), inputs };
        request.check()?;
        let part = Part {
            task: placed.task.clone(),
            first_row: document_rows.start(),
            group: placed.planned.group,
            position: placed.planned.position,
        };
        Ok(PlacedRequest { part, server: placed.server, request })
    };
    tasks.iter().map(request).collect()
}

/// The rows of a task's document; they must hold all the tokens that the task reads.
fn rows_of(rows: &BTreeMap<DocumentId, Span>, placed: &PlacedTask) -> Result<Span, InvalidAttention> {
    let needed = placed.task.q().hull(placed.task.kv());
    let held = rows.get(&placed.task.document()).copied().unwrap_or_default();
    let bound = Span::to(held.len());
    if bound.covers(needed) {
        Ok(held)
    } else {
        let (field, bound_name) = ("task tokens", "the document's rows");
        Err(InvalidAttention::OutsideSpan { field, span: needed, bound_name, bound })
    }
}

/// Slices of K and V by server, document and kv heads.
struct KeySlices(BTreeMap<(u64, DocumentId, Span), (TensorSlice, TensorSlice)>);

impl KeySlices {
    fn new(
        tasks: &[&PlacedTask],
        rows: &BTreeMap<DocumentId, Span>,
        call: &LayerCall,
        qkv: &Qkv,
    ) -> Result<Self, InvalidAttention> {
        let mut hulls: BTreeMap<_, (Span, &PlacedTask)> = BTreeMap::new();
        for placed in tasks {
            let hull = &mut hulls.entry(key(placed)).or_insert((placed.task.kv(), placed)).0;
            *hull = hull.hull(placed.task.kv());
        }
        let slices = hulls.into_iter().map(|(key, (tokens, placed))| {
            let source = Source { call, placed, first_row: rows_of(rows, placed)?.start() };
            let (heads, geometry) = (placed.task.kv_heads(), &call.geometry);
            let k = source.slice("k", &qkv.k, tokens, heads, [geometry.kv_heads(), geometry.head_dim()])?;
            let v = source.slice("v", &qkv.v, tokens, heads, [geometry.kv_heads(), geometry.v_head_dim()])?;
            Ok((key, (k, v)))
        });
        Ok(KeySlices(slices.collect::<Result<_, InvalidAttention>>()?))
    }

    fn of(&self, placed: &PlacedTask) -> (TensorSlice, TensorSlice) {
        // Every task's key was entered by `new`.
        self.0[&key(placed)].clone()
    }
}

fn key(placed: &PlacedTask) -> (u64, DocumentId, Span) {
    (placed.server, placed.task.document(), placed.task.kv_heads())
}

/// Where a task's tensors come from.
struct Source<'a> {
    call: &'a LayerCall,
    placed: &'a PlacedTask,
    first_row: usize,
}

impl Source<'_> {
    fn inputs(
        &self,
        qkv: &Qkv,
        (k, v): (TensorSlice, TensorSlice),
        gradient: Option<&OutputGradient>,
    ) -> Result<TaskInputs, InvalidAttention> {
        let geometry = &self.call.geometry;
        let (tokens, heads) = (self.placed.task.q(), geometry.q_heads_of(self.placed.task.kv_heads()));
        let of_queries = |name, storage: &Elements, dim: usize| {
            self.slice(name, storage, tokens, heads, [geometry.q_heads(), dim])
        };
        let rows = |name, storage: &Arc<Vec<f32>>| of_queries(name, &Arc::clone(storage).into(), 1);
        let gradient = match gradient {
            None => None,
            Some(gradient) => Some(GradientInputs {
                d_o: of_queries("d_o", &gradient.d_o, geometry.v_head_dim())?,
                lse: rows("lse", &gradient.lse)?,
                d: rows("d", &gradient.d)?,
            }),
        };
        Ok(TaskInputs { q: of_queries("q", &qkv.q, geometry.head_dim())?, k, v, gradient })
    }

    /// The `heads` of the document's `tokens` in packed activations of `[all heads, dim]` a row.
    fn slice(
        &self,
        name: &'static str,
        storage: &Elements,
        tokens: Span,
        heads: Span,
        [all_heads, dim]: [usize; 2],
    ) -> Result<TensorSlice, InvalidAttention> {
        let stride = all_heads * dim;
        let offset = (self.first_row + tokens.start()) * stride + heads.start() * dim;
        let layout = TensorLayout { offset, stride, tokens, heads: heads.len(), dim };
        TensorSlice::new(name, storage.clone(), layout)
    }
}

fn header(shipping: Shipping<'_>, call: &LayerCall, placed: &PlacedTask, backward: bool) -> TaskHeader {
    TaskHeader {
        job: shipping.options.job.clone(),
        step: call.step,
        plan_epoch: shipping.plan.epoch,
        layer: call.layer,
        direction: if backward { Direction::Backward } else { Direction::Forward },
        tick: call.tick,
        attempt: 0,
        slot: placed.planned.slot,
        group: placed.planned.group,
        position: placed.planned.position,
        numerics_id: Some(shipping.numerics_id.to_owned()),
        geometry: call.geometry,
        task: placed.task.clone(),
        result_dtype: DType::F32,
        deadline: Some(shipping.options.task_timeout),
    }
}
