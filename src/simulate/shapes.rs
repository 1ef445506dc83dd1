//! Models that do not come with the program: their shapes, in a JSON file or a table of the TOML file.

use std::path::Path;

use anyhow::{Context, anyhow, ensure};
use outboard_simulator::{Model, SimulationError};
use serde_json::{Map, Value};

use super::entries::Said;
use super::value::small;

/// What is to be said of a model.
pub(super) const KEYS: [&str; 9] =
    ["name", "layers", "hidden", "ffn", "q_heads", "kv_heads", "head_dim", "vocabulary", "dtype"];

/// Reads a model from a JSON file. Errors name the file, and the key at fault.
pub(super) fn read(path: &Path) -> anyhow::Result<Model> {
    let file = || path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", file()))?;
    let shapes: Map<String, Value> =
        serde_json::from_str(&text).map_err(|error| anyhow!("{} is no model: {error}", file()))?;
    let pairs = shapes.into_iter().map(|(key, value)| match value {
        Value::String(text) => (key, text),
        other => (key, other.to_string()),
    });
    model(pairs.collect()).with_context(file)
}

/// The model that entries named `model.KEY` describe.
pub(super) fn of_entries(said: &[&Said]) -> anyhow::Result<Model> {
    let pair = |said: &&Said| (said.name.trim_start_matches("model.").to_owned(), said.text.clone());
    model(said.iter().map(pair).collect())
}

fn model(pairs: Vec<(String, String)>) -> anyhow::Result<Model> {
    for (key, _) in &pairs {
        if !KEYS.contains(&key.as_str()) {
            return Err(SimulationError::unknown("entry of a model", key, &KEYS).into());
        }
    }
    let text = |key: &str| {
        let pair = pairs.iter().find(|(name, _)| name == key);
        pair.map(|(_, text)| text.as_str()).with_context(|| format!("model.{key} is missing"))
    };
    let count = |key: &str| small(text(key)?).with_context(|| format!("model.{key}"));
    let model = Model {
        name: text("name")?.to_owned(),
        layers: count("layers")?,
        hidden: count("hidden")?,
        ffn: count("ffn")?,
        q_heads: count("q_heads")?,
        kv_heads: count("kv_heads")?,
        head_dim: count("head_dim")?,
        vocabulary: count("vocabulary")?,
        dtype: text("dtype")?.parse().context("model.dtype")?,
    };
    ensure!(!model.name.trim().is_empty(), "model.name is empty");
    model.check()?;
    Ok(model)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound() -> Vec<(String, String)> {
        let values = ["small", "2", "64", "128", "4", "2", "16", "1k", "bf16"];
        KEYS.iter().zip(values).map(|(key, value)| ((*key).to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn a_model_has_the_shapes_that_are_said() {
        let model = model(sound()).unwrap();
        assert_eq!((model.name.as_str(), model.layers, model.vocabulary), ("small", 2, 1024));
    }

    #[test]
    fn errors_name_the_key() {
        let cases = [
            ("layers", "two", "model.layers: `two`"),
            ("layers", "0", "model.layers is 0"),
            ("dtype", "f8", "model.dtype"),
            ("kv_heads", "3", "model: "),
            ("name", " ", "model.name is empty"),
        ];
        for (key, value, says) in cases {
            let mut pairs = sound();
            pairs.iter_mut().find(|(name, _)| name == key).unwrap().1 = value.to_owned();
            let error = format!("{:#}", model(pairs).unwrap_err());
            assert!(error.contains(says), "{key}: {error}");
        }
        let mut pairs = sound();
        pairs[1].0 = "layer".to_owned();
        assert!(model(pairs).unwrap_err().to_string().contains("did you mean `layers`?"));
        assert!(model(sound().split_off(1)).unwrap_err().to_string().contains("model.name is missing"));
    }
}
