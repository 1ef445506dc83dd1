//! The TOML file that says what is to be simulated.

use std::path::Path;

use anyhow::{Context, anyhow, bail};
use outboard_simulator::SimulationError;
use toml::{Table, Value};

use super::entries::{ENTRIES, Said};

/// What a file says, entry by entry.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<Said>> {
    let file = path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {file}"))?;
    said(&text, &file)
}

fn said(text: &str, file: &str) -> anyhow::Result<Vec<Said>> {
    let table: Table = text.parse().map_err(|error| anyhow!("{file} is no TOML: {error}"))?;
    let mut said = Vec::new();
    flatten(&table, "", file, &mut said)?;
    Ok(said)
}

/// Tables' entries by their whole names.
fn flatten(table: &Table, prefix: &str, file: &str, said: &mut Vec<Said>) -> anyhow::Result<()> {
    for (key, value) in table {
        let name = format!("{prefix}{key}");
        let place = format!("{file}: {name}");
        let text = match (value, name.as_str()) {
            (Value::Table(axes), "sweep") => sweep(axes).with_context(|| place.clone())?,
            (Value::Table(table), _) => {
                known_table(&name).with_context(|| place.clone())?;
                flatten(table, &format!("{name}."), file, said)?;
                continue;
            }
            (value, _) => text(value).with_context(|| place.clone())?,
        };
        // A GPU's or model's table may name it.
        let name = if name == "gpu.name" { "gpu".to_owned() } else { name };
        said.push(Said { name, text, place });
    }
    Ok(())
}

/// Checks that entries have tables of that name.
fn known_table(name: &str) -> Result<(), SimulationError> {
    let mut tables: Vec<&str> = vec!["model", "sweep"];
    for entry in ENTRIES.iter() {
        for (at, _) in entry.name.match_indices('.') {
            let table = &entry.name[..at];
            if !tables.contains(&table) {
                tables.push(table);
            }
        }
    }
    if tables.contains(&name) { Ok(()) } else { Err(SimulationError::unknown("table", name, &tables)) }
}

/// A value as the command line would have it.
fn text(value: &Value) -> anyhow::Result<String> {
    Ok(match value {
        Value::String(text) => text.clone(),
        Value::Integer(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        Value::Boolean(truth) => truth.to_string(),
        Value::Array(values) => values.iter().map(text).collect::<anyhow::Result<Vec<String>>>()?.join(","),
        Value::Datetime(_) | Value::Table(_) => bail!("a {} means nothing here", value.type_str()),
    })
}

fn sweep(axes: &Table) -> anyhow::Result<String> {
    let axes = axes.iter().map(|(name, values)| Ok(format!("{name}={}", text(values)?)));
    Ok(axes.collect::<anyhow::Result<Vec<String>>>()?.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_and_values_become_entries() {
        let text = "context = 1024\npolicy = [\"wlb\", \"cp\"]\nkeep = true\n[gpu]\nname = \"h100\"\nmemory_bytes = 1e11\n\
                    [network.between]\nbytes_per_second = \"50GB/s\"\n[sweep]\ngpus = [8, 16]\ncontext = [\"1k\"]\n";
        let found = said(text, "f").unwrap();
        let pairs: Vec<(&str, &str)> =
            found.iter().map(|said| (said.name.as_str(), said.text.as_str())).collect();
        for pair in [
            ("context", "1024"),
            ("policy", "wlb,cp"),
            ("keep", "true"),
            ("gpu", "h100"),
            ("gpu.memory_bytes", "100000000000"),
            ("network.between.bytes_per_second", "50GB/s"),
        ] {
            assert!(pairs.contains(&pair), "{pair:?} in {pairs:?}");
        }
        let swept = pairs.iter().find(|(name, _)| *name == "sweep").unwrap().1;
        assert!(
            swept.split(' ').eq(["gpus=8,16", "context=1k"]) || swept == "context=1k gpus=8,16",
            "{swept}"
        );
        assert!(found.iter().all(|said| said.place.starts_with("f: ")));
    }

    #[test]
    fn errors_name_the_file_and_the_entry() {
        for (text, says) in [
            ("[layot]\ngpus = 8", "f: layot: no table is called `layot`"),
            ("context = 2020-01-01", "f: context: a datetime"),
            ("context = ", "f is no TOML"),
            ("seed = [{ a = 1 }]", "f: seed: a table"),
        ] {
            let error = format!("{:#}", said(text, "f").unwrap_err());
            assert!(error.contains(says), "{text}: {error}");
        }
        assert!(format!("{:#}", said("[layot]", "f").unwrap_err()).contains("did you mean `layout`?"));
    }
}
