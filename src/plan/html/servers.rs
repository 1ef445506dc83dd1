//! The servers' figures as a table, for whoever wants them exactly.

use super::super::figures::Figures;
use super::Planned;
use crate::page::numbers::{bytes, count};

/// More servers than this are too many for a table.
const ROWS: usize = 1024;

pub(super) fn section(planned: &Planned<'_>, figures: &Figures) -> String {
    let (before, after) = figures.shares();
    let traffic = &figures.traffic;
    let of = |values: &[u64], n: usize| values.get(n).copied().unwrap_or(0);
    let mut rows = String::new();
    for (n, device) in
        figures.devices.iter().enumerate().filter(|(_, device)| device.slot.is_some()).take(ROWS)
    {
        let rank = device.rank.map_or_else(|| "–".to_owned(), |rank| rank.to_string());
        let share = |shares: &[f64]| shares.get(n).copied().unwrap_or(0.0);
        let moved = [&traffic.forward, &traffic.backward].map(|pass| {
            format!("<td>{}</td><td>{}</td>", bytes(of(&pass.bytes_in, n)), bytes(of(&pass.bytes_out, n)))
        });
        rows.push_str(&format!(
            "<tr><td>{}</td><td>{rank}</td><td>{:.4}</td><td>{:.4}</td><td>{}</td>{}</tr>\n",
            planned.server(n),
            share(&before),
            share(&after),
            count(figures.tasks.get(n).copied().unwrap_or(0)),
            moved.concat(),
        ));
    }
    let hidden = figures.tasks.len().saturating_sub(ROWS);
    let more = if hidden > 0 {
        format!("<p>{} more servers are not listed.</p>\n", count(hidden))
    } else {
        String::new()
    };
    format!(
        "<section id=\"servers\">\n<h2>Every server in numbers</h2>\n<details><summary>Show the table</summary>\n\
         <div class=\"scroll\"><table class=\"numbers\">\n<thead><tr><th rowspan=\"2\">server</th><th rowspan=\"2\">rank</th>\
         <th colspan=\"2\">cells / mean</th><th rowspan=\"2\">tasks</th><th colspan=\"2\">forward</th>\
         <th colspan=\"2\">backward</th></tr>\n<tr><th>at home</th><th>planned</th><th>in</th><th>out</th><th>in</th>\
         <th>out</th></tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n{more}</details>\n</section>\n"
    )
}
