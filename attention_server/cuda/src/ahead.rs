//! Plans for a device that need not be here.

use std::path::{Path, PathBuf};

use outboard_attention::{Direction, HeadGeometry};

use crate::CudaError;
use crate::batch::{Cut, Shape, call_geometry};
use crate::cudnn::Cudnn;
use crate::gpu::movers;
use crate::graph::{Bounds, CallGeometry, GraphKey};
use crate::kernel::CudaKernel;
use crate::plan::{PlanConfig, Plans, Target, describe, device_kind};

/// What [`plan_ahead`] made for one direction and shape of mask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AheadPlan {
    /// The direction.
    pub direction: Direction,
    /// "full", "triangle" or "causal".
    pub shape: &'static str,
    /// Whether it is for tensors in place, or for heads one after the other.
    pub in_place: bool,
    /// cuDNN's number of the engine.
    pub engine: i64,
    /// Its knobs: type and value.
    pub knobs: Vec<(i32, i64)>,
    /// Whether it sums in a fixed order.
    pub deterministic: bool,
    /// Bytes of device memory that a call needs besides its tensors.
    pub workspace: usize,
}

/// Builds the plans of one geometry for any kind of device, and stores them in `folder` for servers that have such a
/// device: then its first batches of about 1k to 4k rows need not wait for a compiler. Needs cuDNN and NVRTC in `libraries`, but no GPU.
///
/// `properties` describes the device as cuDNN does, in JSON. Bounds are those of small batches of up to 4096 rows. Plans are
/// restored here from what was stored; whether a device takes plans that were built elsewhere was not tried.
///
/// # Errors
/// [`CudaError`] when a library is missing, the properties are not JSON of that form, or cuDNN has no kernel.
pub fn plan_ahead(
    libraries: &[PathBuf],
    properties: &str,
    folder: Option<&Path>,
    geometry: &HeadGeometry,
    deterministic: bool,
) -> Result<Vec<AheadPlan>, CudaError> {
    CudaKernel::supports(geometry)?;
    let cudnn = Cudnn::load(libraries)?;
    let (device, compute) = device_kind(properties);
    movers::compile(geometry.dtype(), compute)?;
    let config = PlanConfig { device, compute, folder: folder.map(Path::to_owned), deterministic };
    let plans = Plans::new(&cudnn, config);
    let described = describe(&cudnn, properties)?;
    let target = Target::Described(&described);
    let (geometry, kv_heads) = (call_geometry(geometry), geometry.kv_heads());
    let mut made = Vec::new();
    for direction in [Direction::Forward, Direction::Backward] {
        let cut = Cut { direction, ordered: plans.is_deterministic(), in_place: true };
        for &shape in cut.shapes() {
            for heads in [1, kv_heads] {
                let bounds = Bounds { sequences: 16, rows: 4096, keys: 4096 };
                let geometry = CallGeometry { heads, ..geometry };
                let (plan, _) = plans.get(GraphKey { direction, shape, geometry, bounds }, target)?;
                let engine = plans.engine(direction, shape, geometry, target)?;
                made.push(AheadPlan {
                    direction,
                    shape: match shape {
                        Shape::Full => "full",
                        Shape::Triangle => "triangle",
                        Shape::Causal => "causal",
                    },
                    in_place: heads > 1,
                    engine: engine.index,
                    knobs: engine.knobs,
                    deterministic: engine.deterministic,
                    workspace: plan.workspace,
                });
            }
        }
    }
    Ok(made)
}
