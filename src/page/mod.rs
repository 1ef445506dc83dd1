//! Pages that need nothing else, no network, no fonts, no libraries: what those of all commands have in common.

pub(crate) mod numbers;
pub(crate) mod svg;

use svg::escape;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// What a page consists of. All but the title is markup.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page<'a> {
    pub(crate) title: &'a str,
    /// Rules besides those of all pages.
    pub(crate) style: &'a str,
    /// What runs after the script of all pages.
    pub(crate) script: &'a str,
    pub(crate) body: &'a str,
}

impl Page<'_> {
    /// The whole page, readable in light and dark.
    pub(crate) fn markup(&self) -> String {
        let Page { title, style, script, body } = self;
        let title = escape(title);
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
             <meta name=\"color-scheme\" content=\"light dark\"/>\n\
             <title>{title}</title>\n<style>\n{STYLE}{style}</style>\n</head>\n<body>\n{body}\
             <script>\n{SCRIPT}{script}</script>\n</body>\n</html>\n"
        )
    }
}

/// One figure: its name, its value and what is to be said of it.
pub(crate) fn tile(name: &str, value: &str, notes: &[String]) -> String {
    let notes: String =
        notes.iter().map(|note| format!("<dd class=\"note\">{}</dd>", escape(note))).collect();
    format!(
        "<div class=\"tile\"><dt>{}</dt><dd class=\"value\">{}</dd>{notes}</div>\n",
        escape(name),
        escape(value)
    )
}
