//! Values that vary, and their combinations.

use anyhow::{Context, anyhow, bail, ensure};
use outboard_simulator::SimulationError;

use super::description::Description;
use super::entries::{ENTRIES, Entry};

/// Most combinations of a sweep.
const MOST: usize = 10_000;

/// An entry and its values, as they were written.
#[derive(Clone, Debug)]
pub(crate) struct Axis {
    pub(super) entry: &'static Entry,
    pub(super) values: Vec<String>,
}

/// Reads `gpus=64,128 context=512k`.
pub(super) fn axes(text: &str) -> anyhow::Result<Vec<Axis>> {
    let mut axes: Vec<Axis> = Vec::new();
    for part in text.split_whitespace() {
        let (name, values) =
            part.split_once('=').ok_or_else(|| anyhow!("`{part}` is not of the form NAME=X[,X...]"))?;
        let sweeps = |entry: &&Entry| !matches!(entry.name, "policy" | "sweep");
        let entry = Entry::named(name).filter(sweeps).ok_or_else(|| {
            let known: Vec<&str> = ENTRIES.iter().filter(sweeps).map(Entry::called).collect();
            SimulationError::unknown("entry to sweep", name, &known)
        })?;
        ensure!(axes.iter().all(|axis| axis.entry.name != entry.name), "{name} is there twice");
        let values: Vec<String> = values.split(',').map(str::to_owned).collect();
        for (n, value) in values.iter().enumerate() {
            ensure!(!value.is_empty(), "{name} has an empty value");
            ensure!(!values[..n].contains(value), "{name}={value} is there twice");
        }
        axes.push(Axis { entry, values });
    }
    let count = axes.iter().map(|axis| axis.values.len()).try_fold(1usize, usize::checked_mul);
    match count {
        Some(count) if count <= MOST => Ok(axes),
        _ => bail!(
            "{} combinations are more than {MOST}",
            count.map_or_else(|| "far too many".to_owned(), |count| count.to_string())
        ),
    }
}

/// How many combinations there are; one where nothing varies.
pub(super) fn count(axes: &[Axis]) -> usize {
    axes.iter().map(|axis| axis.values.len()).product()
}

/// The n-th combination; the last axis varies fastest.
pub(super) fn point(axes: &[Axis], mut n: usize) -> Vec<(&'static Entry, &str)> {
    let mut point = Vec::with_capacity(axes.len());
    for axis in axes.iter().rev() {
        let values = axis.values.len().max(1);
        point.extend(axis.values.get(n % values).map(|value| (axis.entry, value.as_str())));
        n /= values;
    }
    point.reverse();
    point
}

/// Checks that every value by itself can be read.
pub(super) fn check(description: &Description) -> anyhow::Result<()> {
    for axis in &description.sweep {
        for value in &axis.values {
            description.at(&[(axis.entry, value)]).context("--sweep")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn combinations_are_in_order() {
        let axes = axes("gpus=64,128  context=1k,2k,4k").unwrap();
        assert_eq!(count(&axes), 6);
        let texts = |n| point(&axes, n).iter().map(|(_, text)| *text).collect::<Vec<_>>();
        assert_eq!([texts(0), texts(1), texts(5)], [["64", "1k"], ["64", "2k"], ["128", "4k"]]);
        assert_eq!(count(&[]), 1);
        assert!(point(&[], 0).is_empty());
    }

    #[test]
    fn what_cannot_vary_is_refused() {
        let many: Vec<String> = (1..=101).map(|n| n.to_string()).collect();
        let many = many.join(",");
        let many = format!("gpus={many} seed={many}");
        for (text, says) in [
            ("gpu", "`gpu` is not of the form"),
            ("gpuss=1", "did you mean `gpus`?"),
            ("policy=wlb", "no entry to sweep is called `policy`"),
            ("gpus=1 layout.gpus=2", "is there twice"),
            ("gpus=1,1", "gpus=1 is there twice"),
            ("gpus=1,", "empty value"),
            (&many, "10201 combinations are more than 10000"),
        ] {
            let error = format!("{:#}", axes(text).unwrap_err());
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
