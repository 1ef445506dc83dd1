//! What a token costs on the way to a slot and back, in bytes of one kv head.

use outboard_attention::HeadGeometry;

/// Bytes by direction of travel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Price {
    /// To the slot.
    pub(crate) there: u64,
    /// From the slot.
    pub(crate) back: u64,
}

/// What a token costs in both passes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fare {
    pub(crate) forward: Price,
    pub(crate) backward: Price,
}

impl Fare {
    /// A query row: Q out, O and LSE back; dO, LSE and D out, dQ back. `partial`: results travel in f32, since other
    /// slots compute parts of them too.
    pub(crate) fn of_row(geometry: &HeadGeometry, partial: bool) -> Fare {
        let Sizes { group, head, v_head, element, result } = Sizes::new(geometry, partial);
        Fare {
            forward: Price { there: group * head * element, back: group * (v_head * result + 4) },
            backward: Price { there: group * (v_head * element + 8), back: group * head * result },
        }
    }

    /// A key: K and V out; dK and dV back. The slot still has K and V in the backward pass.
    pub(crate) fn of_key(geometry: &HeadGeometry, partial: bool) -> Fare {
        let Sizes { head, v_head, element, result, .. } = Sizes::new(geometry, partial);
        Fare {
            forward: Price { there: (head + v_head) * element, back: 0 },
            backward: Price { there: 0, back: (head + v_head) * result },
        }
    }
}

/// Heads of a group, elements of a head, bytes of an element as it goes out and comes back.
struct Sizes {
    group: u64,
    head: u64,
    v_head: u64,
    element: u64,
    result: u64,
}

impl Sizes {
    fn new(geometry: &HeadGeometry, partial: bool) -> Sizes {
        let element = geometry.dtype().bytes() as u64;
        Sizes {
            group: geometry.group() as u64,
            head: geometry.head_dim() as u64,
            v_head: geometry.v_head_dim() as u64,
            element,
            result: if partial { 4 } else { element },
        }
    }
}
