//! Where time and memory go: a bar for each policy, of parts that add up.

use outboard_simulator::{Account, Memory, Outcome};

use super::super::point::Point;
use super::legend;
use crate::page::numbers::{bytes, percent, seconds};
use crate::page::svg::{colour, drawing, escape, line, rect, text, ticks};

const WIDTH: f64 = 1080.0;
const LEFT: f64 = 160.0;
const RIGHT: f64 = 130.0;
const TOP: f64 = 10.0;
const ROW: f64 = 30.0;
const BAR: f64 = 20.0;

/// A bar.
struct Bar {
    name: String,
    /// Class, name and size of each part.
    parts: Vec<(String, &'static str, f64)>,
    /// What stands behind it.
    says: String,
    /// A line across it.
    mark: Option<(f64, String)>,
}

pub(super) fn time(point: &Point, of_point: &str) -> String {
    let class = |name: &str| format!("a-{name}");
    let bar = |outcome: &Outcome| Bar {
        name: outcome.policy.name().to_owned(),
        parts: Account::NAMES
            .iter()
            .zip(outcome.account.parts())
            .map(|(name, seconds)| (class(name), *name, seconds))
            .collect(),
        says: format!("{}, MFU {}", seconds(outcome.seconds), percent(outcome.mfu)),
        mark: None,
    };
    let bars: Vec<Bar> = point.outcomes().map(bar).collect();
    let marks: Vec<(String, &str)> = Account::NAMES.iter().map(|name| (class(name), *name)).collect();
    let chart = chart("Seconds of a step, mean over devices", &bars, "s", &seconds, None);
    format!(
        "<section id=\"time\">\n<h2>Where the time goes</h2>\n<p>{} Seconds of a step, mean over devices: imbalance waits for \
         others that still compute, exposed for bytes that are on their way, a bubble for other stages; host is what \
         sending and receiving takes of the device itself.</p>\n{}{chart}</section>\n",
        escape(of_point),
        legend(&marks)
    )
}

pub(super) fn memory(point: &Point, of_point: &str) -> String {
    let available = point.named.scenario.gpu.memory_bytes;
    let bar = |outcome: &Outcome| Bar {
        name: outcome.policy.name().to_owned(),
        parts: Memory::NAMES
            .iter()
            .zip(outcome.memory.parts())
            .enumerate()
            .map(|(n, (name, bytes))| (colour(n), *name, bytes / 1e9))
            .collect(),
        says: bytes(outcome.memory.total() as u64),
        mark: Some((
            outcome.mean_memory / 1e9,
            format!("mean of all GPUs: {}", bytes(outcome.mean_memory as u64)),
        )),
    };
    let bars: Vec<Bar> = point.outcomes().map(bar).collect();
    let marks: Vec<(String, &str)> =
        Memory::NAMES.iter().enumerate().map(|(n, name)| (colour(n), *name)).collect();
    let gigabytes = |value: f64| bytes((value * 1e9) as u64);
    let chart = chart("Memory of the fullest GPU", &bars, "GB", &gigabytes, Some(available / 1e9));
    format!(
        "<section id=\"memory\">\n<h2>Memory</h2>\n<p>{} The GPU that needs most; the thin mark is the mean of all, the dotted \
         line the memory of {}.</p>\n{}{chart}</section>\n",
        escape(of_point),
        escape(&point.named.scenario.gpu.name),
        legend(&marks)
    )
}

fn chart(title: &str, bars: &[Bar], unit: &str, shown: &dyn Fn(f64) -> String, limit: Option<f64>) -> String {
    let total = |bar: &Bar| bar.parts.iter().map(|(_, _, size)| size).sum::<f64>();
    let most = bars.iter().map(total).fold(limit.unwrap_or(0.0), f64::max);
    if most <= 0.0 {
        return String::new();
    }
    let plot = WIDTH - LEFT - RIGHT;
    let x = |size: f64| LEFT + size / most * plot;
    let bottom = TOP + ROW * bars.len() as f64;
    let mut content = String::new();
    for tick in ticks(0.0, most, 8.0) {
        content.push_str(&line("grid", [x(tick), TOP, x(tick), bottom]));
        let digits = if most < 8.0 { 1 } else { 0 };
        let label = if most < 0.8 { shown(tick) } else { format!("{tick:.digits$}") };
        content.push_str(&text("label mid", [x(tick), bottom + 16.0], &label));
    }
    content.push_str(&text("axis", [LEFT + plot + 14.0, bottom + 16.0], unit));
    for (n, bar) in bars.iter().enumerate() {
        let y = TOP + ROW * n as f64 + (ROW - BAR) / 2.0;
        let middle = y + BAR / 2.0 + 4.0;
        content.push_str(&text("axis end", [LEFT - 8.0, middle], &bar.name));
        let mut from = 0.0;
        for (class, name, size) in bar.parts.iter().filter(|(_, _, size)| *size > 0.0) {
            let share = percent(size / total(bar).max(f64::MIN_POSITIVE));
            let title = format!("{}: {name} {} ({share})", bar.name, shown(*size));
            content.push_str(&rect(class, [x(from), y, x(from + size) - x(from), BAR], &title));
            from += size;
        }
        if let Some((at, title)) = &bar.mark {
            content.push_str(&rect("mean-mark", [x(*at) - 1.5, y - 3.0, 3.0, BAR + 6.0], title));
        }
        content.push_str(&text("label", [x(from) + 8.0, middle], &bar.says));
    }
    if let Some(limit) = limit {
        content.push_str(&line("limit", [x(limit), TOP, x(limit), bottom]));
    }
    drawing("wide stack", [WIDTH, bottom + 24.0], title, &content)
}
