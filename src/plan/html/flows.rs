//! Who sends what to whom.

use std::collections::{BTreeMap, BTreeSet};

use outboard_planner::{Carried, Flow};

use super::Planned;
use super::matrix::{self, Cell, SIDE, Side};
use crate::page::numbers::{bytes, count};
use crate::page::svg::escape;

/// Lengths of the lists.
const PAIRS: usize = 12;
const ENDS: usize = 8;

pub(super) fn section(planned: &Planned<'_>) -> String {
    let flows = Flow::of(planned.plan, planned.problem);
    let content = if flows.is_empty() {
        "<p>Nothing moves: every row is computed where it lives.</p>\n".to_owned()
    } else {
        let (map, note) = heat(planned, &flows);
        format!(
            "<p>A home rank sends Q, K and V (backward dO, LSE and D) of rows that another server computes, and gets O and \
             LSE (backward dQ, dK and dV) back. Forward and backward, both ways.{note}</p>\n\
             <div class=\"columns\"><div class=\"scroll\">{map}</div><div>{}</div></div>\n",
            lists(planned, &flows)
        )
    };
    format!("<section id=\"flows\">\n<h2>Who sends to whom</h2>\n{content}</section>\n")
}

/// The map of homes and servers, several to a row where there are many, and what is to be said of that.
fn heat(planned: &Planned<'_>, flows: &[Flow]) -> (String, String) {
    let problem = planned.problem;
    let homes = problem.documents.iter().flat_map(|d| d.homes()).map(|home| home.rank);
    let ranks: Vec<u32> = homes.collect::<BTreeSet<u32>>().into_iter().collect();
    let slots = problem.slots.len();
    let by = [together(ranks.len()), together(slots)];
    let names: Vec<String> = ranks.iter().map(u32::to_string).collect();
    let rows = Side { title: "home rank", names: grouped(&names, by[0]) };
    let names: Vec<String> = (0..slots).map(|slot| planned.server(slot)).collect();
    let columns = Side { title: "computed by server", names: grouped(&names, by[1]) };
    let name = |side: &Side<'_>, n: usize| side.names.get(n).cloned().unwrap_or_default();
    let cells = sums(flows, &ranks, by).into_iter().map(|(place, (sum, flows))| {
        let pairs = if flows > 1 { format!(" ({} pairs)", count(flows)) } else { String::new() };
        let from =
            format!("home rank {} and server {}{pairs}", name(&rows, place.0), name(&columns, place.1));
        (place, Cell { bytes: sum.total(), title: format!("{from}: {}", in_words(&sum)) })
    });
    let own = problem.slots.iter().enumerate().filter(|_| by == [1, 1]);
    let own: Vec<(usize, usize)> =
        own.filter_map(|(slot, of)| Some((ranks.binary_search(&of.rank?).ok()?, slot))).collect();
    let note = match by[0].max(by[1]) {
        1 if own.is_empty() => String::new(),
        1 => " A stroke marks a rank's own server, to which nothing travels.".to_owned(),
        most => format!(" Up to {most} neighbours share a row or column of the map."),
    };
    (matrix::map(&rows, &columns, &cells.collect(), &own), note)
}

/// Flows of each row and column, added up, and how many: `by` ranks of `ranks` share a row, and `by` slots a column.
fn sums(flows: &[Flow], ranks: &[u32], by: [usize; 2]) -> BTreeMap<(usize, usize), (Flow, usize)> {
    let mut sums: BTreeMap<(usize, usize), (Flow, usize)> = BTreeMap::new();
    for flow in flows {
        let Ok(rank) = ranks.binary_search(&flow.rank) else { continue };
        let add = |(sum, flows): &mut (Flow, usize)| (*sum, *flows) = (joined(sum, flow), *flows + 1);
        sums.entry((rank / by[0], flow.slot / by[1])).and_modify(add).or_insert((*flow, 1));
    }
    sums
}

/// How many neighbours share a row: the least power of two that leaves few enough rows.
fn together(n: usize) -> usize {
    n.div_ceil(SIDE).checked_next_power_of_two().unwrap_or(n).max(1)
}

fn grouped(names: &[String], together: usize) -> Vec<String> {
    let name = |names: &[String]| match names {
        [first, .., last] => format!("{first}–{last}"),
        [lone] => lone.clone(),
        [] => String::new(),
    };
    names.chunks(together).map(name).collect()
}

fn joined(a: &Flow, b: &Flow) -> Flow {
    let add = |a: Carried, b: Carried| Carried {
        there: a.there.saturating_add(b.there),
        back: a.back.saturating_add(b.back),
    };
    Flow { forward: add(a.forward, b.forward), backward: add(a.backward, b.backward), ..*a }
}

