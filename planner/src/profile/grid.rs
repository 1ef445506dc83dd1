//! Efficiencies measured at some sizes of tasks, and what lies between them.

use outboard_attention::{DType, Direction};

use super::log2::log2;
use crate::PlanError;

/// How much of its peak a device reaches in one direction, of one element type and head dim.
#[derive(Clone, Debug, PartialEq)]
pub struct Grid {
    /// Forward or backward.
    pub direction: Direction,
    /// Element type of Q, K, V and dO.
    pub dtype: DType,
    /// Elements of a head, above zero.
    pub head_dim: usize,
    /// Rows of a task, queries times query heads a kv head: above zero, ascending.
    pub rows: Vec<usize>,
    /// Keys of a task: above zero, ascending.
    pub keys: Vec<usize>,
    /// For each number of rows one for each of keys: useful FLOPs a second over the peak, above 0 and at most 1.
    pub efficiency: Vec<Vec<f64>>,
}

impl Grid {
    /// Checks that there is an efficiency for each size; an error names this grid by its index `n`.
    pub(super) fn check(&self, n: usize) -> Result<(), PlanError> {
        let bad = |field: String, what: String| {
            Err(PlanError::BadProfile { field: format!("grids[{n}].{field}"), what })
        };
        if self.head_dim == 0 {
            return bad("head_dim".to_owned(), "is 0; it must be above zero".to_owned());
        }
        for (name, axis) in [("rows", &self.rows), ("keys", &self.keys)] {
            match axis.first() {
                None => return bad(name.to_owned(), "is empty; a grid needs at least one".to_owned()),
                Some(0) => return bad(format!("{name}[0]"), "is 0; it must be above zero".to_owned()),
                Some(_) => {}
            }
            if let Some(at) = axis.windows(2).position(|pair| pair[0] >= pair[1]) {
                let what = format!("is {}; it must be above {name}[{at}], {}", axis[at + 1], axis[at]);
                return bad(format!("{name}[{}]", at + 1), what);
            }
        }
        let Grid { rows, keys, efficiency, .. } = self;
        if efficiency.len() != rows.len() {
            let what =
                format!("has {} entries and rows {}; it must have as many", efficiency.len(), rows.len());
            return bad("efficiency".to_owned(), what);
        }
        for (row, values) in efficiency.iter().enumerate() {
            if values.len() != keys.len() {
                let what =
                    format!("has {} entries and keys {}; it must have as many", values.len(), keys.len());
                return bad(format!("efficiency[{row}]"), what);
            }
            if let Some(at) = values.iter().position(|value| !(*value > 0.0 && *value <= 1.0)) {
                let what = format!("is {}; it must be above 0 and at most 1", values[at]);
                return bad(format!("efficiency[{row}][{at}]"), what);
            }
        }
        Ok(())
    }

    /// The efficiency of tasks of one size: bilinear in the logarithms of rows and keys, constant outside the grid.
    pub(super) fn at(&self, rows: usize, keys: usize) -> f64 {
        let (row, down) = place(&self.rows, rows);
        let (key, along) = place(&self.keys, keys);
        let value = |row: usize, key: usize| {
            // Beyond the last row or key nothing of the next is asked for.
            self.efficiency.get(row).and_then(|values| values.get(key)).copied().unwrap_or(1.0)
        };
        let between = |row: usize| mix(value(row, key), || value(row, key + 1), along);
        mix(between(row), || between(row + 1), down)
    }

    /// The highest efficiency of any size.
    pub(super) fn highest(&self) -> f64 {
        self.efficiency.iter().flatten().copied().fold(0.0, f64::max)
    }
}

/// The last entry of an ascending axis that is no larger than `n`, or else the first, and how much of the way to the
/// next one `n` has gone, by logarithms.
fn place(axis: &[usize], n: usize) -> (usize, f64) {
    let after = axis.partition_point(|&entry| entry <= n);
    let at = after.saturating_sub(1);
    match axis.get(at..=after) {
        Some(&[low, high]) => (at, (log2(n) - log2(low)) / (log2(high) - log2(low))),
        _ => (at, 0.0),
    }
}

