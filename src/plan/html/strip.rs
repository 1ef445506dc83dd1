//! A document along its tokens: which rank holds what, and what its server fetches.

use std::collections::BTreeMap;

use outboard_attention::{Document, HomeRange};

use super::super::fetched::Fetched;
use super::panels::Looks;
use crate::page::numbers::count;
use crate::page::svg::{at, drawing, escape, text};

const WIDTH: f64 = 1080.0;
const TOP: f64 = 18.0;
const BAR: f64 = 22.0;
const LINE: f64 = 15.0;
/// Pixels of a letter, and of what separates words of neighbours.
const LETTER: f64 = 6.4;
const GAP: f64 = 8.0;
/// More homes than this are not drawn.
const HOMES: usize = 20_000;

/// A document that spans ranks, and what is known of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spanning<'a> {
    pub(super) document: &'a Document,
    /// How servers look that compute some of it, by slot.
    pub(super) looks: &'a Looks,
    /// The slot of each rank that has one.
    pub(super) ranks: &'a BTreeMap<u32, u32>,
    /// By slot, as a mean over kv heads.
    pub(super) fetched: &'a BTreeMap<u32, Fetched>,
}

/// The bar, with names and numbers where they fit; all of them show when it is pointed at.
pub(super) fn strip(spanning: &Spanning<'_>) -> String {
    let document = spanning.document;
    let scale = WIDTH / document.tokens() as f64;
    let mut content = String::new();
    let (mut taken, mut lines) = (0.0, 0);
    for home in document.homes().iter().take(HOMES) {
        let (x, width) = (home.tokens.start() as f64 * scale, home.tokens.len() as f64 * scale);
        content.push_str(&bar(spanning, home, x, width));
        let middle = x + width / 2.0;
        let fits = |words: &str| words.chars().count() as f64 * LETTER + GAP <= width;
        let (long, short) = (format!("rank {}", home.rank), home.rank.to_string());
        if let Some(name) = [long, short].iter().find(|name| fits(name)) {
            content.push_str(&text("name", [middle, TOP + BAR / 2.0 + 4.0], name));
        }
        let words = words(spanning, home);
        if words.iter().all(|words| fits(words)) {
            for (n, words) in (1..).zip(&words) {
                content.push_str(&text("label mid", [middle, TOP + BAR + f64::from(n) * LINE], words));
            }
            lines = lines.max(words.len());
        }
        let start = count(home.tokens.start());
        let end = x + start.len() as f64 * LETTER + GAP;
        if x >= taken && end < WIDTH - 60.0 {
            content.push_str(&text("label", [x, TOP - 5.0], &start));
            taken = end;
        }
    }
    content.push_str(&text("label end", [WIDTH, TOP - 5.0], &count(document.tokens())));
    let height = TOP + BAR + lines as f64 * LINE + 8.0;
    drawing("wide strip", [WIDTH, height], "which rank holds which tokens", &content)
}

/// What a rank holds here, and what its server fetches of the document.
fn words(spanning: &Spanning<'_>, home: &HomeRange) -> Vec<String> {
    let mut words = vec![format!("holds {}", count(home.tokens.len()))];
    match spanning.ranks.get(&home.rank) {
        Some(slot) => words.extend(fetches(spanning.fetched.get(slot).copied().unwrap_or_default())),
        None => words.push("no server".to_owned()),
    }
    words
}

/// As in "fetches 300 keys" and "20 rows".
pub(super) fn fetches(Fetched { rows, keys }: Fetched) -> Vec<String> {
    let (keys, rows) = ((keys > 0).then(|| count(keys)), (rows > 0).then(|| count(rows)));
    match (keys, rows) {
        (None, None) => vec!["fetches nothing".to_owned()],
        (Some(keys), None) => vec![format!("fetches {keys} keys")],
        (None, Some(rows)) => vec![format!("fetches {rows} rows")],
        (Some(keys), Some(rows)) => vec![format!("fetches {keys} keys"), format!("{rows} rows")],
    }
}

fn bar(spanning: &Spanning<'_>, home: &HomeRange, x: f64, width: f64) -> String {
    let look = spanning.ranks.get(&home.rank).and_then(|slot| spanning.looks.get(slot));
    let class = look.map_or("nowhere", |look| look.class.as_str());
    let name = look.map(|look| format!(" data-server=\"{}\"", escape(&look.name))).unwrap_or_default();
    let (start, end) = (count(home.tokens.start()), count(home.tokens.end()));
    let words = words(spanning, home).join(", ");
    let title = escape(&format!("rank {}, tokens {start} to {end}: {words}", home.rank));
    format!(
        "<rect class=\"held {class}\"{name} x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"><title>{title}</title></rect>\n",
        at(x),
        at(TOP),
        at(width),
        at(BAR)
    )
}

#[cfg(test)]
mod tests {
    use outboard_attention::{DocumentId, Span};

    use super::super::panels::Look;
    use super::*;

    #[test]
    fn names_and_numbers_show_where_they_fit_and_every_home_has_its_bar() {
        let home = |rank, start, end: usize| HomeRange { rank, tokens: Span::at(start, end - start) };
        let homes = vec![home(70, 0, 4000), home(8, 4000, 9000), home(9, 9000, 9010), home(70, 9010, 9100)];
        let document = Document::new(DocumentId { rank: 0, index: 0 }, 9100, homes).unwrap();
        let looks: Looks = [(0, Look { class: "s0".into(), name: "7".into() })].into();
        let spanning = Spanning {
            document: &document,
            looks: &looks,
            ranks: &[(70, 0), (8, 1)].into(),
            fetched: &[(0, Fetched { rows: 0, keys: 5010 }), (1, Fetched { rows: 12, keys: 4000 })].into(),
        };
        let drawn = strip(&spanning);
        assert_eq!(drawn.matches("<rect class=\"held ").count(), 4);
        assert_eq!(drawn.matches("data-server=\"7\"").count(), 2, "its look is known");
        for shown in [
            ">rank 70<",
            ">rank 8<",
            ">holds 4,000<",
            ">fetches 5,010 keys<",
            ">fetches 4,000 keys<",
            ">12 rows<",
        ] {
            assert_eq!(drawn.matches(shown).count(), 1, "{shown} in {drawn}");
        }
        assert!(
            drawn.contains("<title>rank 9, tokens 9,000 to 9,010: holds 10, no server</title>"),
            "{drawn}"
        );
        assert_eq!(fetches(Fetched::default()), ["fetches nothing"]);
        assert_eq!(fetches(Fetched { rows: 1200, keys: 0 }), ["fetches 1,200 rows"]);
    }
}
