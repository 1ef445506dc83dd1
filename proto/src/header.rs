//! A task's header as the program knows it: everything about a task but its tensors.

use std::time::Duration;

use outboard_attention::{DType, Direction, HeadGeometry, Span, Task};

use crate::{KeyHome, KeyRange, LayerRef};

/// Everything about a task but its tensors, validated. On the wire it is a [`crate::v1::TaskHeader`].
#[derive(Clone, Debug, PartialEq)]
pub struct TaskHeader {
    /// The job, for messages and for grouping.
    pub job: String,
    /// Training step.
    pub step: u64,
    /// Which plan of the job the task belongs to.
    pub plan_epoch: u64,
    /// Layer, from zero.
    pub layer: u32,
    /// Forward or backward.
    pub direction: Direction,
    /// Nano-batch.
    pub tick: u32,
    /// 0 at first, one more each time the task is sent again.
    pub attempt: u32,
    /// Slot of the plan.
    pub slot: u32,
    /// Reduction group, unique within the plan.
    pub group: u32,
    /// Place within the group, from zero.
    pub position: u32,
    /// The numerics id the server must have, or any.
    pub numerics_id: Option<String>,
    /// Heads of the layer.
    pub geometry: HeadGeometry,
    /// Document, ranges and mask.
    pub task: Task,
    /// Element type of O, dQ, dK, dV as they travel back; f32 for partial results.
    pub result_dtype: DType,
    /// Time left for the task when sent.
    pub deadline: Option<Duration>,
    /// Where K and V lie that the client does not send; a partition, in order, of tokens that cover the task's keys. None
    /// when it sends them.
    pub key_homes: Vec<KeyHome>,
    /// How many tasks its group has, when one server is to compute them all; else 0. When all of them are sent together,
    /// their dK and dV go to the homes of their keys as one sum.
    pub group_tasks: u32,
}

impl TaskHeader {
    /// The tokens whose keys the server fetches from their homes; `None` when the client sends them.
    pub fn fetched_keys(&self) -> Option<Span> {
        let (first, last) = (self.key_homes.first()?, self.key_homes.last()?);
        Some(first.tokens.hull(last.tokens))
    }

    /// The keys of some tokens of the task's document, as their home knows them.
    pub fn key_range(&self, tokens: Span) -> KeyRange {
        let TaskHeader { job, step, layer, tick, task, .. } = self;
        let layer = LayerRef { job: job.clone(), step: *step, layer: *layer, tick: *tick };
        KeyRange { layer, document: task.document(), tokens, kv_heads: task.kv_heads() }
    }

    /// Names the task for people: job, step, layer, direction, document.
    pub fn name(&self) -> String {
        let TaskHeader { job, step, layer, direction, task, .. } = self;
        let (document, q, heads) = (task.document(), task.q(), task.kv_heads());
        format!(
            "job {job}, step {step}, layer {layer}, {direction}, document {document}, queries {q}, kv heads {heads}"
        )
    }
}
