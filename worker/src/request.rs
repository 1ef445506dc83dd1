//! A layer's planned tasks as requests: headers, and slices of the rank's own tensors.

use std::collections::BTreeMap;
use std::sync::Arc;

use outboard_attention::{
    DType, Direction, DocumentId, Elements, InvalidAttention, Span, TensorLayout, TensorSlice,
};
use outboard_proto::TaskHeader;
use outboard_transport::{GradientInputs, KeyShare, Keys, TaskRequest};

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
/// and one of V, which hold the hull of the keys they need, so that keys travel once; and so do those whose keys the
/// server fetches.
pub(crate) fn requests(
    shipping: Shipping<'_>,
    call: &LayerCall,
    qkv: &Qkv,
    gradient: Option<&OutputGradient>,
) -> Result<Vec<PlacedRequest>, InvalidAttention> {
    let tasks: Vec<_> = shipping.plan.tasks.iter().filter(|t| t.tick == call.tick).collect();
    let here = KeySlices::new(&tasks, call, qkv)?;
    let shares: Vec<KeyShare> = shipping.plan.fetches.iter().map(|_| KeyShare::default()).collect();
    let request = |placed: &&PlacedTask| {
        let mut header = header(shipping, call, placed, gradient.is_some());
        let fetched = placed.fetch.and_then(|n| Some((shipping.plan.fetches.get(n)?, shares.get(n)?)));
        let (keys, kv_row) = match fetched {
            Some((fetch, share)) => {
                header.key_homes.clone_from(&fetch.homes);
                header.group_tasks = placed.group_tasks;
                (Keys::AtHomes(share.clone()), None)
            }
            None => {
                let (k, v) = here.of(call, placed);
                (Keys::Here { k, v }, Some(row_of(call, placed, placed.task.kv())?))
            }
        };
        let source = Source { call, placed };
        let q = source.of_queries("q", &qkv.q, call.geometry.head_dim())?;
        let request = TaskRequest { header, q, keys, gradient: source.gradient(gradient)? };
        request.check()?;
        let part = Part {
            task: placed.task.clone(),
            q_row: row_of(call, placed, placed.task.q())?,
            kv_row,
            group: placed.planned.group,
            position: placed.planned.position,
        };
        Ok(PlacedRequest { part, server: placed.server, request })
    };
    tasks.iter().map(request).collect()
}

/// Row of the first of a document's tokens; the call must hold all of them, one after another.
fn row_of(call: &LayerCall, placed: &PlacedTask, tokens: Span) -> Result<usize, InvalidAttention> {
    let document = placed.task.document();
    call.row_of(document, tokens).ok_or_else(|| {
        let mut held = call.documents.iter().filter(|d| d.id == document).map(|d| d.tokens());
        let bound = held.find(|held| held.contains(tokens.start())).unwrap_or_default();
        let (field, bound_name) = ("task tokens", "the document's rows");
        InvalidAttention::OutsideSpan { field, span: tokens, bound_name, bound }
    })
}

/// Slices of K and V by server, document, kv heads, and the row that the document's run begins with here.
struct KeySlices(BTreeMap<KeyOf, (TensorSlice, TensorSlice)>);

type KeyOf = (u64, DocumentId, Span, Option<usize>);

impl KeySlices {
    fn new(tasks: &[&PlacedTask], call: &LayerCall, qkv: &Qkv) -> Result<Self, InvalidAttention> {
        let mut hulls: BTreeMap<KeyOf, (Span, &PlacedTask)> = BTreeMap::new();
        for placed in tasks.iter().filter(|placed| placed.fetch.is_none()) {
            let hull = &mut hulls.entry(key(call, placed)).or_insert((placed.task.kv(), placed)).0;
            *hull = hull.hull(placed.task.kv());
        }
        let slices = hulls.into_iter().map(|(key, (tokens, placed))| {
            let source = Source { call, placed };
            let (heads, geometry) = (placed.task.kv_heads(), &call.geometry);
            let k = source.slice("k", &qkv.k, tokens, heads, [geometry.kv_heads(), geometry.head_dim()])?;
            let v = source.slice("v", &qkv.v, tokens, heads, [geometry.kv_heads(), geometry.v_head_dim()])?;
            Ok((key, (k, v)))
        });
        Ok(KeySlices(slices.collect::<Result<_, InvalidAttention>>()?))
    }

    fn of(&self, call: &LayerCall, placed: &PlacedTask) -> (TensorSlice, TensorSlice) {
        // Every task's key was entered by `new`.
        self.0[&key(call, placed)].clone()
    }
}

fn key(call: &LayerCall, placed: &PlacedTask) -> KeyOf {
    let (document, kv) = (placed.task.document(), placed.task.kv());
    let mut runs = call.documents.iter().filter(|packed| packed.id == document);
    let run = runs.find(|packed| packed.tokens().covers(kv)).map(|packed| packed.rows.start());
    (placed.server, document, placed.task.kv_heads(), run)
}

/// Where a task's tensors come from.
struct Source<'a> {
    call: &'a LayerCall,
    placed: &'a PlacedTask,
}

impl Source<'_> {
    fn of_queries(
        &self,
        name: &'static str,
        storage: &Elements,
        dim: usize,
    ) -> Result<TensorSlice, InvalidAttention> {
        let geometry = &self.call.geometry;
        let (tokens, heads) = (self.placed.task.q(), geometry.q_heads_of(self.placed.task.kv_heads()));
        self.slice(name, storage, tokens, heads, [geometry.q_heads(), dim])
    }

    fn gradient(
        &self,
        gradient: Option<&OutputGradient>,
    ) -> Result<Option<GradientInputs>, InvalidAttention> {
        let Some(OutputGradient { d_o, lse, d }) = gradient else { return Ok(None) };
        let rows = |name, storage: &Arc<Vec<f32>>| self.of_queries(name, &Arc::clone(storage).into(), 1);
        Ok(Some(GradientInputs {
            d_o: self.of_queries("d_o", d_o, self.call.geometry.v_head_dim())?,
            lse: rows("lse", lse)?,
            d: rows("d", d)?,
        }))
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
        let offset = row_of(self.call, self.placed, tokens)? * stride + heads.start() * dim;
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
        key_homes: Vec::new(),
        group_tasks: 0,
    }
}
