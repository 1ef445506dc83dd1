//! Task headers.

use std::time::Duration;

use outboard_attention::{InvalidAttention, Mask, Span, Task};

use super::home::key_homes;
use super::types::{direction, dtype, mask, slices};
use super::{TensorRef, check_name, check_protocol_version, convert};
use crate::{ErrorKind, PROTOCOL_VERSION, TaskError, TaskHeader, v1};

/// Most tensors that a header may name.
const MAX_TENSORS: usize = 16;

/// A task header as it travels: the header, the task's id on its stream, and the tensors it names.
#[derive(Clone, Debug, PartialEq)]
pub struct WireTask {
    /// The task's id on its stream.
    pub id: u64,
    /// Everything about the task but its tensors.
    pub header: TaskHeader,
    /// The tensors it reads.
    pub tensors: Vec<TensorRef>,
}

impl TryFrom<v1::TaskHeader> for WireTask {
    type Error = TaskError;

    fn try_from(wire: v1::TaskHeader) -> Result<WireTask, TaskError> {
        let name = name_of(&wire);
        parse(wire).map_err(|error| error.context(name))
    }
}

fn parse(wire: v1::TaskHeader) -> Result<WireTask, TaskError> {
    check_protocol_version(wire.protocol_version)?;
    check_name("job", &wire.job)?;
    check_name("numerics_id", &wire.numerics_id)?;
    if wire.sink {
        let message = "sink logits enter at home, once all keys are merged; send the task without it";
        return Err(TaskError::new(ErrorKind::Unsupported, message));
    }
    let direction = direction("direction", wire.direction)?;
    let result_dtype = dtype("result_dtype", wire.result_dtype)?;
    let geometry = convert("geometry", wire.geometry)?;
    let document = convert("document", wire.document)?;
    let (q, kv) = (convert("q", wire.q)?, convert("kv", wire.kv)?);
    let kv_heads = convert("kv_heads", wire.kv_heads)?;
    let mask = mask("slices", wire.slices)?;
    check_inside(&mask, q, kv, kv_heads)?;
    check_countable(q, kv, kv_heads)?;
    let task = Task::new(document, q, kv, kv_heads, &mask)?;
    task.check(&geometry)?;
    if wire.tensors.len() > MAX_TENSORS {
        let count = wire.tensors.len();
        return Err(TaskError::invalid(format!(
            "tensors names {count} tensors; a task reads at most {MAX_TENSORS}"
        )));
    }
    let tensor = |(n, tensor)| {
        TensorRef::try_from(tensor).map_err(|e: TaskError| e.context(format_args!("tensors[{n}]")))
    };
    let tensors = wire.tensors.into_iter().enumerate().map(tensor).collect::<Result<Vec<_>, _>>()?;
    let header = TaskHeader {
        job: wire.job,
        step: wire.step,
        plan_epoch: wire.plan_epoch,
        layer: wire.layer,
        direction,
        tick: wire.tick,
        attempt: wire.attempt,
        slot: wire.slot,
        group: wire.group,
        position: wire.position,
        numerics_id: (!wire.numerics_id.is_empty()).then_some(wire.numerics_id),
        geometry,
        task,
        result_dtype,
        deadline: (wire.deadline_ms > 0).then(|| Duration::from_millis(wire.deadline_ms.into())),
        key_homes: key_homes(wire.key_homes, kv)?,
        group_tasks: wire.group_tasks,
    };
    Ok(WireTask { id: wire.task, header, tensors })
}

/// Names the task by whatever of it can be trusted to print.
fn name_of(wire: &v1::TaskHeader) -> String {
    let job: String = wire.job.chars().take(64).collect();
    let v1::TaskHeader { task, step, layer, .. } = wire;
    let document = match wire.document {
        Some(v1::DocumentId { rank, index }) => format!("{rank}.{index}"),
        None => "not given".to_owned(),
    };
    format!("task {task} of job {job}, step {step}, layer {layer}, document {document}")
}

/// Refuses slices that reach outside the task's rectangle: the sender counts cells there that would be lost.
fn check_inside(mask: &Mask, q: Span, kv: Span, kv_heads: Span) -> Result<(), TaskError> {
    for (n, part) in mask.parts().iter().enumerate() {
        let sides = [
            ("slice.q", part.slice.q(), "task.q", q),
            ("slice.kv", part.slice.kv(), "task.kv", kv),
            ("slice.kv_heads", part.kv_heads, "task.kv_heads", kv_heads),
        ];
        for (field, span, bound_name, bound) in sides {
            if !bound.covers(span) {
                let error = InvalidAttention::OutsideSpan { field, span, bound_name, bound };
                return Err(TaskError::from(error).context(format_args!("slices[{n}]")));
            }
        }
    }
    Ok(())
}

/// Refuses a rectangle of more cells than 64 bits can count, whatever the slices leave of it.
fn check_countable(q: Span, kv: Span, kv_heads: Span) -> Result<(), TaskError> {
    let cells = q.len() as u128 * kv.len() as u128 * kv_heads.len() as u128;
    if cells <= i64::MAX as u128 {
        return Ok(());
    }
    let message = format!(
        "q {q} x kv {kv} x kv_heads {kv_heads} are {cells} cells, more than can be counted; cut the task"
    );
    Err(TaskError::invalid(message))
}

impl From<&WireTask> for v1::TaskHeader {
    fn from(wire: &WireTask) -> v1::TaskHeader {
        let WireTask { id, header, tensors } = wire;
        let task = &header.task;
        // A deadline that rounds to zero must not read as none.
        let millis = |d: Duration| u32::try_from(d.as_millis()).unwrap_or(u32::MAX).max(1);
        v1::TaskHeader {
            protocol_version: PROTOCOL_VERSION,
            task: *id,
            job: header.job.clone(),
            step: header.step,
            plan_epoch: header.plan_epoch,
            layer: header.layer,
            direction: v1::Direction::from(&header.direction) as i32,
            tick: header.tick,
            attempt: header.attempt,
            slot: header.slot,
            group: header.group,
            position: header.position,
            numerics_id: header.numerics_id.clone().unwrap_or_default(),
            document: Some((&task.document()).into()),
            q: Some((&task.q()).into()),
            kv: Some((&task.kv()).into()),
            kv_heads: Some((&task.kv_heads()).into()),
            slices: slices(task.mask()),
            geometry: Some((&header.geometry).into()),
            result_dtype: v1::DType::from(&header.result_dtype) as i32,
            sink: false,
            tensors: tensors.iter().map(v1::TensorRef::from).collect(),
            keep_lease_ms: 0,
            deadline_ms: header.deadline.map_or(0, millis),
            key_homes: header.key_homes.iter().map(Into::into).collect(),
            group_tasks: header.group_tasks,
        }
    }
}
