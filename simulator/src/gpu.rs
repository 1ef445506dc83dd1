//! GPUs: what they compute, hold and read in a second.

use outboard_planner::Profile;

use crate::SimulationError;

/// A device.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpu {
    /// What it is called in results.
    pub name: String,
    /// Dense matrix FLOPs a second at best, as the vendor states it; model FLOPs utilisation is a fraction of it.
    pub peak_flops_per_second: f64,
    /// Bytes that its memory has for tensors: those of [`crate::Memory`] must fit.
    pub memory_bytes: f64,
    /// Bytes a second of that memory.
    pub memory_bytes_per_second: f64,
    /// How fast it computes core attention by shapes of tasks.
    pub profile: Profile,
}

impl Gpu {
    /// Names that [`Gpu::built_in`] knows.
    pub const BUILT_IN: [&str; 3] = ["h100", "h200", "b200"];

    /// A GPU by one of the names [`Gpu::BUILT_IN`]: dense bf16 FLOPs, memory and its bandwidth as NVIDIA states them of
    /// the SXM cards. `h200` computes attention as it was measured, `h100` too (it is the same chip). No B200 was
    /// measured: `b200` has the efficiencies of the H200 at a peak larger by the ratio of the stated ones.
    ///
    /// Drivers report 7% more memory: 81,559, 143,771 and 183,359 MiB. That is left to what [`crate::Memory`] does not count;
    /// with all of it five runs of DistCA's authors would be predicted to fit that did not.
    pub fn built_in(name: &str) -> Option<Gpu> {
        let (peak, memory, bandwidth) = match name {
            "h100" => (989e12, 80e9, 3.35e12),
            "h200" => (989e12, 141e9, 4.8e12),
            "b200" => (2250e12, 180e9, 8.0e12),
            _ => return None,
        };
        let profile = Profile::built_in("h200")?.faster(peak / 989e12)?;
        Some(Gpu {
            name: name.to_owned(),
            peak_flops_per_second: peak,
            memory_bytes: memory,
            memory_bytes_per_second: bandwidth,
            profile,
        })
    }

    /// Checks that every number makes sense.
    ///
    /// # Errors
    /// The first field that does not.
    pub fn check(&self) -> Result<(), SimulationError> {
        let fields = [
            ("gpu.peak_flops_per_second", self.peak_flops_per_second),
            ("gpu.memory_bytes", self.memory_bytes),
            ("gpu.memory_bytes_per_second", self.memory_bytes_per_second),
        ];
        fields.into_iter().try_for_each(|(field, value)| crate::error::positive(field, value))
    }
}
