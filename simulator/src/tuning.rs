//! What is not known beforehand of a cluster and is measured, or fitted to published figures.

use crate::SimulationError;
use crate::error::in_range;

/// The parameters of the simulator that stand for efficiencies and overheads. They are printed with every result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tuning {
    /// What matrix products outside of core attention reach, as a fraction of the GPU's peak.
    pub matmul_efficiency: f64,
    /// What core attention reaches of its profile.
    pub attention_efficiency: f64,
    /// What tasks and collectives reach of a link's bytes a second.
    pub link_efficiency: f64,
    /// What an all-gather among ranks that share a sequence reaches of a link's bytes a second.
    pub gather_efficiency: f64,
    /// Seconds that a device is kept from computing for each nano-batch, layer and direction whose tasks it sends and
    /// receives: laying tensors out, launching transfers.
    pub dispatch_seconds: f64,
}

impl Default for Tuning {
    /// Fitted to the published gains of DistCA for the 8B model, as `validation/` has them; but for what a link reaches, which
    /// is what DistCA's authors measured of an all-gather between nodes, 38 of 50 GB/s.
    fn default() -> Tuning {
        Tuning {
            matmul_efficiency: 0.55,
            attention_efficiency: 0.6,
            link_efficiency: 0.76,
            gather_efficiency: 0.5,
            dispatch_seconds: 50e-6,
        }
    }
}

impl Tuning {
    /// Every parameter with its name and unit.
    pub fn entries(&self) -> [(&'static str, f64, &'static str); 5] {
        [
            ("matmul_efficiency", self.matmul_efficiency, "of the peak"),
            ("attention_efficiency", self.attention_efficiency, "of the profile"),
            ("link_efficiency", self.link_efficiency, "of the link"),
            ("gather_efficiency", self.gather_efficiency, "of the link"),
            ("dispatch_seconds", self.dispatch_seconds, "s a nano-batch, layer and direction"),
        ]
    }

    /// Sets the parameter of a name.
    ///
    /// # Errors
    /// A name that [`Tuning::entries`] does not have.
    pub fn set(&mut self, name: &str, value: f64) -> Result<(), SimulationError> {
        let field = match name {
            "matmul_efficiency" => &mut self.matmul_efficiency,
            "attention_efficiency" => &mut self.attention_efficiency,
            "link_efficiency" => &mut self.link_efficiency,
            "gather_efficiency" => &mut self.gather_efficiency,
            "dispatch_seconds" => &mut self.dispatch_seconds,
            _ => {
                let known = self.entries().map(|(name, _, _)| name);
                return Err(SimulationError::unknown("tuning parameter", name, &known));
            }
        };
        *field = value;
        Ok(())
    }

    /// Checks that every number makes sense.
    ///
    /// # Errors
    /// The first that does not.
    pub fn check(&self) -> Result<(), SimulationError> {
        for (name, value, _) in self.entries() {
            let (least, most) = if name == "dispatch_seconds" { (0.0, 1.0) } else { (1e-3, 2.0) };
            in_range(&format!("tuning.{name}"), value, least, most)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_can_be_set() {
        let mut tuning = Tuning::default();
        for (n, (name, _, _)) in tuning.entries().into_iter().enumerate() {
            tuning.set(name, n as f64).unwrap();
        }
        for (n, (name, value, _)) in tuning.entries().into_iter().enumerate() {
            assert_eq!(value, n as f64, "{name}");
        }
        let error = tuning.set("matmul_eficiency", 1.0).unwrap_err();
        assert!(error.to_string().ends_with("did you mean `matmul_efficiency`?"), "{error}");
    }
}
