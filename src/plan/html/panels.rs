//! A document's mask, cut into tasks: one picture for the kv heads that are cut alike.

use std::collections::BTreeMap;

use outboard_attention::{BandSlice, Document, Mask, PlannedTask, Span};

use super::shape::{Point, centre, outline, reach};
use crate::page::numbers::count;
use crate::page::svg::{at, drawing, escape, rect, text, upright};

/// More outlines than this are not drawn: of each task only its rectangle.
const OUTLINES: usize = 20_000;
const LEFT: f64 = 30.0;
const TOP: f64 = 36.0;

/// Kv heads that are cut alike.
#[derive(Debug)]
pub(super) struct Panel {
    /// Ascending, no two of them touch.
    pub(super) heads: Vec<Span>,
    pub(super) areas: Vec<Area>,
}

/// What one task computes of a head.
#[derive(Debug, PartialEq)]
pub(super) struct Area {
    pub(super) slot: u32,
    pub(super) q: Span,
    pub(super) kv: Span,
    slices: Vec<BandSlice>,
}

/// The panels of a document, in order of their first heads, and whether areas follow the mask: where it is too fine to
/// draw they are rectangles.
pub(super) fn panels(mask: &Mask, tasks: &[&PlannedTask]) -> (Vec<Panel>, bool) {
    match cut(mask, tasks, OUTLINES) {
        Some(panels) => (panels, true),
        None => (cut(&Mask::default(), tasks, usize::MAX).unwrap_or_default(), false),
    }
}

/// The panels, unless they have more than `most` outlines. Without a mask, areas are rectangles.
fn cut(mask: &Mask, tasks: &[&PlannedTask], most: usize) -> Option<Vec<Panel>> {
    let spans = tasks.iter().map(|task| task.kv_heads).chain(mask.parts().iter().map(|part| part.kv_heads));
    let mut borders: Vec<usize> = spans.flat_map(|span| [span.start(), span.end()]).collect();
    borders.sort_unstable();
    borders.dedup();
    let mut panels: Vec<Panel> = Vec::new();
    let mut outlines = 0;
    for pair in borders.windows(2) {
        let Some(heads) = Span::new(pair[0], pair[1]) else { continue };
        let slices: Vec<&BandSlice> = mask.slices_of(heads.start()).collect();
        let mut areas = Vec::new();
        for task in tasks.iter().filter(|task| task.kv_heads.contains(heads.start())) {
            let PlannedTask { slot, q, kv, .. } = **task;
            let slices: Vec<BandSlice> = match mask.parts() {
                [] => BandSlice::new(q, kv, None, None).ok().into_iter().collect(),
                _ => slices.iter().filter_map(|slice| slice.clip(q, kv)).collect(),
            };
            outlines += slices.len();
            if outlines > most {
                return None;
            }
            areas.push(Area { slot, q, kv, slices });
        }
        areas.sort_by_key(|area| (area.q, area.kv, area.slot));
        match panels.iter_mut().find(|panel| panel.areas == areas) {
            Some(panel) => panel.add(heads),
            None if areas.is_empty() => {}
            None => panels.push(Panel { heads: vec![heads], areas }),
        }
    }
    Some(panels)
}

impl Panel {
    fn add(&mut self, heads: Span) {
        match self.heads.last_mut() {
            Some(last) if last.end() == heads.start() => *last = last.hull(heads),
            _ => self.heads.push(heads),
        }
    }

    /// The heads, as in "kv heads 0–2, 5".
    pub(super) fn name(&self) -> String {
        let one = |span: &Span| match span.len() {
            1 => span.start().to_string(),
            _ => format!("{}–{}", span.start(), span.end() - 1),
        };
        let names: Vec<String> = self.heads.iter().map(one).collect();
        let lone = matches!(self.heads.as_slice(), [span] if span.len() == 1);
        format!("kv head{} {}", if lone { "" } else { "s" }, names.join(", "))
    }
}

/// How servers look and what they are called, by slot.
pub(super) type Looks = BTreeMap<u32, Look>;

