//! The cost model: how long a device takes for a task of a given shape.
//!
//! A device is known by its peak and by how much of it tasks of each size reach. What a task takes is predicted as
//! `FLOPs / (peak * efficiency(rows, keys)) + overhead`. FLOPs are of cells that count; those of a diagonal's tiles that
//! do not are no part of them, and no grid knows of them.

mod built_in;
mod grid;
mod log2;
mod times;

use outboard_attention::{DType, Direction, HeadGeometry};

use crate::PlanError;

pub use grid::Grid;
pub(crate) use log2::log2;
pub use times::Times;
pub(crate) use times::{cells_a_second, predicted};

/// How fast a device of speed 1 computes tasks. Always sound: see [`Profile::new`].
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    peak_flops_per_second: f64,
    task_overhead_seconds: f64,
    grids: Vec<Grid>,
}

/// What a task's time depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskShape {
    /// Queries, times the query heads that share a kv head.
    pub rows: usize,
    /// Keys.
    pub keys: usize,
    /// Cells, each counted once per kv head.
    pub cells: u64,
}

impl Profile {
    /// The names that [`Profile::built_in`] knows.
    pub const BUILT_IN: [&str; 3] = ["cpu", "h100", "h200"];

    /// A profile of its peak, what each task costs besides its cells, and grids: at least one of either direction, none
    /// of them twice.
    ///
    /// # Errors
    /// [`PlanError::BadProfile`] for the first number that makes no sense.
    pub fn new(
        peak_flops_per_second: f64,
        task_overhead_seconds: f64,
        grids: Vec<Grid>,
    ) -> Result<Profile, PlanError> {
        let bad = |field: String, what: String| Err(PlanError::BadProfile { field, what });
        if !(peak_flops_per_second.is_finite() && peak_flops_per_second > 0.0) {
            let what = format!("is {peak_flops_per_second}; it must be finite and above zero");
            return bad("peak_flops_per_second".to_owned(), what);
        }
        if !(task_overhead_seconds.is_finite() && task_overhead_seconds >= 0.0) {
            let what = format!("is {task_overhead_seconds}; it must be finite and not below zero");
            return bad("task_overhead_seconds".to_owned(), what);
        }
        for (n, grid) in grids.iter().enumerate() {
            grid.check(n)?;
            let key = |grid: &Grid| (grid.direction, grid.dtype, grid.head_dim);
            if let Some(first) = grids[..n].iter().position(|other| key(other) == key(grid)) {
                let (direction, dtype, head_dim) = key(grid);
                let what =
                    format!("is {direction} {dtype} head dim {head_dim}, as grids[{first}] is; one will do");
                return bad(format!("grids[{n}]"), what);
            }
        }
        for direction in [Direction::Forward, Direction::Backward] {
            if grids.iter().all(|grid| grid.direction != direction) {
                let what = format!("has none of direction {direction}; it must have one");
                return bad("grids".to_owned(), what);
            }
        }
        Ok(Profile { peak_flops_per_second, task_overhead_seconds, grids })
    }

    /// A profile that comes with the planner, by one of the names [`Profile::BUILT_IN`].
    pub fn built_in(name: &str) -> Option<Profile> {
        built_in::profile(name)
    }

    /// The same efficiencies of a peak that is `factor` times as high. `None` for a factor that makes no sense.
    pub fn faster(self, factor: f64) -> Option<Profile> {
        let peak = self.peak_flops_per_second * factor;
        Profile::new(peak, self.task_overhead_seconds, self.grids).ok()
    }

    /// Whether there are grids of that element type, or of one that stands in for it (f16 and bf16 for each other), in both
    /// directions.
    pub fn is_of(&self, dtype: DType) -> bool {
        let of = |direction| {
            self.grids.iter().any(|grid| grid.direction == direction && grid.dtype.bytes() == dtype.bytes())
        };
        of(Direction::Forward) && of(Direction::Backward)
    }

    /// The FLOPs a second that efficiencies are fractions of.
    pub fn peak_flops_per_second(&self) -> f64 {
        self.peak_flops_per_second
    }

    /// Predicted seconds of one task on a device of speed 1.
    ///
    /// Where no grid is of the geometry's element type, one of equal size stands in for it (f16 and bf16 for each
    /// other), else the one nearest in size; then the grid with the nearest head dim of Q and K, by ratio, and of
    /// two as near the smaller.
    pub fn seconds(&self, geometry: &HeadGeometry, direction: Direction, shape: TaskShape) -> f64 {
        let efficiency = self.grid(geometry, direction).map_or(1.0, |grid| grid.at(shape.rows, shape.keys));
        flops(geometry, direction, shape.cells) / (self.peak_flops_per_second * efficiency)
            + self.task_overhead_seconds
    }

    /// FLOPs a second that no task exceeds.
    pub(crate) fn highest_flops_per_second(&self, geometry: &HeadGeometry, direction: Direction) -> f64 {
        self.peak_flops_per_second * self.grid(geometry, direction).map_or(1.0, Grid::highest)
    }

    fn grid(&self, geometry: &HeadGeometry, direction: Direction) -> Option<&Grid> {
        let (dtype, head_dim) = (geometry.dtype(), geometry.head_dim());
        let of_type = |other: DType| (other != dtype, other.bytes().abs_diff(dtype.bytes()), other);
        let ratio = |other: usize| {
            let (a, b) = (other as f64, head_dim as f64);
            if a < b { b / a } else { a / b }
        };
        let grids = self.grids.iter().filter(|grid| grid.direction == direction);
        grids.min_by(|a, b| {
            let by_type = of_type(a.dtype).cmp(&of_type(b.dtype));
            by_type.then(ratio(a.head_dim).total_cmp(&ratio(b.head_dim))).then(a.head_dim.cmp(&b.head_dim))
        })
    }
}

/// FLOPs of cells, each counted once per kv head.
pub(crate) fn flops(geometry: &HeadGeometry, direction: Direction, cells: u64) -> f64 {
    match direction {
        Direction::Forward => geometry.forward_flops(cells),
        Direction::Backward => geometry.backward_flops(cells),
    }
}
