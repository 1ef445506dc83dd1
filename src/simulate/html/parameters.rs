//! Every result, and what it stands on.

use super::super::description::Description;
use super::super::point::Point;
use super::super::record::pairs;
use super::super::table::{cells, header};
use crate::page::svg::escape;

/// More points than this are not listed.
const LISTED: usize = 60;

const ASSUMPTIONS: [&str; 8] = [
    "All lanes of tensor parallelism do the same, so one lane of each device is simulated.",
    "A device computes in the order that the policy fixes, and its links carry meanwhile. Bytes that travel at one time share the links of the GPUs at their ends; nothing between them is a bottleneck.",
    "A transfer takes its bytes over the link's speed times its efficiency, and a latency.",
    "Core attention takes what the GPU's profile says of each task's shape, over an efficiency; all else takes its FLOPs over the peak times an efficiency.",
    "Of a B200 and an H100 no profile was measured: they have the H200's efficiencies at their own peaks.",
    "Document lengths of pretrain and prolong follow the quantiles that DistCA's evaluation (arXiv 2510.18121) published.",
    "Policies without attention servers choose the number of ranks that share a sequence, and those that pack over several steps how many, as takes the least time; they have dedicated GPUs as ranks.",
    "Other systems' policies are idealised: nothing is charged for planning, and links and kernels are as good as for ours.",
];

pub(super) fn results(description: &Description, points: &[Point]) -> String {
    let words = description.sweep.len();
    let class = |n: usize| if n == words { " class=\"policy\"" } else { "" };
    let name = |(n, name): (usize, &&str)| format!("<th{}>{}</th>", class(n), escape(name));
    let cell = |(n, cell): (usize, &String)| format!("<td{}>{}</td>", class(n), escape(cell));
    let names: String = header(description).iter().enumerate().map(name).collect();
    let mut rows = String::new();
    for point in points.iter().take(LISTED) {
        for row in &point.rows {
            let is_fastest = point.fastest().is_some_and(|fastest| fastest.policy == row.policy);
            let of_row = cells(description, point, row);
            let cells: String = match &row.result {
                Ok(_) => of_row.iter().enumerate().map(cell).collect(),
                Err(reason) => {
                    let named: String = of_row.iter().take(words + 1).enumerate().map(cell).collect();
                    let rest = of_row.len() - words - 1;
                    format!("{named}<td class=\"why\" colspan=\"{rest}\">{}</td>", escape(reason))
                }
            };
            let class = if is_fastest { " class=\"fastest\"" } else { "" };
            rows.push_str(&format!("<tr{class}>{cells}</tr>\n"));
        }
    }
    let more = match points.len().saturating_sub(LISTED) {
        0 => String::new(),
        n => format!("<p>{n} more points are not listed; --json and --csv have them.</p>\n"),
    };
    format!(
        "<section id=\"results\">\n<h2>All results</h2>\n<div class=\"scroll\">\n<table class=\"numbers results\">\n\
         <tr>{names}</tr>\n{rows}</table>\n</div>\n{more}</section>\n"
    )
}

pub(super) fn section(description: &Description, shown: &Point) -> String {
    let varies =
        |name: &str| description.sweep.iter().any(|axis| axis.entry.called().replace('-', "_") == name);
    let listed = |rows: Vec<(String, String)>| -> String {
        let row = |(name, value): (String, String)| {
            format!("<tr><th>{}</th><td>{}</td></tr>\n", escape(&name), escape(&value))
        };
        rows.into_iter().map(row).collect()
    };
    let inputs = pairs(&shown.named).into_iter().map(|(name, value)| {
        let value = if varies(name) { format!("{value} (varies)") } else { value };
        (name.replace('_', " "), value)
    });
    let tuning = shown.named.scenario.tuning.entries().into_iter().map(|(name, value, unit)| {
        let varies = if varies(name) { " (varies)" } else { "" };
        (name.replace('_', " "), format!("{value} {unit}{varies}"))
    });
    let assumptions: String = ASSUMPTIONS.iter().map(|text| format!("<li>{}</li>\n", escape(text))).collect();
    format!(
        "<section id=\"parameters\">\n<h2>Parameters and assumptions</h2>\n<div class=\"columns\">\n\
         <div>\n<table class=\"list\">\n<caption>What was simulated</caption>\n{}</table>\n</div>\n\
         <div>\n<table class=\"list\">\n<caption>Efficiencies and overheads</caption>\n{}</table>\n\
         <h3>Assumptions</h3>\n<ul>\n{assumptions}</ul>\n</div>\n</div>\n</section>\n",
        listed(inputs.collect()),
        listed(tuning.collect())
    )
}
