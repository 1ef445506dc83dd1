//! A layout as the tables that the device reads. Pure.

use super::layout::BatchLayout;
use super::places::{Call, Sequence};
use super::tables::{SpanIndex, Tables};

/// Where the tables of a call lie: byte offsets among the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CallTables {
    pub(crate) rows: usize,
    pub(crate) keys: usize,
    pub(crate) q_offsets: usize,
    pub(crate) k_offsets: usize,
    pub(crate) v_offsets: usize,
    pub(crate) row_offsets: usize,
    pub(crate) lse_offsets: usize,
    pub(crate) key_offsets: usize,
}

/// A table of the moving kernels: where it lies, its entries, and the most rows of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MoveTable {
    pub(crate) start: usize,
    pub(crate) entries: usize,
    pub(crate) rows: usize,
}

/// All tables of a batch.
#[derive(Clone, Debug)]
pub(crate) struct BatchTables {
    pub(crate) tables: Tables,
    pub(crate) calls: Vec<CallTables>,
    pub(crate) moves: MoveTable,
    pub(crate) row_moves: MoveTable,
    pub(crate) made_up: MoveTable,
    pub(crate) row_heads: MoveTable,
    /// Starts and spans of the index by row.
    pub(crate) row_index: [usize; 2],
    pub(crate) key_heads: MoveTable,
    /// The same by key.
    pub(crate) key_index: [usize; 2],
}

impl BatchLayout {
    /// About the bytes of the tables.
    pub(crate) fn table_bytes(&self) -> usize {
        let sequences: usize = self.calls.iter().map(|call| call.sequences.len()).sum();
        let moves = self.moves.len() + self.row_moves.len() + self.made_up.len();
        let spans = self.row_index.spans.len() + self.key_index.spans.len();
        // Lengths and offsets of a sequence take 56 bytes, and plans have room for up to four times as many.
        4 * 56 * sequences + 48 * (moves + self.row_heads.len() + self.key_heads.len()) + 24 * spans
    }

    /// The tables, for plans that take so many sequences each: `capacities` has one for each call.
    pub(crate) fn tables(&self, capacities: &[usize]) -> BatchTables {
        let mut tables = Tables::default();
        let calls = self
            .calls
            .iter()
            .zip(capacities)
            .map(|(call, &capacity)| self.call_tables(&mut tables, call, capacity))
            .collect();
        macro_rules! table {
            ($field:ident, $rows:ident) => {
                MoveTable {
                    start: tables.push(&self.$field),
                    entries: self.$field.len(),
                    rows: self.$field.iter().map(|entry| entry.$rows as usize).max().unwrap_or(0),
                }
            };
        }
        let moves = table!(moves, rows);
        let row_moves = table!(row_moves, rows);
        let made_up = table!(made_up, rows);
        let row_heads = table!(row_heads, rows);
        let key_heads = table!(key_heads, keys);
        let mut index = |index: &SpanIndex| [tables.push(&index.starts), tables.push(&index.spans)];
        let (row_index, key_index) = (index(&self.row_index), index(&self.key_index));
        BatchTables { tables, calls, moves, row_moves, made_up, row_heads, row_index, key_heads, key_index }
    }

    /// Lengths and offsets of a call. Entries beyond its sequences have length zero, and the last offset again.
    fn call_tables(&self, tables: &mut Tables, call: &Call, capacity: usize) -> CallTables {
        let mut lengths = |len: fn(&Sequence) -> usize| {
            let mut table: Vec<i32> = call.sequences.iter().map(|s| len(s) as i32).collect();
            table.resize(capacity, 0);
            tables.push(&table)
        };
        let (rows, keys) = (lengths(|s| s.rows), lengths(|s| s.keys));
        let mut offsets = |first: fn(&Sequence) -> usize| {
            let mut table: Vec<i64> = call.sequences.iter().map(|s| first(s) as i64).collect();
            table.resize(capacity + 1, table.last().copied().unwrap_or(0));
            tables.push(&table)
        };
        CallTables {
            rows,
            keys,
            q_offsets: offsets(|s| s.q),
            k_offsets: offsets(|s| s.k),
            v_offsets: offsets(|s| s.v),
            row_offsets: offsets(|s| s.row_result),
            lse_offsets: offsets(|s| s.lse),
            key_offsets: offsets(|s| s.key_result),
        }
    }
}
