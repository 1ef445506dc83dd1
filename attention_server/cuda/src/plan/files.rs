//! Plans on disk: one JSON file each, with a checksum. Whatever is wrong with a file, the plan is built anew.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::engine::Engine;

/// Counts changes of the files' form or the graphs' meaning.
const FORMAT: u32 = 1;

/// A folder of plans.
#[derive(Clone, Debug)]
pub(crate) struct PlanFiles {
    folder: PathBuf,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: u32,
    /// Everything that the plan depends on, in words.
    key: String,
    engine: Engine,
    /// What cuDNN wrote; empty where only the engine is kept.
    plan: String,
    /// CRC-32C of key, engine and plan, which holds machine code.
    checksum: u32,
}

impl File {
    fn sum(key: &str, engine: &Engine, plan: &str) -> u32 {
        let engine = format!("{engine:?}");
        [key, &engine, plan].iter().fold(0, |sum, part| crc32c::crc32c_append(sum, part.as_bytes()))
    }
}

impl PlanFiles {
    pub(crate) fn new(folder: PathBuf) -> PlanFiles {
        PlanFiles { folder }
    }

    /// What was stored under `key`, if it is there and sound.
    pub(crate) fn read(&self, key: &str) -> Option<(Engine, String)> {
        let path = self.path(key);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => return ignore(&path, &error.to_string()),
        };
        let file: File = match serde_json::from_str(&text) {
            Ok(file) => file,
            Err(error) => return ignore(&path, &error.to_string()),
        };
        if file.format != FORMAT || file.key != key {
            return ignore(&path, "it was written for something else");
        }
        if File::sum(&file.key, &file.engine, &file.plan) != file.checksum {
            return ignore(&path, "its checksum does not match");
        }
        Some((file.engine, file.plan))
    }

    /// Stores under `key`. That it cannot be stored costs time at the next start, nothing else.
    pub(crate) fn write(&self, key: &str, engine: &Engine, plan: String) {
        let path = self.path(key);
        let checksum = File::sum(key, engine, &plan);
        let file = File { format: FORMAT, key: key.to_owned(), engine: engine.clone(), plan, checksum };
        // A name that no other thread, process or machine has: the folder may be shared.
        let unique =
            std::hash::BuildHasher::hash_one(&std::collections::hash_map::RandomState::new(), checksum);
        let temporary = self.folder.join(format!(".{}-{unique:016x}.unfinished", std::process::id()));
        let written = fs::create_dir_all(&self.folder)
            .and_then(|()| fs::write(&temporary, serde_json::to_string(&file)?))
            .and_then(|()| fs::rename(&temporary, &path));
        if let Err(error) = written {
            let _ = fs::remove_file(&temporary);
            tracing::warn!(path = %path.display(), %error, "cannot keep a plan; it will be built again at the next start");
        }
    }

    fn path(&self, key: &str) -> PathBuf {
        let name: String =
            key.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect();
        self.folder.join(format!("{name}.json"))
    }
}

fn ignore<T>(path: &Path, reason: &str) -> Option<T> {
    tracing::warn!(path = %path.display(), reason, "ignoring a stored plan; it will be built anew");
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn files_come_back_or_are_ignored() {
        let folder = std::env::temp_dir().join(format!("outboard-plans-{}", std::process::id()));
        let files = PlanFiles::new(folder.clone());
        let engine = Engine { index: 6, knobs: vec![(14, 4), (24, 2)], deterministic: true };
        let key = "cuDNN 9.25.1 sm90 backward/causal";
        assert!(files.read(key).is_none());
        files.write(key, &engine, "a plan".to_owned());
        assert_eq!(files.read(key).unwrap(), (engine.clone(), "a plan".to_owned()));
        assert!(files.read("another key").is_none());
        files.write("cuDNN 9.25.1 sm90 backward/full", &engine, "another plan".to_owned());
        assert_eq!(files.read(key).unwrap().1, "a plan");

        let path = files.path(key);
        let sound = fs::read_to_string(&path).unwrap();
        for spoiled in [
            sound.replace("a plan", "a plum"),
            sound.replace("\"index\":6", "\"index\":5"),
            sound.replace("[24,2]", "[24,3]"),
            sound.replace("\"format\":1", "\"format\":0"),
            sound.replace("9.25.1", "9.25.2"),
            sound.chars().take(sound.len() / 2).collect(),
            String::new(),
        ] {
            fs::write(&path, spoiled).unwrap();
            assert!(files.read(key).is_none());
        }
        fs::write(&path, sound).unwrap();
        assert!(files.read(key).is_some());
        fs::remove_dir_all(folder).unwrap();
    }
}
