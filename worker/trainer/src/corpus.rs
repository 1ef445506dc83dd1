//! Where documents come from: files, listed in an order that is the same on every rank.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::TrainerError;

/// A file that is one document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CorpusFile {
    /// Where it lies.
    pub path: PathBuf,
    /// Its length when it was listed, in bytes, which are its tokens. Never zero.
    pub bytes: u64,
}

/// All documents of a run. Every rank must list the same files, which it does from the same folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corpus {
    files: Vec<CorpusFile>,
}

impl Corpus {
    /// Every regular, non-empty file under `folder`, sorted by path. Symbolic links are not followed.
    ///
    /// # Errors
    /// [`TrainerError::Unreadable`] for a folder that cannot be listed, [`TrainerError::NoDocuments`] when there is no
    /// such file.
    pub fn from_folder(folder: &Path) -> Result<Self, TrainerError> {
        let mut files = Vec::new();
        walk(folder, &|_| true, &mut files)?;
        Corpus::of(files, folder, || {
            "it has no regular file with at least one byte; name another folder".into()
        })
    }

    /// The Rust source files of the packages that `lockfile` (the text of a `Cargo.lock`) names and that cargo has
    /// unpacked under `cargo_home`, in the order of package name and version, then path. Packages that are not
    /// unpacked there (other platforms need them) are left out.
    ///
    /// # Errors
    /// [`TrainerError::Unreadable`] when `cargo_home` has no readable `registry/src`, [`TrainerError::NoDocuments`]
    /// when it holds none of the packages.
    pub fn from_cargo(lockfile: &str, cargo_home: &Path) -> Result<Self, TrainerError> {
        let sources = cargo_home.join("registry").join("src");
        let registries = list(&sources)?;
        let mut files = Vec::new();
        let packages = registry_packages(lockfile);
        for package in &packages {
            let unpacked =
                registries.iter().map(|registry| registry.join(package)).find(|path| path.is_dir());
            if let Some(folder) = unpacked {
                walk(&folder, &|path| path.extension().is_some_and(|e| e == "rs"), &mut files)?;
            }
        }
        Corpus::of(files, &sources, || {
            let count = packages.len();
            format!(
                "none of the lockfile's {count} packages is unpacked there; run `cargo fetch`, or name a folder of text files"
            )
        })
    }

    /// The documents in listing order.
    pub fn files(&self) -> &[CorpusFile] {
        &self.files
    }

    fn of(files: Vec<CorpusFile>, place: &Path, detail: impl Fn() -> String) -> Result<Self, TrainerError> {
        if files.is_empty() {
            return Err(TrainerError::NoDocuments { path: place.to_path_buf(), detail: detail() });
        }
        Ok(Corpus { files })
    }
}

/// The directories (`name-version`) of the packages that come from a registry, in order.
fn registry_packages(lockfile: &str) -> BTreeSet<String> {
    let field = |block: &str, key: &str| {
        block.lines().find_map(|line| {
            line.strip_prefix(key)?.trim().strip_prefix('"')?.strip_suffix('"').map(str::to_owned)
        })
    };
    let blocks = lockfile.split("[[package]]").skip(1);
    blocks
        .filter(|block| field(block, "source =").is_some_and(|source| source.starts_with("registry+")))
        .filter_map(|block| Some(format!("{}-{}", field(block, "name =")?, field(block, "version =")?)))
        .filter(|package| !package.contains(['/', '\\']))
        .collect()
}

/// The paths in a folder, sorted.
fn list(folder: &Path) -> Result<Vec<PathBuf>, TrainerError> {
    let unreadable = |source| TrainerError::Unreadable { path: folder.to_path_buf(), source };
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        paths.push(entry.map_err(unreadable)?.path());
    }
    paths.sort();
    Ok(paths)
}

/// Adds the wanted files under `folder`, sorted by path. A stack of its own instead of recursion: folders may nest
/// deeper than a thread's stack.
fn walk(
    folder: &Path,
    wanted: &dyn Fn(&Path) -> bool,
    files: &mut Vec<CorpusFile>,
) -> Result<(), TrainerError> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for path in list(&folder)? {
            let meta = fs::symlink_metadata(&path)
                .map_err(|source| TrainerError::Unreadable { path: path.clone(), source })?;
            if meta.is_dir() {
                folders.push(path);
            } else if meta.is_file() && meta.len() > 0 && wanted(&path) {
                found.push(CorpusFile { path, bytes: meta.len() });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    files.append(&mut found);
    Ok(())
}
