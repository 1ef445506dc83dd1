//! What the simulation says, in a sentence and the figures that matter most.

use super::super::point::Point;
use super::super::table::{LOST, chosen, gain, range, share, verdict};
use crate::page::numbers::{bytes, count, percent, seconds};
use crate::page::svg::escape;
use crate::page::tile;

pub(super) fn section(points: &[Point], point: &Point, of_point: &str) -> String {
    let Some(fastest) = point.fastest() else { return String::new() };
    let lost: f64 = LOST.iter().map(|(name, _)| share(fastest, name)).sum();
    let baseline = point.baseline().filter(|baseline| baseline.policy != fastest.policy);
    let note = match baseline {
        Some(baseline) => format!("{} against {}", gain(point, fastest), baseline.policy),
        None => "no policy without attention servers is compared".to_owned(),
    };
    let note = if fastest.policy.disaggregates() { note } else { "without attention servers".to_owned() };
    let scenario = &point.named.scenario;
    let worst = LOST.iter().max_by(|a, b| share(fastest, a.0).total_cmp(&share(fastest, b.0)));
    let worst = worst.map(|(name, _)| format!("most of it: {name}, {}", percent(share(fastest, name))));
    let per_gpu = fastest.tokens_per_second / f64::from(scenario.layout.gpus);
    let tiles = [
        tile("Fastest", fastest.policy.name(), &[note, chosen(fastest)]),
        tile(
            "Tokens a second",
            &count(fastest.tokens_per_second.round() as u64),
            &[format!("{} on each GPU", count(per_gpu.round() as u64))],
        ),
        tile("A step", &seconds(fastest.seconds), &[format!("of {} tokens", count(scenario.tokens))]),
        tile(
            "Model FLOPs utilisation",
            &percent(fastest.mfu),
            &["useful FLOPs over the peak of all GPUs".to_owned()],
        ),
        tile("Time lost", &percent(lost), &worst.into_iter().collect::<Vec<_>>()),
        tile(
            "Memory of the fullest GPU",
            &bytes(fastest.memory.total() as u64),
            &[format!(
                "of {}, mean {}",
                bytes(scenario.gpu.memory_bytes as u64),
                bytes(fastest.mean_memory as u64)
            )],
        ),
    ];
    let sentence = verdict(point).map(|verdict| capital(&verdict)).unwrap_or_default();
    let over = if points.len() > 1 { range(points).map(|range| capital(&range)) } else { None };
    let over = over.map_or_else(String::new, |range| format!(" {range}."));
    let place = match of_point {
        "" => String::new(),
        of_point => format!("<p>{}{}</p>\n", escape(of_point), escape(&over)),
    };
    format!(
        "<section id=\"figures\">\n<p class=\"verdict\">{}.</p>\n{place}<dl class=\"tiles\">\n{}</dl>\n</section>\n",
        escape(&sentence),
        tiles.concat()
    )
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
