//! How the longest documents are cut.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use outboard_attention::{Document, PlannedTask};

use super::super::fetched::{Fetched, Tasks, by_document, of_document};
use super::Planned;
use super::panels::{Look, Looks, panels, picture};
use super::strip::{Spanning, fetches, strip};
use crate::holdings::ranks;
use crate::page::numbers::{count, percent, things};
use crate::page::svg::{DISTINCT, colour, escape};

/// How many documents are drawn, pictures of each, and servers in its legend.
const SHOWN: usize = 4;
const PICTURES: usize = 16;
const NAMED: usize = 32;

pub(super) fn section(planned: &Planned<'_>) -> String {
    let tasks = by_document(planned.plan);
    let shown = longest(planned, &tasks);
    let none = Vec::new();
    let articles: String = shown
        .iter()
        .map(|document| article(planned, document, tasks.get(&document.id()).unwrap_or(&none)))
        .collect();
    let spanning = match shown.iter().any(|document| document.sole_home().is_none()) {
        true => {
            " Where a document spans ranks, a bar shows which of them holds which tokens, and how many keys and rows of the \
                 others its server fetches, for each kv head on average."
        }
        false => "",
    };
    let cut = tasks.values().filter(|tasks| servers(tasks) > 1).count();
    format!(
        "<section id=\"documents\">\n<h2>How the longest documents are cut</h2>\n\
         <p>{} of {} are computed by several servers; {} drawn here, each in its own scale. An area is a task: its \
         queries from top to bottom, the keys that they see from left to right. Kv heads that are cut alike share a picture. \
         The strip on the left shows where the rows live. Colours are of each document, grey is the server on its home.{spanning}</p>\n\
         {articles}</section>\n",
        count(cut),
        things(planned.problem.documents.len(), "document"),
        match shown.len() {
            1 => "one is".to_owned(),
            n => format!("the {n} longest are"),
        },
    )
}

fn servers(tasks: &[&PlannedTask]) -> usize {
    tasks.iter().map(|task| task.slot).collect::<BTreeSet<u32>>().len()
}

/// The documents to draw: the longest, and of equals those that most servers compute.
fn longest<'a>(planned: &Planned<'a>, tasks: &Tasks<'_>) -> Vec<&'a Document> {
    let mut documents: Vec<&Document> = planned.problem.documents.iter().collect();
    documents.sort_by_cached_key(|document| {
        let servers = tasks.get(&document.id()).map_or(0, |tasks| servers(tasks));
        (Reverse(document.tokens()), Reverse(servers), document.id())
    });
    documents.truncate(SHOWN);
    documents
}

