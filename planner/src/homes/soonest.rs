//! A tick as makespan sees it: long documents in pieces, and how fast ranks are.

use std::collections::BTreeMap;

use super::bin::{Bin, Segment};
use super::field::{Draft, Field, Rank, Sorted};
use super::makespan::{Pace, Paces, Piece, Pieces, improve};
use crate::judge::price::Fare;
use crate::search::Random;
use crate::{Problem, Rates};

impl Field<'_> {
    /// Homes by which the slowest rank ends soonest, with so many exchanges for each rank. Documents are whole at first.
    pub(super) fn soonest(
        &self,
        problem: &Problem,
        rates: Rates,
        sorted: &Sorted,
        exchanges: usize,
    ) -> Draft {
        let [_, whole] = &sorted.packed;
        let mut documents: Pieces = vec![Vec::new(); self.free.len()];
        for (rank, bin) in whole.iter().enumerate() {
            for &Segment { document, lo, hi } in &bin.segments {
                documents[document].push(Piece { lo, hi, rank });
            }
        }
        for pieces in &mut documents {
            pieces.sort_unstable_by(|a, b| a.lo.total_cmp(&b.lo));
        }
        let exchanges = self.exchanges(sorted, exchanges);
        improve(&self.paces(problem, rates, sorted), &mut documents, exchanges, &mut Random::new(1));
        let mut bins: Vec<Bin> = sorted.empty.iter().map(|room| Bin::new(*room)).collect();
        for (document, pieces) in documents.iter().enumerate() {
            for &Piece { lo, hi, rank } in pieces {
                bins[rank].segments.push(Segment { document, lo, hi });
            }
        }
        self.finish(bins, sorted.short.clone())
    }

    fn paces(&self, problem: &Problem, rates: Rates, sorted: &Sorted) -> Paces {
        let geometry = &problem.geometry;
        let weights: f64 = problem.slots.iter().map(|slot| slot.weight).sum();
        let flops = [geometry.forward_flops(1), geometry.backward_flops(1)];
        let cell = flops.map(|flops| flops * self.kv_heads / (rates.flops_per_second * weights));
        let Fare { forward, backward } = Fare::of_key(geometry, true);
        let key =
            [forward.there, backward.back].map(|bytes| bytes as f64 * self.kv_heads / rates.bytes_per_second);
        let links: BTreeMap<u32, f64> =
            problem.slots.iter().filter_map(|slot| Some((slot.rank?, slot.link))).collect();
        let pace = |rank: &Rank| {
            let link = links.get(&rank.rank).copied().unwrap_or(1.0);
            Pace {
                cell: cell.map(|cell| cell / rank.weight),
                key: key.map(|key| key / link),
                cells: rank.cells,
                space: rank.space as f64,
                wanted: self.mean_tokens - rank.tokens as f64,
            }
        };
        Paces {
            ranks: self.ranks.iter().map(pace).collect(),
            density: sorted.terms.density,
            block: self.block as f64,
            tokens: self.mean_tokens,
        }
    }
}
