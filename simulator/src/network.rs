//! Links between GPUs.

use crate::SimulationError;
use crate::error::{in_range, positive};

/// How GPUs are connected: the same within every node, the same between all nodes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Network {
    /// GPUs of a node.
    pub gpus_per_node: u32,
    /// Each GPU's link to those of its node.
    pub within: Link,
    /// Each GPU's link to those of other nodes.
    pub between: Link,
}

/// One GPU's link, each way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Bytes a second each way, as the vendor states it.
    pub bytes_per_second: f64,
    /// What a transfer takes besides its bytes.
    pub latency_seconds: f64,
}

impl Default for Network {
    /// Nodes of 8 GPUs, 450 GB/s within (NVLink 4) and 50 GB/s between them (a 400 Gb/s adapter for each GPU).
    fn default() -> Network {
        Network {
            gpus_per_node: 8,
            within: Link { bytes_per_second: 450e9, latency_seconds: 5e-6 },
            between: Link { bytes_per_second: 50e9, latency_seconds: 15e-6 },
        }
    }
}

impl Network {
    /// Checks that every number makes sense.
    ///
    /// # Errors
    /// The first field that does not.
    pub fn check(&self) -> Result<(), SimulationError> {
        in_range("network.gpus_per_node", f64::from(self.gpus_per_node), 1.0, f64::from(1u32 << 16))?;
        for (name, link) in [("within", self.within), ("between", self.between)] {
            positive(&format!("network.{name}.bytes_per_second"), link.bytes_per_second)?;
            in_range(&format!("network.{name}.latency_seconds"), link.latency_seconds, 0.0, 1.0)?;
        }
        Ok(())
    }
}
