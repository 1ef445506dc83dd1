//! DistCA's planner: query cuts only, greedy by bytes per FLOP.
//!
//! What it does was read from its code (`distca/planner/planner.py`, hao-ai-lab/DistCA). Ours goes beyond it where that
//! stops with an assertion or has no notion: odd lengths (a cut takes the most rows that hold no more than it may),
//! masks (a row has the keys that it sees; the work of a pair of rows is the document's mean), weights (a slot's share
//! in place of the mean), and ranks without a slot (their documents start where no balancing would put them).

use std::collections::{BTreeMap, VecDeque};

use outboard_attention::{HeadGeometry, Span};

use super::fixed;
use crate::Slot;
use crate::sheet::{Sheet, Strip};

/// What moves as one: rows near the head of a document and rows near its tail, of which the inner edges are cut. One of
/// them alone is a head and a tail that were not parted yet.
#[derive(Clone, Copy, Debug)]
struct Item {
    sheet: usize,
    /// Who computes it.
    slot: usize,
    head: Span,
    tail: Span,
    /// Cells of all its kv heads.
    cells: u64,
}

/// What DistCA thinks that moving a sheet costs, in elements.
#[derive(Clone, Copy, Debug)]
struct Price {
    /// Of a query row.
    row: f64,
    /// Of all keys. They count whole, wherever they are and however few a row sees.
    keys: f64,
    /// Cells of a pair of rows, one from the head and one from the tail. Of the pair one row is paid for.
    pair: f64,
}

