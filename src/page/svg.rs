//! Small pieces of markup.

/// How many colours there are for servers, and how many textures each comes in.
const COLOURS: usize = 8;
const TEXTURES: usize = 3;
/// More servers than this share colours.
pub(crate) const DISTINCT: usize = COLOURS * TEXTURES;

/// Text as it may stand in an element or in quotes.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // No markup may hold these, however they are written.
            c if c.is_control() && !matches!(c, '\n' | '\t') => escaped.push('\u{fffd}'),
            '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// A coordinate, to a hundredth of a pixel.
pub(crate) fn at(x: f64) -> String {
    let text = format!("{x:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

/// A drawing that fits its column, with what it shows in words.
pub(crate) fn drawing(class: &str, [width, height]: [f64; 2], label: &str, content: &str) -> String {
    let (w, h, label) = (at(width), at(height), escape(label));
    format!(
        "<svg class=\"{class}\" viewBox=\"0 0 {w} {h}\" width=\"{w}\" height=\"{h}\" role=\"img\" aria-label=\"{label}\">\n\
         {content}</svg>\n"
    )
}

/// A rectangle with a text that shows when it is pointed at.
pub(crate) fn rect(class: &str, [x, y, width, height]: [f64; 4], title: &str) -> String {
    let (x, y, width, height) = (at(x), at(y), at(width.max(0.0)), at(height.max(0.0)));
    let rect = format!("<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\"");
    match title {
        "" => format!("{rect}/>\n"),
        title => format!("{rect}><title>{}</title></rect>\n", escape(title)),
    }
}

pub(crate) fn line(class: &str, [x1, y1, x2, y2]: [f64; 4]) -> String {
    let (x1, y1, x2, y2) = (at(x1), at(y1), at(x2), at(y2));
    format!("<line class=\"{class}\" x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\"/>\n")
}

/// Text that starts, centres or ends at a point, as its class says.
pub(crate) fn text(class: &str, [x, y]: [f64; 2], text: &str) -> String {
    format!("<text class=\"{class}\" x=\"{}\" y=\"{}\">{}</text>\n", at(x), at(y), escape(text))
}

/// Text along a vertical axis, read from below, with its middle at a point.
pub(crate) fn upright(class: &str, [x, y]: [f64; 2], text: &str) -> String {
    let (x, y, text) = (at(x), at(y), escape(text));
    format!("<text class=\"{class} mid\" transform=\"translate({x} {y}) rotate(-90)\">{text}</text>\n")
}

/// The class that fills with the n-th colour for servers.
pub(crate) fn colour(n: usize) -> String {
    format!("s{}", n % DISTINCT)
}

/// What the classes of [`colour`] beyond the plain colours fill with.
pub(crate) fn textures() -> String {
    let mut patterns = String::new();
    for n in COLOURS..DISTINCT {
        let (colour, mark) = match n / COLOURS {
            1 => (n % COLOURS, "<path class=\"mark\" d=\"M-1 5L5 -1M0 8L8 0M3 9L9 3\"/>"),
            _ => (
                n % COLOURS,
                "<circle class=\"dot\" cx=\"2\" cy=\"2\" r=\"1\"/><circle class=\"dot\" cx=\"6\" cy=\"6\" r=\"1\"/>",
            ),
        };
        patterns.push_str(&format!(
            "<pattern id=\"t{n}\" width=\"8\" height=\"8\" patternUnits=\"userSpaceOnUse\">\
             <rect class=\"s{colour}\" width=\"8\" height=\"8\"/>{mark}</pattern>\n"
        ));
    }
    let fills: String = (COLOURS..DISTINCT).map(|n| format!(".s{n}{{fill:url(#t{n})}}")).collect();
    format!(
        "<svg width=\"0\" height=\"0\" class=\"defs\" aria-hidden=\"true\"><style>{fills}</style><defs>\n{patterns}</defs></svg>\n"
    )
}

/// Round numbers from zero up to `most`, about `parts` of them; the last may lie below `most`.
pub(crate) fn ticks(from: f64, most: f64, parts: f64) -> Vec<f64> {
    let span = most - from;
    if !(span.is_finite() && span > 0.0) {
        return vec![from];
    }
    let raw = span / parts;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|step| *step >= raw * 0.999);
    let step = step.unwrap_or(raw);
    let first = (from / step - 1e-9).ceil();
    (0..=2 * parts as usize)
        .map(|n| (first + n as f64) * step)
        .take_while(|t| *t <= most + step * 1e-9)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_leave_its_element() {
        assert_eq!(
            escape("<b a='1' c=\"2\">&\u{1}é"),
            "&lt;b a=&#39;1&#39; c=&quot;2&quot;&gt;&amp;\u{fffd}é"
        );
    }

    #[test]
    fn coordinates_are_short() {
        assert_eq!([at(1.0), at(0.126), at(-0.001), at(100.0)], ["1", "0.13", "0", "100"]);
    }

    #[test]
    fn ticks_are_round_and_within() {
        assert_eq!(ticks(0.0, 3.7, 4.0), [0.0, 1.0, 2.0, 3.0]);
        let near: Vec<String> = ticks(0.981, 1.012, 4.0).iter().map(|t| format!("{t:.2}")).collect();
        assert_eq!(near, ["0.99", "1.00", "1.01"]);
        assert_eq!(ticks(0.0, 0.0, 4.0), [0.0]);
        assert_eq!(ticks(0.0, f64::NAN, 4.0), [0.0]);
    }

    #[test]
    fn every_colour_for_servers_is_defined() {
        let (textures, style) = (textures(), include_str!("page.css"));
        for n in 0..DISTINCT {
            let rule = format!(".{}{{", colour(n));
            assert!(textures.contains(&rule) || style.contains(&format!(".s{n} {{")), "{rule}");
        }
        assert_eq!(colour(DISTINCT), colour(0));
    }
}
