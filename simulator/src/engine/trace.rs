//! What devices did when, to be drawn.

use crate::Layout;

/// What a device does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// Everything but core attention, forward.
    Dense,
    /// The same, backward.
    DenseBackward,
    /// Core attention, forward.
    Attention,
    /// Core attention, backward.
    AttentionBackward,
    /// Sends and receives for attention.
    Transfer,
    /// Reduces gradients, and updates weights.
    Update,
}

/// One stretch of a device's time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Traced {
    /// The device.
    pub device: u32,
    /// Nano-batch, 0 or 1.
    pub nano: u8,
    /// What it does.
    pub doing: Doing,
    /// Seconds from the start of the step.
    pub start: f64,
    /// The same.
    pub end: f64,
}

/// What some devices did in a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// The devices, in ascending order.
    pub devices: Vec<u32>,
    /// Stretches, each device's in the order of their starts.
    pub stretches: Vec<Traced>,
}

/// Most stretches that are kept.
const MOST: usize = 60_000;
/// Devices of the model whose doings are kept.
const KEPT: u32 = 4;
/// The same where there are dedicated servers, and how many of those.
const KEPT_BESIDE: u32 = 3;
const SERVERS: u32 = 2;

impl Trace {
    /// Keeps what a few devices of each kind do: of stages from the first to the last, of the first ranks of each, and of
    /// the first dedicated servers.
    pub(crate) fn of(layout: &Layout) -> Trace {
        let (ranks, pipeline, model) = (layout.ranks(), layout.pipeline.max(1), layout.model_devices());
        let servers = model..layout.devices().min(model + SERVERS);
        let most = if servers.is_empty() { KEPT } else { KEPT_BESIDE };
        let stages = pipeline.min(most);
        let mut devices = Vec::new();
        for n in 0..stages {
            let stage = if n == 0 { 0 } else { n * (pipeline - 1) / (stages - 1) };
            devices.extend((0..ranks.min(most / stages)).map(|rank| stage * ranks + rank));
        }
        devices.extend(servers);
        Trace { devices, stretches: Vec::new() }
    }

    pub(crate) fn add(&mut self, stretch: Traced) {
        let kept = stretch.end > stretch.start && self.stretches.len() < MOST;
        if kept && self.devices.contains(&stretch.device) {
            self.stretches.push(stretch);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_of_every_kind_are_kept() {
        let kept = |gpus: u32, pipeline: u32, dedicated: u32| {
            Trace::of(&Layout { pipeline, dedicated, ..Layout::new(gpus, 1) }).devices
        };
        assert_eq!(kept(2, 1, 0), [0, 1]);
        assert_eq!(kept(64, 1, 0), [0, 1, 2, 3]);
        assert_eq!(kept(64, 2, 0), [0, 1, 32, 33]);
        assert_eq!(kept(2, 2, 0), [0, 1], "a rank of two stages");
        assert_eq!(kept(64, 4, 0), [0, 16, 32, 48]);
        assert_eq!(kept(64, 8, 0), [0, 16, 32, 56], "stages 0, 2, 4 and 7");
        assert_eq!(kept(64, 1, 32), [0, 1, 2, 32, 33]);
        assert_eq!(kept(48, 2, 16), [0, 16, 32, 33]);
        assert_eq!(kept(81, 8, 1), [0, 30, 70, 80], "stages 0, 3 and 7");
    }
}