/// Every slot's strips after the greedy has run; `None` where it would have to price more than `most` items.
pub(crate) fn place(
    sheets: &[Sheet<'_>],
    slots: &[Slot],
    geometry: &HeadGeometry,
    tolerance: f64,
    most: u64,
) -> Option<Vec<Vec<Strip>>> {
    let mut priced = 0u64;
    let mut items = items(sheets, &fixed::place(sheets, slots));
    let prices: Vec<Price> = sheets.iter().map(|sheet| Price::of(sheet, geometry)).collect();
    let weights: f64 = slots.iter().map(|slot| slot.weight).sum();
    let total = items.iter().map(|item| item.cells).sum::<u64>() as f64;
    let share: Vec<f64> = slots.iter().map(|slot| total * slot.weight / weights).collect();
    let mut cells = vec![0u64; slots.len()];
    for item in &items {
        cells[item.slot] += item.cells;
    }
    // How far each slot lies above its share; below zero where it lies beneath.
    let mut surplus: Vec<f64> =
        cells.iter().zip(&share).map(|(&cells, share)| cells as f64 - share).collect();
    let mut receivers: Vec<usize> = (0..slots.len()).filter(|&slot| surplus[slot] < 0.0).collect();
    receivers.sort_by(|&a, &b| surplus[a].total_cmp(&surplus[b]));
    for receiver in receivers {
        while -surplus[receiver] > tolerance * share[receiver] {
            priced = priced.saturating_add(items.len() as u64);
            if priced > most {
                return None;
            }
            let Some((n, most)) = cheapest(&items, &prices, &surplus, -surplus[receiver]) else { break };
            let giver = items[n].slot;
            let moved = if items[n].cells as f64 <= most {
                items[n].slot = receiver;
                items[n].cells
            } else {
                // Not even one pair of rows is little enough: the receiver gives up, though others might have less.
                let sheet = &sheets[items[n].sheet];
                let Some(piece) = items[n].cut(sheet, most as u64) else { break };
                items.push(Item { slot: receiver, ..piece });
                piece.cells
            };
            surplus[giver] -= moved as f64;
            surplus[receiver] += moved as f64;
        }
    }
    Some(strips(sheets, slots.len(), &items))
}

/// What the slots hold as items. The rows that a slot has of a document are paired from outside in: DistCA knows
/// documents that span ranks by a head and a tail on each.
fn items(sheets: &[Sheet<'_>], held: &[Vec<Strip>]) -> Vec<Item> {
    let mut rows: BTreeMap<(usize, usize), VecDeque<Span>> = BTreeMap::new();
    for (slot, strips) in held.iter().enumerate() {
        for strip in strips {
            rows.entry((slot, strip.sheet)).or_default().push_back(strip.q);
        }
    }
    let mut items = Vec::with_capacity(rows.len());
    for ((slot, sheet), mut rows) in rows {
        rows.make_contiguous().sort_unstable();
        while let Some(head) = rows.pop_front() {
            let tail = rows.pop_back().unwrap_or_default();
            items.push(Item::new(&sheets[sheet], sheet, slot, head, tail));
        }
    }
    items
}

/// The item with the fewest elements per cell among those of slots above their share, of equals the first, and the
/// most cells that may move of it to a slot that lacks `need`.
fn cheapest(items: &[Item], prices: &[Price], surplus: &[f64], need: f64) -> Option<(usize, f64)> {
    let mut best: Option<(f64, usize, f64)> = None;
    for (n, item) in items.iter().enumerate() {
        let spare = surplus[item.slot];
        if spare <= 0.0 || item.cells == 0 {
            continue;
        }
        let most = need.min(item.cells as f64).min(spare);
        let price = prices[item.sheet].per_cell(most);
        if best.is_none_or(|(least, ..)| price < least) {
            best = Some((price, n, most));
        }
    }
    best.map(|(_, n, most)| (n, most))
}

/// The items' rows as each slot's strips.
fn strips(sheets: &[Sheet<'_>], slots: usize, items: &[Item]) -> Vec<Vec<Strip>> {
    let mut held = vec![Vec::new(); slots];
    for item in items {
        let strip = |q| Strip::new(sheets, item.sheet, sheets[item.sheet].kv_heads, q);
        held[item.slot].extend([item.head, item.tail].into_iter().filter_map(strip));
    }
    held
}

impl Item {
    fn new(rows: &Sheet<'_>, sheet: usize, slot: usize, head: Span, tail: Span) -> Item {
        let cells = (rows.cells(head) + rows.cells(tail)) * rows.kv_heads.len() as u64;
        Item { sheet, slot, head, tail, cells }
    }

    /// Its head and its tail; of an odd number of rows the head has one more.
    fn parted(&self) -> (Span, Span) {
        let rows = match (self.head.is_empty(), self.tail.is_empty()) {
            (_, true) => self.head,
            (true, _) => self.tail,
            _ => return (self.head, self.tail),
        };
        let head = Span::at(rows.start(), rows.len().div_ceil(2));
        (head, Span::at(head.end(), rows.len() - head.len()))
    }

    /// Takes off the inner edges as many rows of each as hold no more than `most` cells, which is less than all.
    /// `None`, and nothing is taken, where that leaves no cell to move.
    fn cut(&mut self, sheet: &Sheet<'_>, most: u64) -> Option<Item> {
        let (head, tail) = self.parted();
        let piece = |rows: usize| {
            let (of_head, of_tail) = (rows.min(head.len()), rows.min(tail.len()));
            let (head, tail) = (Span::at(head.end() - of_head, of_head), Span::at(tail.start(), of_tail));
            Item::new(sheet, self.sheet, self.slot, head, tail)
        };
        let (mut fits, mut exceeds) = (0, head.len().max(tail.len()));
        while fits + 1 < exceeds {
            let middle = fits + (exceeds - fits) / 2;
            if piece(middle).cells <= most { fits = middle } else { exceeds = middle }
        }
        let piece = Some(piece(fits)).filter(|piece| piece.cells > 0)?;
        self.head = Span::at(head.start(), head.len() - piece.head.len());
        self.tail = Span::at(piece.tail.end(), tail.len() - piece.tail.len());
        self.cells -= piece.cells;
        Some(piece)
    }
}

impl Price {
    fn of(sheet: &Sheet<'_>, geometry: &HeadGeometry) -> Price {
        let (tokens, heads) = (sheet.document.tokens(), sheet.kv_heads.len() as f64);
        let cells = sheet.cells(Span::to(tokens)) as f64 * heads;
        Price {
            row: heads * (geometry.group() * geometry.head_dim()) as f64,
            keys: heads * (geometry.head_dim() + geometry.v_head_dim()) as f64 * (tokens + 1) as f64,
            pair: 2.0 * cells / tokens as f64,
        }
    }

    /// Elements per cell of moving `cells` cells.
    fn per_cell(&self, cells: f64) -> f64 {
        (cells / self.pair * self.row + self.keys) / cells
    }
}