fn in_words(flow: &Flow) -> String {
    let Flow { forward, backward, .. } = flow;
    format!(
        "{} (forward {} there, {} back; backward {} there, {} back)",
        bytes(flow.total()),
        bytes(forward.there),
        bytes(forward.back),
        bytes(backward.there),
        bytes(backward.back)
    )
}

/// The most of everything.
fn lists(planned: &Planned<'_>, flows: &[Flow]) -> String {
    let mut pairs: Vec<&Flow> = flows.iter().collect();
    pairs.sort_by_key(|flow| std::cmp::Reverse(flow.total()));
    let pair = |flow: &&Flow| {
        let ends = format!("rank {} ⇄ server {}", flow.rank, planned.server(flow.slot));
        (ends, flow.total(), in_words(flow))
    };
    let mut by_rank: BTreeMap<u32, (u64, usize)> = BTreeMap::new();
    let mut by_slot: BTreeMap<usize, (u64, usize)> = BTreeMap::new();
    for flow in flows {
        for sum in [by_rank.entry(flow.rank).or_default(), by_slot.entry(flow.slot).or_default()] {
            *sum = (sum.0.saturating_add(flow.total()), sum.1 + 1);
        }
    }
    let ranks = most(by_rank).into_iter().map(|(rank, (sum, with))| {
        (format!("rank {rank}"), sum, format!("{} with {with} servers", bytes(sum)))
    });
    let slots = most(by_slot).into_iter().map(|(slot, (sum, with))| {
        (format!("server {}", planned.server(slot)), sum, format!("{} with {with} home ranks", bytes(sum)))
    });
    list("Largest flows", flows.len(), pairs.iter().take(PAIRS).map(pair).collect())
        + &list("Most bytes by home rank", ranks.len(), ranks.take(ENDS).collect())
        + &list("Most bytes by helping server", slots.len(), slots.take(ENDS).collect())
}

fn most<K: Ord>(sums: BTreeMap<K, (u64, usize)>) -> Vec<(K, (u64, usize))> {
    let mut sums: Vec<_> = sums.into_iter().collect();
    sums.sort_by_key(|(_, (bytes, _))| std::cmp::Reverse(*bytes));
    sums
}

/// Names with their bytes as bars, of `all` that there are.
fn list(title: &str, all: usize, entries: Vec<(String, u64, String)>) -> String {
    let longest = entries.iter().map(|entry| entry.1).max().unwrap_or(0).max(1);
    let shown = if all > entries.len() {
        format!(" <small>{} of {}</small>", entries.len(), count(all))
    } else {
        String::new()
    };
    let rows: String = entries
        .iter()
        .map(|(name, amount, title)| {
            let part = *amount as f64 / longest as f64 * 100.0;
            format!(
                "<tr title=\"{}\"><th>{}</th><td>{}</td><td class=\"bar\"><i style=\"width:{part:.1}%\"></i></td></tr>\n",
                escape(title),
                escape(name),
                bytes(*amount)
            )
        })
        .collect();
    format!(
        "<table class=\"list\"><caption>{}{shown}</caption>\n<tbody>{rows}</tbody></table>\n",
        escape(title)
    )
}

#[cfg(test)]
mod tests {
    use outboard_planner::{Policy, Traffic, plan_by};

    use super::super::super::examples::{in_place, mixed};
    use super::*;

    #[test]
    fn the_map_holds_every_byte_that_moves() {
        for (problem, policy) in [
            (mixed(), Policy::Outboard),
            (mixed(), Policy::Cp),
            (in_place(150), Policy::Cp),
            (in_place(3), Policy::Fixed),
        ] {
            let plan = plan_by(&problem, policy).unwrap();
            let traffic = Traffic::of(&plan, &problem);
            let flows = Flow::of(&plan, &problem);
            let ranks: Vec<u32> = (0..200).collect();
            for by in [[1, 1], [together(150), together(problem.slots.len())], [200, 1 << 20]] {
                let sums = sums(&flows, &ranks, by);
                let bytes = |of: fn(&Flow) -> u64| sums.values().map(|(flow, _)| of(flow)).sum::<u64>();
                assert_eq!(bytes(|flow| flow.forward.total()), traffic.forward.total);
                assert_eq!(bytes(|flow| flow.backward.total()), traffic.backward.total);
                assert_eq!(sums.values().map(|(_, flows)| flows).sum::<usize>(), flows.len());
            }
            assert_eq!(flows.is_empty(), policy == Policy::Fixed);
        }
    }

    #[test]
    fn no_side_of_the_map_is_longer_than_it_may_be() {
        for n in [1, 64, 65, 128, 129, 512, 513, 100_000] {
            let rows = grouped(&vec![String::from("7"); n], together(n)).len();
            assert!((1..=SIDE).contains(&rows) && (n > SIDE || rows == n), "{n}: {rows}");
        }
        let names = ["0", "1", "2", "3", "4"].map(str::to_owned);
        assert_eq!(grouped(&names, 2), ["0–1", "2–3", "4"]);
    }
}
