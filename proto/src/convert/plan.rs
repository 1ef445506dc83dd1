//! Planned tasks.

use outboard_attention::PlannedTask;

use super::{convert, not_empty};
use crate::{TaskError, v1};

/// A planned task, its tick, and the server that computes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AssignedTask {
    /// Nano-batch.
    pub tick: u32,
    /// The server's id in the pool.
    pub server_id: u64,
    /// The task.
    pub task: PlannedTask,
}

impl TryFrom<v1::PlannedTask> for AssignedTask {
    type Error = TaskError;

    fn try_from(planned: v1::PlannedTask) -> Result<AssignedTask, TaskError> {
        let task = PlannedTask {
            document: convert("task.document", planned.document)?,
            q: not_empty("task.q", convert("task.q", planned.q)?)?,
            kv: not_empty("task.kv", convert("task.kv", planned.kv)?)?,
            kv_heads: not_empty("task.kv_heads", convert("task.kv_heads", planned.kv_heads)?)?,
            slot: planned.slot,
            group: planned.group,
            position: planned.position,
        };
        Ok(AssignedTask { tick: planned.tick, server_id: planned.server_id, task })
    }
}

impl From<&AssignedTask> for v1::PlannedTask {
    fn from(assigned: &AssignedTask) -> v1::PlannedTask {
        let AssignedTask { tick, server_id, task } = assigned;
        v1::PlannedTask {
            document: Some((&task.document).into()),
            q: Some((&task.q).into()),
            kv: Some((&task.kv).into()),
            kv_heads: Some((&task.kv_heads).into()),
            tick: *tick,
            slot: task.slot,
            group: task.group,
            position: task.position,
            server_id: *server_id,
        }
    }
}