fn article(planned: &Planned<'_>, document: &Document, tasks: &[&PlannedTask]) -> String {
    let mask = document.mask(planned.problem.geometry.kv_heads());
    let total = mask.cells().max(1) as f64;
    let mut cells: BTreeMap<u32, (u64, usize)> = BTreeMap::new();
    for task in tasks {
        let sum = cells.entry(task.slot).or_default();
        *sum = (sum.0.saturating_add(mask.clip(task.q, task.kv, task.kv_heads).cells()), sum.1 + 1);
    }
    let slots = planned.problem.slots.iter().zip(0u32..);
    let ranks: BTreeMap<u32, u32> = slots.filter_map(|(slot, n)| Some((slot.rank?, n))).collect();
    let home = document.sole_home().and_then(|rank| ranks.get(&rank)).copied();
    let mut order: Vec<(u32, u64, usize)> =
        cells.iter().map(|(&slot, &(cells, tasks))| (slot, cells, tasks)).collect();
    order.sort_by_key(|&(slot, cells, _)| (Some(slot) != home, Reverse(cells), slot));
    let looks = looks(planned, &order, home);
    let fetched = match document.sole_home() {
        Some(_) => BTreeMap::new(),
        None => fetched(planned, document, tasks),
    };
    let homes = match document.sole_home() {
        Some(_) => String::new(),
        None => strip(&Spanning { document, looks: &looks, ranks: &ranks, fetched: &fetched }),
    };
    let (panels, exact) = panels(&mask, tasks);
    let side = match panels.len() {
        // Three to seven to a line.
        0..=3 => 300.0,
        4 | 6..=8 => 212.0,
        5 | 9..=10 => 165.0,
        _ => 132.0,
    };
    let pictures: String =
        panels.iter().take(PICTURES).map(|panel| picture(panel, document, &looks, &ranks, side)).collect();
    let mut notes = Vec::new();
    if panels.len() > PICTURES {
        notes.push(format!("{} more ranges of kv heads are not drawn.", panels.len() - PICTURES));
    }
    if !exact {
        notes.push("The mask is too fine to draw: areas are the rectangles of tasks.".to_owned());
    }
    if order.len() > DISTINCT + 1 {
        notes.push(format!("Beyond {DISTINCT} servers, colours repeat."));
    }
    let notes = if notes.is_empty() { String::new() } else { format!("<p>{}</p>\n", notes.join(" ")) };
    let legend: String = order
        .iter()
        .take(NAMED)
        .map(|&(slot, cells, tasks)| {
            let Some(look) = looks.get(&slot) else { return String::new() };
            let at_home = if Some(slot) == home { " (home)" } else { "" };
            let (class, name) = (&look.class, escape(&look.name));
            format!(
                "<span data-server=\"{name}\"><svg viewBox=\"0 0 16 16\"><rect class=\"{class}\" width=\"16\" height=\"16\"/></svg>\
                 server {name}{at_home}: {} <small>{}{}</small></span>",
                percent(cells as f64 / total),
                things(tasks, "task"),
                fetched.get(&slot).map(|fetched| format!(", {}", fetches(*fetched).join(", "))).unwrap_or_default(),
            )
        })
        .collect();
    let more = match order.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!("<span>and {} more</span>", things(more, "server")),
    };
    format!(
        "<article>\n<h3>{}</h3>\n<p class=\"legend\">{legend}{more}</p>\n{notes}{homes}<div class=\"panels\">\n{pictures}</div>\n</article>\n",
        escape(&heading(planned, document, tasks.len(), order.len()))
    )
}

/// What each server fetches of a document, for a kv head on average.
fn fetched(planned: &Planned<'_>, document: &Document, tasks: &[&PlannedTask]) -> BTreeMap<u32, Fetched> {
    let kv_heads = planned.problem.geometry.kv_heads();
    let of_all = of_document(document, tasks, planned.problem);
    of_all.into_iter().map(|(slot, fetched)| (slot, fetched.of_a_head(kv_heads))).collect()
}

fn heading(planned: &Planned<'_>, document: &Document, tasks: usize, servers: usize) -> String {
    let id = planned.documents.get(document.id().index as usize);
    let id = id.map_or_else(|| document.id().to_string(), u64::to_string);
    let home = match document.sole_home() {
        Some(rank) => format!("home rank {rank}"),
        None => format!("on {}", things(ranks(document).len(), "home rank")),
    };
    let tick = match planned.plan.ticks.len() {
        0..=1 => String::new(),
        _ => format!(", tick {}", document.tick()),
    };
    let mask = if document.is_causal() { "causal" } else { "its own mask" };
    format!(
        "Document {id}: {} tokens, {mask}, {home}{tick}; {} on {}",
        count(document.tokens()),
        things(tasks, "task"),
        things(servers, "server")
    )
}

/// Grey for the home's server, colours for the others, most work first.
fn looks(planned: &Planned<'_>, order: &[(u32, u64, usize)], home: Option<u32>) -> Looks {
    let others = order.iter().filter(|&&(slot, ..)| Some(slot) != home);
    let look = |(n, &(slot, ..)): (usize, &(u32, u64, usize))| {
        (slot, Look { class: colour(n), name: planned.server(slot as usize) })
    };
    let mut looks: Looks = others.enumerate().map(look).collect();
    if let Some(slot) = home {
        looks.insert(slot, Look { class: "home".to_owned(), name: planned.server(slot as usize) });
    }
    looks
}
