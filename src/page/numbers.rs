//! Numbers for people: units, separators, no more digits than count.

/// Bytes in decimal units.
pub(crate) fn bytes(bytes: u64) -> String {
    with_unit(bytes as f64, &[(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")])
        .unwrap_or_else(|| format!("{bytes} B"))
}

/// Seconds in the unit that fits them.
pub(crate) fn seconds(seconds: f64) -> String {
    let unit = [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")];
    match with_unit(seconds, &unit) {
        Some(text) => text,
        None if seconds > 0.0 => format!("{seconds:.1e} s"),
        None => "0 s".to_owned(),
    }
}

/// A rate in decimal units of `unit`, as in "50 GB/s".
pub(crate) fn rate(value: f64, unit: &str) -> String {
    let scale = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let (by, prefix) = scale.into_iter().find(|(by, _)| value >= *by).unwrap_or((1.0, ""));
    let text = format!("{:.2}", value / by);
    format!("{} {prefix}{unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

/// A whole number with its thousands apart.
pub(crate) fn count(n: impl TryInto<u128>) -> String {
    let digits = n.try_into().unwrap_or(u128::MAX).to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number of things by their name, which takes an s unless there is one.
pub(crate) fn things(n: usize, name: &str) -> String {
    format!("{} {name}{}", count(n), if n == 1 { "" } else { "s" })
}

/// A part of a whole in percent.
pub(crate) fn percent(part: f64) -> String {
    let percent = part * 100.0;
    let digits = if percent >= 99.95 || percent >= 10.0 { 0 } else { 1 };
    format!("{percent:.digits$}%")
}

/// Three digits that count, in the largest unit that the value reaches.
fn with_unit(value: f64, units: &[(f64, &str)]) -> Option<String> {
    // What rounds up to a unit belongs to it: 1.00 MB, not 1000 kB.
    let &(by, unit) = units.iter().find(|(by, _)| value >= by * 0.9995)?;
    let value = value / by;
    let digits = match value {
        100.0.. => 0,
        10.0.. => 1,
        _ => 2,
    };
    Some(format!("{value:.digits$} {unit}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_three_digits_and_a_unit() {
        let cases = [
            (0, "0 B"),
            (999, "999 B"),
            (999_900, "1.00 MB"),
            (1_234_567, "1.23 MB"),
            (45_600_000_000, "45.6 GB"),
            (u64::MAX, "18446744 TB"),
        ];
        for (n, text) in cases {
            assert_eq!(bytes(n), text);
        }
    }

    #[test]
    fn seconds_have_the_unit_that_fits() {
        let cases =
            [(0.0, "0 s"), (1.5, "1.50 s"), (0.01234, "12.3 ms"), (2.5e-7, "250 ns"), (1e-12, "1.0e-12 s")];
        for (n, text) in cases {
            assert_eq!(seconds(n), text);
        }
    }

    #[test]
    fn counts_rates_and_parts_read_well() {
        assert_eq!([count(0usize), count(999u32), count(1_000u64)], ["0", "999", "1,000"]);
        assert_eq!(count(12_345_678usize), "12,345,678");
        assert_eq!(
            [rate(5e10, "B/s"), rate(4e14, "FLOP/s"), rate(3.0, "B/s")],
            ["50 GB/s", "400 TFLOP/s", "3 B/s"]
        );
        assert_eq!([percent(0.0312), percent(0.5), percent(1.0)], ["3.1%", "50%", "100%"]);
        assert_eq!([things(1, "task"), things(2_000, "task")], ["1 task", "2,000 tasks"]);
    }
}
