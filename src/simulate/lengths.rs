//! Files of document lengths.

use std::path::Path;

use anyhow::{Context, anyhow, ensure};

/// Reads lengths: a JSON array of them, or one a line. Errors name the file and the length at fault.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<u32>> {
    let file = || path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", file()))?;
    lengths(&text).with_context(file)
}

fn lengths(text: &str) -> anyhow::Result<Vec<u32>> {
    let lengths = if text.trim_start().starts_with('[') {
        serde_json::from_str(text).map_err(|error| anyhow!("not an array of lengths: {error}"))?
    } else {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let length = |(n, line): (usize, &str)| {
            line.trim().parse().map_err(|_| anyhow!("line {}: `{}` is no length", n + 1, line.trim()))
        };
        lines.map(length).collect::<anyhow::Result<Vec<u32>>>()?
    };
    ensure!(!lengths.is_empty(), "there are no lengths");
    Ok(lengths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_lines_or_an_array() {
        for text in ["5\n70\n\n900\n", " [5, 70,\n900]", "5\r\n70\r\n900"] {
            assert_eq!(lengths(text).unwrap(), [5, 70, 900], "{text:?}");
        }
        for (text, says) in [
            ("", "no lengths"),
            ("[]", "no lengths"),
            ("5\nsix", "line 2: `six`"),
            ("[5, -1]", "not an array"),
            ("5 6", "line 1"),
        ] {
            let error = lengths(text).unwrap_err().to_string();
            assert!(error.contains(says), "{text:?}: {error}");
        }
    }
}
