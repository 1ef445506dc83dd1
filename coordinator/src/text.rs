//! Names in requests, and lists in messages.

use std::fmt::Display;

use crate::Error;

/// Longest name accepted, in bytes.
const MAX_TEXT: usize = 256;
/// Most entries of a list in a message.
const MAX_LISTED: usize = 8;

/// Checks a text that may be empty.
pub(crate) fn check_text(field: &str, text: &str) -> Result<(), Error> {
    if text.len() > MAX_TEXT {
        return Err(Error::invalid(format!(
            "{field} is {} bytes long; at most {MAX_TEXT} are allowed",
            text.len()
        )));
    }
    if text.chars().any(char::is_control) {
        return Err(Error::invalid(format!("{field} is {text:?}; control characters are not allowed")));
    }
    Ok(())
}

/// Checks a text that must say something.
pub(crate) fn check_name(field: &str, text: &str) -> Result<(), Error> {
    if text.is_empty() {
        return Err(Error::invalid(format!("{field} is empty")));
    }
    check_text(field, text)
}

/// Checks a `host:port`.
pub(crate) fn check_address(field: &str, address: &str) -> Result<(), Error> {
    check_name(field, address)?;
    let host_and_port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty());
    match host_and_port.and_then(|(_, port)| port.parse::<u16>().ok()) {
        Some(port) if port > 0 => Ok(()),
        _ => {
            Err(Error::invalid(format!("{field} is {address:?}; it must be host:port, with a port above 0")))
        }
    }
}

/// The first entries, and how many more there are: `1, 3, 4 and 12 more`.
pub(crate) fn listed<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let mut items = items.into_iter();
    let first: Vec<String> = items.by_ref().take(MAX_LISTED).map(|item| item.to_string()).collect();
    let more = items.count();
    let list = first.join(", ");
    if more > 0 { format!("{list} and {more} more") } else { list }
}

/// `rank 1` or `ranks 1, 2`.
pub(crate) fn ranks(ranks: &[u32]) -> String {
    format!("{} {}", if ranks.len() == 1 { "rank" } else { "ranks" }, listed(ranks))
}

/// `1 server` or `2 servers`.
pub(crate) fn servers(count: usize) -> String {
    format!("{count} server{}", if count == 1 { "" } else { "s" })
}
