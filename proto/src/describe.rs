//! Errors with their causes, for people.

use std::error::Error;

/// The error's message followed by those of its causes, which say what a library's outermost message often leaves out.
/// Causes that only repeat what was said are left out.
pub fn describe(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.contains(&message) {
            text = format!("{text}: {message}");
        }
        cause = error.source();
    }
    text
}
