//! A heat map: amounts by row and column.

use std::collections::BTreeMap;

use crate::page::numbers::bytes;
use crate::page::svg::{at, drawing, escape, line, rect, text, upright};

/// The largest number of rows, and of columns.
pub(super) const SIDE: usize = 64;

const LEFT: f64 = 78.0;
/// Names are not set closer than this.
const LINE: f64 = 13.0;
/// The key below: its squares, how many and how large.
const SHADES: usize = 10;
const SHADE: f64 = 18.0;

/// One side of the map, and the names of its places.
pub(super) struct Side<'a> {
    pub(super) title: &'a str,
    pub(super) names: Vec<String>,
}

/// Bytes of a place, and what is said of it.
pub(super) struct Cell {
    pub(super) bytes: u64,
    pub(super) title: String,
}

/// The map of `cells` by row and column. Those of `marked` are where nothing can be.
pub(super) fn map(
    rows: &Side<'_>,
    columns: &Side<'_>,
    cells: &BTreeMap<(usize, usize), Cell>,
    marked: &[(usize, usize)],
) -> String {
    let longest = rows.names.len().max(columns.names.len()).max(1);
    let top = 30.0 + 6.8 * columns.names.iter().map(|name| name.chars().count()).max().unwrap_or(0) as f64;
    let side = (544.0 / longest as f64).clamp(8.0, 44.0);
    let (width, height) = (side * columns.names.len() as f64, side * rows.names.len() as f64);
    let place = |(row, column): (usize, usize)| [LEFT + column as f64 * side, top + row as f64 * side];
    let mut content = rect("plot", [LEFT, top, width, height], "");
    content.push_str(&grid([rows.names.len(), columns.names.len()], top, side));
    for &(row, column) in marked {
        let [x, y] = place((row, column));
        let inset = side * 0.3;
        content.push_str(&line("self", [x + inset, y + inset, x + side - inset, y + side - inset]));
    }
    let most = cells.values().map(|cell| cell.bytes).max().unwrap_or(0);
    for (&at_place, cell) in cells {
        let [x, y] = place(at_place);
        let heat = cell.bytes as f64 / most.max(1) as f64;
        content.push_str(&shade([x + 0.5, y + 0.5, side - 1.0], heat, &cell.title));
    }
    content.push_str(&labels(rows, columns, top, side));
    let bottom = top + height;
    content.push_str(&key(bottom + 18.0, most));
    let label = format!("{} by {}, bytes", rows.title, columns.title);
    // The key needs its width, however small the map.
    let size = [(LEFT + width + 24.0).max(LEFT + SHADE * SHADES as f64 + 120.0), bottom + 44.0];
    drawing("map", size, &label, &content)
}

fn shade([x, y, side]: [f64; 3], heat: f64, title: &str) -> String {
    let (x, y, side, opacity) = (at(x), at(y), at(side), at(0.12 + 0.88 * heat));
    let title = if title.is_empty() { String::new() } else { format!("<title>{}</title>", escape(title)) };
    format!(
        "<rect class=\"heat\" x=\"{x}\" y=\"{y}\" width=\"{side}\" height=\"{side}\" fill-opacity=\"{opacity}\">{title}</rect>\n"
    )
}

/// Lines that the eye can follow from a name to a place.
fn grid([rows, columns]: [usize; 2], top: f64, side: f64) -> String {
    let every = if side < 16.0 { 8 } else { 1 };
    let (width, height) = (side * columns as f64, side * rows as f64);
    let across = (0..=rows).step_by(every).map(|n| {
        let y = top + n as f64 * side;
        line("grid", [LEFT, y, LEFT + width, y])
    });
    let down = (0..=columns).step_by(every).map(|n| {
        let x = LEFT + n as f64 * side;
        line("grid", [x, top, x, top + height])
    });
    across.chain(down).collect()
}

fn labels(rows: &Side<'_>, columns: &Side<'_>, top: f64, side: f64) -> String {
    // Names at the lines where there are few lines.
    let every = if side < LINE { 4 } else { 1 };
    let mut labels = String::new();
    for (n, name) in rows.names.iter().enumerate().step_by(every) {
        let y = top + (n as f64 + 0.5) * side + 4.0;
        labels.push_str(&text("label end", [LEFT - 6.0, y], name));
    }
    for (n, name) in columns.names.iter().enumerate().step_by(every) {
        let (x, y) = (at(LEFT + (n as f64 + 0.5) * side + 4.0), at(top - 6.0));
        let name = escape(name);
        labels.push_str(&format!(
            "<text class=\"label\" transform=\"translate({x} {y}) rotate(-90)\">{name}</text>\n"
        ));
    }
    let middle = top + side * rows.names.len() as f64 / 2.0;
    labels.push_str(&upright("axis", [13.0, middle.max(top + 36.0)], rows.title));
    labels.push_str(&text("axis", [LEFT, 14.0], columns.title));
    labels
}

fn key(y: f64, most: u64) -> String {
    let mut key = String::new();
    for n in 0..SHADES {
        let heat = n as f64 / (SHADES - 1) as f64;
        key.push_str(&shade([LEFT + n as f64 * SHADE, y, SHADE - 1.0], heat, ""));
    }
    key.push_str(&text("label end", [LEFT - 6.0, y + 13.0], "0 B"));
    key.push_str(&text("label", [LEFT + SHADE * SHADES as f64 + 6.0, y + 13.0], &bytes(most)));
    key
}
