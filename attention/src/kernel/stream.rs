//! Forward tasks whose keys arrive in parts.
//!
//! A row meets blocks of keys at fixed positions, in order. So a task may start with the blocks that are there and go on
//! with others later, and its bits are those of the whole.

use super::Isa;
use super::forward::{CarryLen, TILE_ROWS, tiles};
use super::simd::dispatch;
use super::visibility::BLOCK;
use super::work::HeadWork;
use crate::{Direction, HeadGeometry, Span, Task};

/// What has been computed of a forward task, between the stages in which its keys arrive. Made by
/// [`CpuKernel::start`](super::CpuKernel::start).
#[derive(Clone, Debug, PartialEq)]
pub struct ForwardState {
    isa: Isa,
    geometry: HeadGeometry,
    task: Task,
    /// Position of the first key still to come.
    pub(super) next: usize,
    /// Running state of all tiles.
    pub(super) carry: Vec<f32>,
    /// Filled by the last stage.
    pub(super) o: Vec<f32>,
    pub(super) lse: Vec<f32>,
}

impl ForwardState {
    /// The state of a task before its first stage.
    pub(super) fn new(isa: Isa, geometry: &HeadGeometry, task: &Task) -> Self {
        let shapes = task.shapes(geometry);
        let zeros = |shape: [usize; 3]| vec![0.0; shape.iter().product()];
        ForwardState {
            isa,
            geometry: *geometry,
            task: task.clone(),
            next: task.kv().start(),
            carry: vec![0.0; carry_len(isa, geometry, task)],
            o: zeros(shapes.o),
            lse: zeros(shapes.row),
        }
    }

    /// Position of the first key still to come.
    pub fn next_key(&self) -> usize {
        self.next
    }

    /// True when it was started for this task.
    pub(super) fn is_of(&self, isa: Isa, geometry: &HeadGeometry, task: &Task) -> bool {
        self.isa == isa && self.geometry == *geometry && self.task == *task
    }

    /// Checks that `keys` may come next; else where they should start.
    pub(super) fn check_keys(&self, keys: Span) -> Result<(), usize> {
        let task = &self.task;
        let ends_well = keys.end() == task.kv().end() || keys.end().is_multiple_of(BLOCK);
        if keys.start() == self.next && !keys.is_empty() && task.kv().covers(keys) && ends_well {
            Ok(())
        } else {
            Err(self.next)
        }
    }
}

/// Elements of the running state of all tiles of a task, head by head.
pub(super) fn carry_len(isa: Isa, geometry: &HeadGeometry, task: &Task) -> usize {
    task.kv_heads().len()
        * head_carry(isa, &HeadWork::new(*geometry, Direction::Forward, task, task.kv(), 0)).0
}

/// Elements of the running state of a head's tiles, and where each tile's starts.
pub(super) fn head_carry(isa: Isa, work: &HeadWork) -> (usize, Vec<usize>) {
    let mut starts = Vec::new();
    let mut len = 0;
    for rows in tiles(work.rows, TILE_ROWS) {
        starts.push(len);
        len += dispatch(isa, work.geometry.dtype(), CarryLen { work, rows });
    }
    (len, starts)
}
