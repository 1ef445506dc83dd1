//! A small check of HTML that is written as XML would be.

use std::collections::BTreeMap;

/// An element's name, attributes and own text, in the order of start tags.
#[derive(Debug)]
pub struct Element {
    pub name: String,
    pub attributes: BTreeMap<String, String>,
    /// As it is written, up to the element's first child.
    pub text: String,
}

/// The elements of a page in which every element is closed where it should be, every attribute quoted and given once, and
/// every `&` an entity's. Says where it is not so.
pub fn elements(page: &str) -> Result<Vec<Element>, String> {
    let mut rest = page.strip_prefix("<!DOCTYPE html>").ok_or("no doctype")?;
    let mut elements: Vec<Element> = Vec::new();
    let mut open: Vec<String> = Vec::new();
    while let Some(start) = rest.find('<') {
        let text = &rest[..start];
        entities(text)?;
        if open.is_empty() && !text.trim().is_empty() {
            return Err(format!("text outside of elements: {text:?}"));
        }
        let end = rest[start..].find('>').ok_or("a tag without end")? + start;
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            match open.pop() {
                Some(expected) if expected == name => continue,
                other => return Err(format!("</{name}> closes {other:?}")),
            }
        }
        let (tag, closed) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
        let (name, attributes) = tag.split_once(' ').unwrap_or((tag, ""));
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(format!("<{tag}> is no tag"));
        }
        let raw = matches!(name, "style" | "script");
        let until = if raw { format!("</{name}>") } else { "<".to_owned() };
        let text = rest.find(&until).map(|end| &rest[..end]).ok_or(format!("<{name}> has no end"));
        let text = if closed { String::new() } else { text?.to_owned() };
        if raw {
            rest = &rest[text.len()..];
        }
        elements.push(Element { name: name.to_owned(), attributes: quoted(attributes)?, text });
        if !closed {
            open.push(name.to_owned());
        }
    }
    if open.is_empty() && rest.trim().is_empty() {
        Ok(elements)
    } else {
        Err(format!("{open:?} is open at the end"))
    }
}

fn quoted(mut rest: &str) -> Result<BTreeMap<String, String>, String> {
    let mut attributes = BTreeMap::new();
    while !rest.is_empty() {
        let (name, after) = rest.split_once("=\"").ok_or(format!("no value: {rest:?}"))?;
        let (value, after) = after.split_once('"').ok_or(format!("no end: {after:?}"))?;
        entities(value)?;
        let word = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if name.is_empty() || !name.chars().all(word) {
            return Err(format!("{name:?} is no attribute"));
        }
        if attributes.insert(name.to_owned(), value.to_owned()).is_some() {
            return Err(format!("{name:?} is given twice"));
        }
        rest = after.trim_start();
    }
    Ok(attributes)
}

fn entities(text: &str) -> Result<(), String> {
    let mut parts = text.split('&').skip(1);
    let known =
        |part: &str| ["amp;", "lt;", "gt;", "quot;", "#39;"].iter().any(|name| part.starts_with(name));
    parts.find(|part| !known(part)).map_or(Ok(()), |part| Err(format!("&{part:.9} is no entity")))
}