/// How a server looks in the pictures of one document.
#[derive(Clone, Debug)]
pub(super) struct Look {
    /// The class that fills.
    pub(super) class: String,
    pub(super) name: String,
}

/// The picture of a panel, `side` pixels for the whole document.
pub(super) fn picture(
    panel: &Panel,
    document: &Document,
    looks: &Looks,
    ranks: &BTreeMap<u32, u32>,
    side: f64,
) -> String {
    let scale = side / document.tokens() as f64;
    let mut content = text("heads", [LEFT, 13.0], &panel.name());
    content.push_str(&text("label", [LEFT, TOP - 6.0], "0"));
    content.push_str(&text("label mid", [LEFT + side / 2.0, TOP - 6.0], "keys"));
    content.push_str(&text("label end", [LEFT + side, TOP - 6.0], &count(document.tokens())));
    content.push_str(&upright("label", [12.0, TOP + side / 2.0], "queries"));
    content.push_str(&rect("frame", [LEFT, TOP, side, side], ""));
    content.push_str(&homes(document, looks, ranks, scale));
    let mut names: BTreeMap<u32, (f64, Point)> = BTreeMap::new();
    for area in &panel.areas {
        let Some(look) = looks.get(&area.slot) else { continue };
        let outlines: Vec<Vec<Point>> = area
            .slices
            .iter()
            .map(|slice| {
                outline(slice).iter().map(|[key, query]| [LEFT + key * scale, TOP + query * scale]).collect()
            })
            .collect();
        content.push_str(&path(&outlines, look, &title(area, look, panel)));
        let wide = look.name.len() as f64 * 6.6 + 5.0;
        for outline in &outlines {
            let (size, middle) = centre(outline);
            let fits = reach(outline, middle, 0) > wide && reach(outline, middle, 1) > 9.5;
            if fits && names.get(&area.slot).is_none_or(|(most, _)| size > *most) {
                names.insert(area.slot, (size, middle));
            }
        }
    }
    for (slot, (_, [x, y])) in &names {
        let name = looks.get(slot).map(|look| look.name.as_str()).unwrap_or_default();
        content.push_str(&text("name", [*x, y + 4.0], name));
    }
    let label = format!("{}: who computes which queries and keys", panel.name());
    drawing("panel", [LEFT + side + 6.0, TOP + side + 6.0], &label, &content)
}

fn title(area: &Area, look: &Look, panel: &Panel) -> String {
    let range = |span: Span| format!("{} to {}", count(span.start()), count(span.end()));
    format!("server {}: queries {}, keys {}, {}", look.name, range(area.q), range(area.kv), panel.name())
}

fn path(outlines: &[Vec<Point>], look: &Look, title: &str) -> String {
    let mut d = String::new();
    for outline in outlines {
        for (n, [x, y]) in outline.iter().enumerate() {
            d.push_str(&format!("{}{} {}", if n == 0 { "M" } else { "L" }, at(*x), at(*y)));
        }
        d.push('Z');
    }
    // A border would hide what is hardly wider than it.
    let low = outlines.iter().flatten().map(|p| p[1]).fold(f64::INFINITY, f64::min);
    let high = outlines.iter().flatten().map(|p| p[1]).fold(f64::NEG_INFINITY, f64::max);
    let thin = if high - low < 3.0 { " thin" } else { "" };
    let (class, name, title) = (&look.class, escape(&look.name), escape(title));
    format!(
        "<path class=\"area {class}{thin}\" data-server=\"{name}\" d=\"{d}\"><title>{title}</title></path>\n"
    )
}

/// Beside the queries, whose rows they are.
fn homes(document: &Document, looks: &Looks, ranks: &BTreeMap<u32, u32>, scale: f64) -> String {
    let strip = |home: &outboard_attention::HomeRange| {
        let look = ranks.get(&home.rank).and_then(|slot| looks.get(slot));
        let class = look.map_or("nowhere", |look| look.class.as_str());
        let (start, end) = (home.tokens.start(), home.tokens.end());
        let title = format!("tokens {} to {} live on rank {}", count(start), count(end), home.rank);
        rect(class, [LEFT - 9.0, TOP + start as f64 * scale, 5.0, (end - start) as f64 * scale], &title)
    };
    document.homes().iter().take(OUTLINES).map(strip).collect()
}

