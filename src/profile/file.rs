//! PROFILE.json: how it is written, and read for the planner.

use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::{Context, anyhow};
use outboard_planner as planner;
use serde::{Deserialize, Serialize};

use crate::bench::kernel::args::direction;
use crate::step::near;

/// How fast a device computes. A task takes `flops / (peak_flops_per_second * efficiency) + task_overhead_seconds`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Profile {
    pub(super) device: String,
    pub(super) kernel_revision: String,
    /// Of a CPU that of all threads, by the element type that has the highest; of a GPU what the fastest size reached.
    /// Efficiencies of all are fractions of it.
    pub(super) peak_flops_per_second: f64,
    pub(super) grids: Vec<Grid>,
    /// Of the device: what each of many tasks of one cell costs, in the cheaper direction.
    pub(super) task_overhead_seconds: f64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Grid {
    pub(super) direction: String,
    pub(super) dtype: String,
    pub(super) head_dim: usize,
    pub(super) rows: Vec<usize>,
    pub(super) keys: Vec<usize>,
    /// For each number of rows, one for each of keys.
    pub(super) efficiency: Vec<Vec<f64>>,
}

/// Writes a profile; `-` is standard output.
pub(super) fn write(out: &Path, profile: &Profile) -> anyhow::Result<()> {
    let mut json = serde_json::to_vec(profile).context("cannot encode the profile")?;
    json.push(b'\n');
    if out != Path::new("-") {
        return std::fs::write(out, json).with_context(|| format!("cannot write {}", out.display()));
    }
    match std::io::stdout().write_all(&json) {
        // Whoever read the profile has seen enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome.context("cannot write the profile to standard output"),
    }
}

/// Reads a profile for the planner. Errors name the file, and the field at fault.
pub(crate) fn read(path: &Path) -> anyhow::Result<planner::Profile> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let file: Profile = serde_json::from_slice(&text).map_err(|error| {
        let before = near(&text, error.line(), error.column());
        anyhow!("{} is not a valid profile: {error}{before}", path.display())
    })?;
    planned(file).with_context(|| path.display().to_string())
}

/// The profile as the planner takes it.
fn planned(file: Profile) -> anyhow::Result<planner::Profile> {
    let grid = |(n, grid): (usize, Grid)| {
        let Grid { head_dim, rows, keys, efficiency, .. } = grid;
        let field = |name: &str| format!("profile.grids[{n}].{name}");
        let direction =
            direction(&grid.direction).map_err(|error| anyhow!("{}: {error}", field("direction")))?;
        let dtype = grid.dtype.parse().with_context(|| field("dtype"))?;
        anyhow::Ok(planner::Grid { direction, dtype, head_dim, rows, keys, efficiency })
    };
    let grids = file.grids.into_iter().enumerate().map(grid).collect::<anyhow::Result<_>>()?;
    Ok(planner::Profile::new(file.peak_flops_per_second, file.task_overhead_seconds, grids)?)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read_value(value: &Value) -> anyhow::Result<planner::Profile> {
        planned(serde_json::from_value(value.clone())?)
    }

    fn sound() -> Value {
        let grid = |direction: &str| {
            json!({ "direction": direction, "dtype": "bf16", "head_dim": 64, "rows": [16, 64], "keys": [16],
                "efficiency": [[0.5], [1.0]] })
        };
        json!({ "device": "some", "kernel_revision": "1", "peak_flops_per_second": 1e12,
            "grids": [grid("forward"), grid("backward")], "task_overhead_seconds": 0 })
    }

    #[test]
    fn what_is_read_is_what_is_written() {
        let profile = read_value(&sound()).unwrap();
        let file: Profile = serde_json::from_value(sound()).unwrap();
        assert_eq!(read_value(&serde_json::to_value(&file).unwrap()).unwrap(), profile);
        assert_eq!(profile.peak_flops_per_second(), 1e12);
    }

    #[test]
    fn errors_name_the_field() {
        let cases = [
            ("/peak_flops_per_second", json!(0), "profile.peak_flops_per_second is 0"),
            ("/grids/1/direction", json!("up"), "profile.grids[1].direction: "),
            ("/grids/1/dtype", json!("f8"), "profile.grids[1].dtype: \"f8\""),
            ("/grids/0/rows", json!([16, 16]), "profile.grids[0].rows[1] is 16"),
            ("/grids/0/efficiency/1/0", json!(1.5), "profile.grids[0].efficiency[1][0] is 1.5"),
            ("/grids", json!([]), "profile.grids has none of direction forward"),
            ("/grids/0/keys", json!([-1]), "-1"),
        ];
        for (field, value, says) in cases {
            let mut profile = sound();
            *profile.pointer_mut(field).unwrap() = value;
            let error = format!("{:#}", read_value(&profile).unwrap_err());
            assert!(error.contains(says), "{field}: {error}");
        }
        let mut profile = sound();
        profile["grids"][0]["dtpye"] = json!("f32");
        assert!(read_value(&profile).unwrap_err().to_string().contains("dtpye"));
    }
}
