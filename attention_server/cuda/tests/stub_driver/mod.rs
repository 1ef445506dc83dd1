//! What tests of CUDA code need on a machine without a GPU: a driver that has no device, and where the libraries are.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]
#![allow(unsafe_code, reason = "a library is loaded")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// An H100's properties, as cuDNN writes them.
pub const H100: &str = include_str!("h100.json");
/// An H200's properties, as cuDNN writes them.
pub const H200: &str = include_str!("h200.json");

const SOURCE: &str = include_str!("stub.c");

/// Makes the stub driver the one that this process uses, and returns its path.
///
/// The stub is loaded under the name `libcuda.so.1`, so whoever opens that name from now on gets the stub. (cudarc tries
/// `libcuda.so` first, so where a real driver has that name too, cudarc uses the real one and only cuDNN the stub.) It
/// stays loaded until the process ends, since cuDNN and cudarc keep what they found in it. Call this before anything
/// opens the driver.
pub fn load() -> PathBuf {
    static LOADED: OnceLock<(Library, PathBuf)> = OnceLock::new();
    let (_, path) = LOADED.get_or_init(|| {
        let path = compiled();
        // SAFETY: the stub runs nothing when it is loaded, and a static keeps it from ever being unloaded.
        let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) };
        (
            library.unwrap_or_else(|error| panic!("cannot load the stub driver {}: {error}", path.display())),
            path,
        )
    });
    path.clone()
}

/// Whether the system's loader finds a library, or has it already.
pub fn is_loadable(name: &str) -> bool {
    // SAFETY: the CUDA libraries have no initialisers that depend on the state of this process.
    unsafe { Library::open(Some(name), RTLD_NOW) }.is_ok()
}

/// Folders with the CUDA libraries: those that `OUTBOARD_CUDA_LIBRARIES` names, separated by colons, or else the one
/// that `tests/cuda_libraries` fills, if it has.
pub fn library_folders() -> Option<Vec<PathBuf>> {
    if let Some(named) = std::env::var_os("OUTBOARD_CUDA_LIBRARIES").filter(|named| !named.is_empty()) {
        return Some(std::env::split_paths(&named).collect());
    }
    let filled = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/cuda-libraries");
    filled.join("stamp").exists().then(|| vec![filled])
}

/// Compiles the stub unless this source was compiled before. Each test is a process of its own, and many start at once:
/// each compiles to a name of its own and renames, so that none ever sees half a library.
fn compiled() -> PathBuf {
    let mut hasher = DefaultHasher::new();
    SOURCE.hash(&mut hasher);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("stub_driver-{:016x}", hasher.finish()));
    let library = folder.join("libcuda.so.1");
    if library.exists() {
        return library;
    }
    std::fs::create_dir_all(&folder)
        .unwrap_or_else(|error| panic!("cannot create {}: {error}", folder.display()));
    let unfinished = folder.join(format!("{}.unfinished", std::process::id()));
    let mut compiler = Command::new("cc")
        .args("-std=c11 -Wall -Wextra -Werror -O1 -shared -fPIC -Wl,-soname,libcuda.so.1 -o".split(' '))
        .arg(&unfinished)
        .args(["-x", "c", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("the stub driver is compiled with cc, which cannot be started");
    compiler.stdin.take().unwrap().write_all(SOURCE.as_bytes()).expect("cc stopped reading the stub driver");
    let status = compiler.wait().unwrap();
    assert!(status.success(), "cc cannot compile the stub driver: {status}");
    std::fs::rename(&unfinished, &library).unwrap_or_else(|error| {
        panic!("cannot rename {} to {}: {error}", unfinished.display(), library.display())
    });
    library
}
