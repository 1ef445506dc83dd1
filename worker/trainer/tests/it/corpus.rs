//! Which files are documents.

use outboard_trainer::{Corpus, TrainerError};

use crate::support::Folder;

fn names(corpus: &Corpus, folder: &Folder) -> Vec<String> {
    let relative =
        |path: &std::path::Path| path.strip_prefix(folder.path()).unwrap().to_str().unwrap().to_string();
    corpus.files().iter().map(|file| relative(&file.path)).collect()
}

#[test]
fn a_folder_gives_its_regular_files_sorted() {
    let folder = Folder::new();
    for (name, text) in [("b/z", "1"), ("b/a", "22"), ("a.txt", "333"), ("c", ""), ("b/deep/er/x", "4444")] {
        folder.write(name, text.as_bytes());
    }
    #[cfg(unix)]
    std::os::unix::fs::symlink(folder.path().join("a.txt"), folder.path().join("link")).unwrap();
    let corpus = Corpus::from_folder(folder.path()).unwrap();
    assert_eq!(names(&corpus, &folder), ["a.txt", "b/a", "b/deep/er/x", "b/z"]);
    assert_eq!(corpus.files()[2].bytes, 4);
}

#[test]
fn folders_without_documents_are_named() {
    let folder = Folder::new();
    folder.write("empty", b"");
    let error = Corpus::from_folder(folder.path()).unwrap_err();
    assert!(matches!(error, TrainerError::NoDocuments { .. }));
    assert!(error.to_string().contains(folder.path().to_str().unwrap()), "{error}");
    let missing = folder.path().join("missing");
    let error = Corpus::from_folder(&missing).unwrap_err();
    assert!(matches!(&error, TrainerError::Unreadable { path, .. } if *path == missing), "{error}");
}

const LOCKFILE: &str = r#"
version = 4

[[package]]
name = "zeta"
version = "1.0.0"
source = "registry+https://github.com/rust-lang/crates.io-index"
checksum = "00"
dependencies = [
 "alpha",
]

[[package]]
name = "local"
version = "0.1.0"

[[package]]
name = "alpha"
version = "0.2.1"
source = "registry+https://github.com/rust-lang/crates.io-index"

[[package]]
name = "not-unpacked"
version = "3.0.0"
source = "registry+https://github.com/rust-lang/crates.io-index"
"#;

#[test]
fn cargo_home_gives_the_sources_of_the_locked_packages() {
    let folder = Folder::new();
    for name in
        ["zeta-1.0.0/src/lib.rs", "zeta-1.0.0/build.rs", "zeta-1.0.0/README.md", "alpha-0.2.1/src/lib.rs"]
    {
        folder.write(&format!("registry/src/index-1/{name}"), b"fn main() {}");
    }
    folder.write("registry/src/index-1/alpha-0.3.0/src/lib.rs", b"// not locked");
    folder.write("registry/src/index-1/local-0.1.0/src/lib.rs", b"// not from a registry");
    let corpus = Corpus::from_cargo(LOCKFILE, folder.path()).unwrap();
    let expected = ["alpha-0.2.1/src/lib.rs", "zeta-1.0.0/build.rs", "zeta-1.0.0/src/lib.rs"];
    assert_eq!(names(&corpus, &folder), expected.map(|name| format!("registry/src/index-1/{name}")));
}

#[test]
fn a_cargo_home_without_sources_is_named() {
    let folder = Folder::new();
    let error = Corpus::from_cargo(LOCKFILE, folder.path()).unwrap_err();
    assert!(
        matches!(error, TrainerError::Unreadable { .. }) && error.to_string().contains("registry/src"),
        "{error}"
    );
    folder.write("registry/src/index-1/other-1.0.0/lib.rs", b"//");
    let error = Corpus::from_cargo(LOCKFILE, folder.path()).unwrap_err();
    assert!(error.to_string().contains("none of the lockfile's 3 packages"), "{error}");
}
