//! Receivers, dealt out to donors.

use super::Edge;
use super::random::Random;

/// Slots with what they can take, in cells, in ascending order of it.
#[derive(Debug, Default)]
pub(super) struct Pool(Vec<(usize, f64)>);

impl Pool {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Adds what a slot takes so far, and once its room besides.
    pub(super) fn add(&mut self, slot: usize, cells: f64, room: f64) {
        match self.0.iter_mut().find(|entry| entry.0 == slot) {
            Some(entry) => entry.1 += cells,
            None => self.0.push((slot, cells + room)),
        }
    }

    pub(super) fn slots(&self) -> impl Iterator<Item = usize> {
        self.0.iter().map(|entry| entry.0)
    }

    /// To be called when all are added. Slots that are full, or over by rounding, take nothing.
    pub(super) fn sort(&mut self) {
        self.0.retain(|entry| entry.1 > 0.0);
        self.0.sort_unstable_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
    }

    /// Takes slots for a need: the tightest one or two that cover it, else the largest; and `wild` times out of eight
    /// any. Room below `crumb` that is left over is forgotten. False when all do not suffice.
    pub(super) fn deal(
        &mut self,
        mut need: f64,
        crumb: f64,
        wild: usize,
        random: &mut Random,
        edges: &mut Vec<Edge>,
    ) -> bool {
        edges.clear();
        while need > 0.0 {
            if self.0.is_empty() {
                return need <= crumb * 1e-6;
            }
            let at = match random.below(8) < wild {
                true => random.below(self.0.len()),
                false => self.tightest(need),
            };
            let (slot, room) = self.0.remove(at);
            let cells = need.min(room);
            edges.push(Edge { slot, cells, sent: 0.0 });
            need -= cells;
            let left = room - cells;
            if left > 0.0 && left >= crumb {
                let at = self.0.partition_point(|entry| entry.1 < left);
                self.0.insert(at, (slot, left));
            }
        }
        edges.sort_unstable_by(|a, b| b.cells.total_cmp(&a.cells).then(a.slot.cmp(&b.slot)));
        true
    }

    /// The tightest slot that covers a need; else the larger one of the tightest two that do; else the largest.
    fn tightest(&self, need: f64) -> usize {
        let all = &self.0;
        let last = all.len().saturating_sub(1);
        let covers = all.partition_point(|entry| entry.1 < need);
        if covers <= last {
            return covers;
        }
        let (mut low, mut high) = (0, last);
        let (mut best, mut waste) = (last, f64::INFINITY);
        while low < high {
            let spare = all[low].1 + all[high].1 - need;
            if spare < 0.0 {
                low += 1;
            } else {
                if spare < waste {
                    (best, waste) = (high, spare);
                }
                high -= 1;
            }
        }
        best
    }
}