#[cfg(test)]
mod tests {
    use outboard_attention::MaskPart;
    use outboard_planner::{Policy, plan_by};

    use super::super::super::examples::{in_place, mixed};
    use super::*;

    #[test]
    fn every_task_appears_in_the_pictures_of_its_heads() {
        for policy in [Policy::Outboard, Policy::Cp, Policy::Distca { tolerance: 0.05 }] {
            let problem = mixed();
            let plan = plan_by(&problem, policy).unwrap();
            for document in &problem.documents {
                let mask = document.mask(problem.geometry.kv_heads());
                let tasks: Vec<&PlannedTask> = plan
                    .tasks()
                    .map(|(_, task)| task)
                    .filter(|task| task.document == document.id())
                    .collect();
                let (panels, exact) = panels(&mask, &tasks);
                assert!(exact);
                let heads: usize =
                    panels.iter().flat_map(|panel| &panel.heads).map(|heads| heads.len()).sum();
                assert_eq!(heads, problem.geometry.kv_heads(), "each head has one picture");
                let mut cells = 0;
                for panel in &panels {
                    let head = panel.heads[0].start();
                    let here: Vec<&&PlannedTask> =
                        tasks.iter().filter(|t| t.kv_heads.contains(head)).collect();
                    assert_eq!(panel.areas.len(), here.len());
                    for task in here {
                        let is = |area: &&Area| (area.slot, area.q, area.kv) == (task.slot, task.q, task.kv);
                        assert_eq!(panel.areas.iter().filter(is).count(), 1, "{task:?}");
                    }
                    let slices = panel.areas.iter().flat_map(|area| &area.slices);
                    let here: u64 = slices.map(BandSlice::cells).sum();
                    cells += here * panel.heads.iter().map(|heads| heads.len() as u64).sum::<u64>();
                }
                assert_eq!(cells, mask.cells());
            }
        }
    }

    #[test]
    fn heads_that_are_cut_alike_share_a_picture() {
        let problem = in_place(2);
        let document = &problem.documents[0];
        let task = |slot, heads: Span, q: Span| PlannedTask {
            document: document.id(),
            q,
            kv: Span::to(q.end()),
            kv_heads: heads,
            slot,
            group: 0,
            position: 0,
        };
        let all = Span::to(document.tokens());
        let tasks = [task(0, Span::to(1), all), task(1, Span::at(1, 1), all), task(0, Span::at(2, 2), all)];
        let (panels, _) = panels(&document.mask(4), &tasks.iter().collect::<Vec<_>>());
        let names: Vec<String> = panels.iter().map(Panel::name).collect();
        assert_eq!(names, ["kv heads 0, 2–3", "kv head 1"]);
    }

    #[test]
    fn a_mask_too_fine_to_draw_leaves_rectangles() {
        let tokens = 2 * OUTLINES + 2;
        let part = |n: usize| {
            let slice = BandSlice::new(Span::at(2 * n, 1), Span::to(1), None, None).unwrap();
            MaskPart { kv_heads: Span::to(1), slice }
        };
        let mask = Mask::new((0..=OUTLINES).map(part).collect()).unwrap();
        let task = PlannedTask {
            document: in_place(1).documents[0].id(),
            q: Span::to(tokens),
            kv: Span::to(1),
            kv_heads: Span::to(1),
            slot: 0,
            group: 0,
            position: 0,
        };
        let (panels, exact) = panels(&mask, &[&task]);
        assert!(!exact);
        assert_eq!((panels.len(), panels[0].areas.len()), (1, 1));
        assert_eq!(panels[0].areas[0].slices, [BandSlice::new(task.q, task.kv, None, None).unwrap()]);
    }
}
