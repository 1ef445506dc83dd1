//! ByteScale's hybrid data parallelism (arXiv 2502.21231): each sequence gets a degree of its own.

use super::Planned;
use crate::SimulationError;
use crate::scenario::Sequences;
use crate::setting::Setting;

pub(super) fn plan(setting: &Setting<'_>, batch: &Sequences) -> Result<Planned, SimulationError> {
    let _ = (setting, batch);
    Err(SimulationError::Unsuited { policy: "hdp".to_owned(), what: "anything yet".to_owned() })
}
