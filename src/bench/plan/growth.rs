//! How planning time grows with the number of servers.

use outboard_planner::{Problem, Rates};
use serde::Serialize;

use super::mixes::Draw;
use super::rival::LINKS;
use super::steps::lane;
use super::{linked_rates, measure};
use crate::bench::kernel::show::{Output, Progress, table};

/// Servers, up to more than a job has.
const SERVERS: [u32; 7] = [64, 128, 256, 512, 1024, 2048, 4096];
/// Planning with speeds makes many plans, so it is timed up to so many.
const MOST_WITH_RATES: u32 = 512;

/// Milliseconds of planning a step.
#[derive(Debug, Serialize)]
struct Line {
    kind: &'static str,
    servers: u32,
    documents: usize,
    whole_ms: f64,
    lane_ms: f64,
    /// Whole, for links of 12.5 GB/s.
    #[serde(skip_serializing_if = "Option::is_none")]
    with_rates_ms: Option<f64>,
}

pub(super) fn run(repeats: u32, output: &mut Output) -> anyhow::Result<()> {
    let header =
        ["servers", "documents", "whole ms", "lane ms", "whole us a server", "whole ms at 12.5 GB/s"];
    let mut table = table(header, 0);
    let progress = Progress::new(SERVERS.len())?;
    for servers in SERVERS {
        progress.at(format!("{servers} servers"));
        let line = Line::measured(servers, repeats)?;
        output.write(&line)?;
        table.add_row([
            line.servers.to_string(),
            line.documents.to_string(),
            format!("{:.1}", line.whole_ms),
            format!("{:.1}", line.lane_ms),
            format!("{:.0}", 1e3 * line.whole_ms / f64::from(line.servers)),
            line.with_rates_ms.map_or("-".into(), |ms| format!("{ms:.0}")),
        ]);
        progress.step();
    }
    drop(progress);
    output.say(&table.to_string())
}

impl Line {
    fn measured(servers: u32, repeats: u32) -> anyhow::Result<Line> {
        let whole = Draw::of_growth(servers).problem()?;
        let lane = lane(&whole)?;
        let milliseconds = |problem: &Problem, repeats: u32| anyhow::Ok(1e3 * measure(problem, repeats)?.1);
        let with_rates = || {
            let rates = Some(linked_rates(Rates::default(), LINKS[0]));
            milliseconds(&Problem { rates, ..whole.clone() }, 1)
        };
        Ok(Line {
            kind: "growth",
            servers,
            documents: whole.documents.len(),
            whole_ms: milliseconds(&whole, repeats)?,
            lane_ms: milliseconds(&lane, repeats)?,
            with_rates_ms: (servers <= MOST_WITH_RATES).then(with_rates).transpose()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_grow_and_large_ones_are_not_timed_with_rates() {
        let [small, large] = [8, 2 * MOST_WITH_RATES].map(|servers| Line::measured(servers, 1).unwrap());
        assert!(large.documents > 50 * small.documents, "{small:?} {large:?}");
        assert!(small.with_rates_ms.is_some() && large.with_rates_ms.is_none());
    }
}
