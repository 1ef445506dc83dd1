//! Simulating every point by every policy on several threads.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;

use anyhow::Context;

use super::description::{Description, Named};
use super::point::{Point, Row};
use super::sweep;
use crate::bench::kernel::show::Progress;

/// Threads that simulate, where nobody says how many.
pub(super) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// Simulates all points and hands them on in order, whichever thread is done first. Traces are kept where they are asked
/// for.
pub(super) fn points(
    description: &Description,
    threads: usize,
    traces: bool,
    mut done: impl FnMut(Point) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let policies = &description.policies;
    let axes = &description.sweep;
    let named: Vec<(Vec<String>, Named)> = (0..sweep::count(axes))
        .map(|n| {
            let point = sweep::point(axes, n);
            let labels = point.iter().map(|(_, text)| (*text).to_owned()).collect();
            let said = || point.iter().map(|(entry, text)| format!("{}={text}", entry.called()));
            let named = description.at(&point)?.named();
            Ok((labels, named.with_context(|| said().collect::<Vec<String>>().join(" "))?))
        })
        .collect::<anyhow::Result<_>>()?;
    let tasks = named.len() * policies.len();
    let progress = Progress::new(tasks)?;
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let (sender, rows) = channel();
        for _ in 0..threads.clamp(1, tasks.max(1)) {
            let (sender, next, named) = (sender.clone(), &next, &named);
            scope.spawn(move || {
                loop {
                    let task = next.fetch_add(1, Ordering::Relaxed);
                    let Some((_, named)) = named.get(task / policies.len()) else { return };
                    let mut row = Row::of(named, policies[task % policies.len()]);
                    if let (Ok(outcome), false) = (&mut row.result, traces) {
                        outcome.trace = outboard_simulator::Trace::default();
                    }
                    if sender.send((task, row)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut waiting = BTreeMap::new();
        let mut complete = Vec::new();
        let mut at = 0;
        for (task, row) in rows {
            progress.step();
            waiting.insert(task, row);
            while let Some(row) = waiting.remove(&at) {
                complete.push(row);
                at += 1;
                if complete.len() == policies.len() {
                    let (labels, named) = named[at / policies.len() - 1].clone();
                    done(Point { labels, named, rows: std::mem::take(&mut complete) })?;
                }
            }
        }
        Ok(())
    })
}