/// `way` of the way from `a` to `b`, which is not asked for where there is none to go.
fn mix(a: f64, b: impl FnOnce() -> f64, way: f64) -> f64 {
    if way > 0.0 { a + (b() - a) * way } else { a }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid() -> Grid {
        Grid {
            direction: Direction::Forward,
            dtype: DType::F32,
            head_dim: 64,
            rows: vec![16, 64],
            keys: vec![10, 1000],
            efficiency: vec![vec![0.1, 0.2], vec![0.5, 0.9]],
        }
    }

    #[test]
    fn efficiencies_are_met_on_the_grid_and_mixed_between() {
        let grid = grid();
        let near = |rows, keys, expected: f64| {
            let found = grid.at(rows, keys);
            assert!((found - expected).abs() < 1e-12, "{rows} rows, {keys} keys: {found}, not {expected}");
        };
        near(16, 10, 0.1);
        near(16, 1000, 0.2);
        near(64, 10, 0.5);
        near(64, 1000, 0.9);
        // Half of the way by logarithms along one side, the other, and both.
        near(32, 10, 0.3);
        near(64, 100, 0.7);
        near(32, 100, 0.425);
    }

    #[test]
    fn outside_the_grid_the_nearest_size_holds() {
        let grid = grid();
        for (rows, keys, inside) in
            [(0, 0, 0.1), (1, 1, 0.1), (15, 5000, 0.2), (65, 9, 0.5), (1 << 40, 1 << 40, 0.9)]
        {
            assert_eq!(grid.at(rows, keys), inside, "{rows} rows, {keys} keys");
        }
        assert_eq!(grid.at(1, 100), grid.at(16, 100));
        assert_eq!(grid.at(32, 100_000), grid.at(32, 1000));
    }

    #[test]
    fn one_size_holds_for_all() {
        let grid = Grid { rows: vec![8], keys: vec![8], efficiency: vec![vec![0.25]], ..grid() };
        assert!([(1, 1), (8, 8), (100, 1), (1, 100)].iter().all(|&(rows, keys)| grid.at(rows, keys) == 0.25));
    }

    #[test]
    fn what_is_wrong_with_a_grid_is_named() {
        let refused = |grid: Grid, says: &str| {
            assert_eq!(grid.check(3).expect_err("a bad grid").to_string(), says);
        };
        grid().check(3).expect("a sound grid");
        refused(Grid { head_dim: 0, ..grid() }, "profile.grids[3].head_dim is 0; it must be above zero");
        refused(Grid { rows: vec![], ..grid() }, "profile.grids[3].rows is empty; a grid needs at least one");
        refused(Grid { keys: vec![0, 1], ..grid() }, "profile.grids[3].keys[0] is 0; it must be above zero");
        let says = "profile.grids[3].rows[1] is 16; it must be above rows[0], 16";
        refused(Grid { rows: vec![16, 16], ..grid() }, says);
        let says = "profile.grids[3].efficiency has 2 entries and rows 1; it must have as many";
        refused(Grid { rows: vec![16], ..grid() }, says);
        let says = "profile.grids[3].efficiency[1] has 1 entries and keys 2; it must have as many";
        refused(Grid { efficiency: vec![vec![0.1, 0.2], vec![0.5]], ..grid() }, says);
        for bad in [0.0, -0.5, 1.5, f64::NAN, f64::INFINITY] {
            let says =
                format!("profile.grids[3].efficiency[1][0] is {bad}; it must be above 0 and at most 1");
            refused(Grid { efficiency: vec![vec![0.1, 0.2], vec![bad, 0.9]], ..grid() }, &says);
        }
    }
}
