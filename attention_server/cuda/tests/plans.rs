//! Graphs and plans by the real cuDNN, with a stub for the driver: everything but running them.
//!
//! `tests/cuda_libraries` fetches the libraries. Without them these tests do nothing but say so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod stub_driver;

use std::path::PathBuf;

use outboard_attention::{DType, HeadGeometry, HeadShape};
use outboard_cuda::{AheadPlan, CudaConfig, CudaError, CudaKernel, devices, plan_ahead};

fn geometry(group: usize, dim: usize, dtype: DType) -> HeadGeometry {
    let shape = HeadGeometry::standard(2 * group, 2, dim).unwrap().shape();
    HeadShape { dtype, ..shape }.try_into().unwrap()
}

/// The folders of the libraries, with the stub driver loaded; `None`, and a line, without them.
fn libraries() -> Option<Vec<PathBuf>> {
    let folders = stub_driver::library_folders();
    if folders.is_none() {
        println!("not run: tests/cuda_libraries has not fetched the libraries");
    }
    stub_driver::load();
    folders
}

fn check(properties: &str, geometry: HeadGeometry) {
    let Some(libraries) = libraries() else { return };
    let plans = plan_ahead(&libraries, properties.trim(), None, &geometry, true).unwrap();
    // Two directions, two masks, tensors in place or not.
    assert_eq!(plans.len(), 8);
    for plan in plans {
        assert!(plan.deterministic, "{plan:?}");
        assert!(plan.workspace < 16 << 20, "{plan:?}");
    }
}

#[test]
fn a_usual_geometry_has_fast_kernels() {
    check(stub_driver::H100, geometry(4, 128, DType::Bf16));
}

#[test]
fn an_odd_geometry_has_fast_kernels() {
    check(stub_driver::H200, geometry(3, 80, DType::F16));
}

#[test]
fn a_large_head_without_a_group_has_fast_kernels() {
    check(stub_driver::H100, geometry(1, 256, DType::Bf16));
}

#[test]
fn the_order_of_sums_is_a_choice() {
    let Some(libraries) = libraries() else { return };
    let made = |deterministic| {
        plan_ahead(&libraries, stub_driver::H100.trim(), None, &geometry(4, 128, DType::Bf16), deterministic)
            .unwrap()
    };
    let [ordered, fastest] = [made(true), made(false)];
    let backward = |plans: &[AheadPlan]| plans.iter().filter(|p| !p.deterministic).count();
    // Two masks in a fixed order, three by the fastest kernel; tensors in place or not.
    assert_eq!((backward(&ordered), backward(&fastest)), (0, 6));
    assert_eq!(ordered[..4], fastest[..4]);
}

#[test]
fn plans_are_kept_and_spoiled_files_are_not_used() {
    let Some(libraries) = libraries() else { return };
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("plans-{}", std::process::id()));
    let make = || {
        let geometry = geometry(4, 128, DType::Bf16);
        plan_ahead(&libraries, stub_driver::H100.trim(), Some(&folder), &geometry, true).unwrap()
    };
    let first = make();
    let files = || std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).collect::<Vec<_>>();
    // For each direction and mask, the choice of an engine and two plans.
    assert_eq!(files().len(), 12);
    let stamps = |path: &PathBuf| std::fs::metadata(path).unwrap().modified().unwrap();
    let written: Vec<_> = files().iter().map(stamps).collect();
    assert_eq!(make(), first);
    assert_eq!(files().iter().map(stamps).collect::<Vec<_>>(), written, "plans were built again");
    for path in files() {
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() / 3]).unwrap();
    }
    assert_eq!(make(), first);
    assert!(files().iter().all(|path| std::fs::read_to_string(path).unwrap().ends_with('}')));
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn errors_say_what_to_install() {
    let bf16 = geometry(4, 128, DType::Bf16);
    let error = plan_ahead(&[], "{}", None, &geometry(4, 128, DType::F32), true).unwrap_err();
    assert!(matches!(error, CudaError::DType { dtype: DType::F32 }), "{error}");
    let softcap = HeadShape { softcap: Some(30.0), ..bf16.shape() }.try_into().unwrap();
    assert!(matches!(CudaKernel::supports(&softcap), Err(CudaError::Softcap { .. })));
    let Some(libraries) = libraries() else { return };
    let error = plan_ahead(&libraries, "not JSON", None, &bf16, true).unwrap_err();
    assert!(!error.to_string().is_empty());
    // The stub driver has no device.
    let config = CudaConfig { libraries, ..CudaConfig::new(0) };
    let error = CudaKernel::new(config).unwrap_err();
    assert!(matches!(error, CudaError::NoDevice { .. }), "{error}");
    assert!(error.to_string().contains("nvidia-smi"), "{error}");
    assert!(devices().is_err());
}

#[test]
fn a_missing_library_is_named() {
    let empty = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let bf16 = geometry(4, 128, DType::Bf16);
    // Where the system's loader has it, or another test of this process loaded it, it is not missing.
    if stub_driver::is_loadable("libcublasLt.so.13") {
        println!("not run: libcublasLt.so.13 is there");
        return;
    }
    let error = plan_ahead(&[empty], stub_driver::H100.trim(), None, &bf16, true).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("libcublasLt.so.13") && text.contains("nvidia-cublas"), "{text}");
}
