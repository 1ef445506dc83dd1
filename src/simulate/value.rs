//! Values as people write them: `512k`, `50GB/s`, `15us`.

use anyhow::{anyhow, bail};

/// A whole number; k is 1024, m is 1024 k and g is 1024 m.
pub(super) fn whole(text: &str) -> anyhow::Result<u64> {
    let wrong = || anyhow!("`{text}` is no whole number; write it as 524288 or 512k");
    let lower = text.trim().to_ascii_lowercase();
    let (digits, by) = match lower.chars().last() {
        Some('k') => (&lower[..lower.len() - 1], 1u64 << 10),
        Some('m') => (&lower[..lower.len() - 1], 1 << 20),
        Some('g') => (&lower[..lower.len() - 1], 1 << 30),
        _ => (lower.as_str(), 1),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(by).ok_or_else(wrong)
}

/// The same, as large as the field takes it.
pub(super) fn small(text: &str) -> anyhow::Result<u32> {
    let number = whole(text)?;
    u32::try_from(number).map_err(|_| anyhow!("{number} is too large; it may be up to {}", u32::MAX))
}

pub(super) fn number(text: &str) -> anyhow::Result<f64> {
    let number: f64 = text.trim().parse().map_err(|_| anyhow!("`{text}` is no number"))?;
    if !number.is_finite() {
        bail!("`{text}` is not finite");
    }
    Ok(number)
}

/// Bytes a second: a number, or one with a unit, of bytes (`50GB/s`) or bits (`400Gb/s`).
pub(super) fn rate(text: &str) -> anyhow::Result<f64> {
    let wrong = || anyhow!("`{text}` is no rate; write it as 50e9, 50GB/s or 400Gb/s");
    let trimmed = text.trim();
    let Some(unit) = trimmed.strip_suffix("/s") else { return number(trimmed).map_err(|_| wrong()) };
    let (unit, bytes) = match (unit.strip_suffix('B'), unit.strip_suffix('b')) {
        (Some(rest), _) => (rest, 1.0),
        (_, Some(rest)) => (rest, 0.125),
        _ => return Err(wrong()),
    };
    let prefixes = [('k', 1e3), ('M', 1e6), ('G', 1e9), ('T', 1e12)];
    let prefix = prefixes.into_iter().find_map(|(prefix, by)| Some((unit.strip_suffix(prefix)?, by)));
    let (digits, by) = prefix.unwrap_or((unit, 1.0));
    Ok(number(digits).map_err(|_| wrong())? * by * bytes)
}

/// Seconds: a number, or one with the unit s, ms, us or ns.
pub(super) fn seconds(text: &str) -> anyhow::Result<f64> {
    let trimmed = text.trim();
    let units = [("ms", 1e3), ("us", 1e6), ("µs", 1e6), ("ns", 1e9), ("s", 1.0)];
    let unit = units.into_iter().find_map(|(unit, parts)| Some((trimmed.strip_suffix(unit)?, parts)));
    let (digits, parts) = unit.unwrap_or((trimmed, 1.0));
    let wrong = |_| anyhow!("`{text}` is no time; write it as 15e-6 or 15us");
    Ok(number(digits).map_err(wrong)? / parts)
}

pub(super) fn truth(text: &str) -> anyhow::Result<bool> {
    text.trim().parse().map_err(|_| anyhow!("`{text}` is neither true nor false"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_may_have_units() {
        for (text, value) in [("1", 1), ("512k", 512 << 10), ("4M", 4 << 20), ("1g", 1 << 30), (" 7 ", 7)] {
            assert_eq!(whole(text).unwrap(), value, "{text}");
        }
        for (text, value) in
            [("50e9", 50e9), ("50GB/s", 50e9), ("400Gb/s", 50e9), ("1.5 TB/s", 1.5e12), ("8b/s", 1.0)]
        {
            assert_eq!(rate(text).unwrap(), value, "{text}");
        }
        for (text, value) in [("0", 0.0), ("5us", 5e-6), ("15µs", 15e-6), ("2 ms", 2e-3), ("1s", 1.0)] {
            assert_eq!(seconds(text).unwrap(), value, "{text}");
        }
        assert_eq!([truth("true").unwrap(), truth("false").unwrap()], [true, false]);
    }

    #[test]
    fn what_is_no_number_is_refused() {
        for text in ["", "k", "1.5k", "-1", "1e3", "12x", "99999999999999999999", "9999999999999g", "é"] {
            assert!(whole(text).is_err(), "{text}");
        }
        for text in ["", "GB/s", "50GB", "50G/s", "fast", "inf", "nanB/s"] {
            assert!(rate(text).is_err(), "{text}");
        }
        for text in ["", "s", "5 min", "inf"] {
            assert!(seconds(text).is_err(), "{text}");
        }
        assert!(truth("yes").is_err() && small("5g").is_err() && number("NaN").is_err());
    }
}
