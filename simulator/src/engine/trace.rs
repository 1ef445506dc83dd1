//! What devices did when, to be drawn.

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
    /// Stretches, each device's in the order of their starts.
    pub stretches: Vec<Traced>,
    devices: u32,
}

/// Most stretches that are kept.
const MOST: usize = 60_000;

impl Trace {
    /// Keeps what devices below this number do.
    pub(crate) fn of(devices: u32) -> Trace {
        Trace { stretches: Vec::new(), devices }
    }

    pub(crate) fn add(&mut self, stretch: Traced) {
        if stretch.device < self.devices && stretch.end > stretch.start && self.stretches.len() < MOST {
            self.stretches.push(stretch);
        }
    }
}
