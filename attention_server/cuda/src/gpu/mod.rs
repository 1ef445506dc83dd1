//! The device: which there are, their memory, and our own kernels.

pub(crate) mod memory;
pub(crate) mod movers;

use std::fmt;
use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, result, sys};

use crate::CudaError;

/// A GPU of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number, as in `cuda:0`.
    pub number: usize,
    /// Its name, such as "NVIDIA H200".
    pub name: String,
    /// Compute capability, major and minor.
    pub compute: (i32, i32),
    /// Its streaming multiprocessors.
    pub processors: usize,
    /// Bytes of its memory.
    pub memory_bytes: usize,
}

impl fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{} ({}, {} GiB)", self.number, self.name, self.memory_bytes >> 30)
    }
}

/// The GPUs of this machine.
///
/// # Errors
/// [`CudaError::NoDriver`], [`CudaError::OldDriver`] and [`CudaError::NoDevice`] when there is none that can be used,
/// [`CudaError::Driver`] when one does not answer.
pub fn devices() -> Result<Vec<DeviceInfo>, CudaError> {
    (0..count()?).map(info).collect()
}

/// How many GPUs there are, at least one.
fn count() -> Result<usize, CudaError> {
    // Without this check every call of the driver would panic where there is none.
    // SAFETY: loading the driver's library runs its initialisers, which any user of a GPU does.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    let count = CudaContext::device_count().map_err(|e| CudaError::NoDevice { message: e.to_string() })?;
    if count == 0 {
        return Err(CudaError::NoDevice { message: "it counts none".to_owned() });
    }
    let mut version = 0;
    // SAFETY: `version` is written.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(driver("cuDriverGetVersion"))?;
    if version < OLDEST_DRIVER {
        return Err(CudaError::OldDriver { found: format!("{}.{}", version / 1000, version / 10 % 100) });
    }
    Ok(usize::try_from(count).unwrap_or(0))
}

/// The oldest driver, as it counts versions of CUDA: older ones lack functions that are called.
const OLDEST_DRIVER: i32 = 13_000;

/// Opens a device that can compute attention. Others are not touched.
pub(crate) fn open(number: usize) -> Result<(Arc<CudaContext>, DeviceInfo), CudaError> {
    let count = count()?;
    if number >= count {
        return Err(CudaError::DeviceNumber { device: number, count });
    }
    let info = info(number)?;
    let (major, minor) = info.compute;
    if major < 9 {
        return Err(CudaError::OldDevice { device: number, name: info.name, major, minor });
    }
    if (major, minor) != (9, 0) {
        tracing::warn!(device = %info, "this backend was tried on compute capability 9.0 only");
    }
    Ok((CudaContext::new(number).map_err(driver("cuDevicePrimaryCtxRetain"))?, info))
}

fn info(number: usize) -> Result<DeviceInfo, CudaError> {
    use sys::CUdevice_attribute as Attribute;
    let device = result::device::get(number as i32).map_err(driver("cuDeviceGet"))?;
    let attribute = |attribute| {
        // SAFETY: the device was named by the driver.
        unsafe { result::device::get_attribute(device, attribute) }.map_err(driver("cuDeviceGetAttribute"))
    };
    Ok(DeviceInfo {
        number,
        name: result::device::get_name(device).map_err(driver("cuDeviceGetName"))?,
        compute: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        processors: usize::try_from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?)
            .unwrap_or(0),
        // SAFETY: as above.
        memory_bytes: unsafe { result::device::total_mem(device) }.map_err(driver("cuDeviceTotalMem"))?,
    })
}

/// Names the call of a driver's error.
pub(crate) fn driver(call: &'static str) -> impl FnOnce(DriverError) -> CudaError {
    move |error| CudaError::Driver { call, message: error.to_string(), lost: is_sticky(error) }
}

/// Errors after which a context is of no use. Comparing numbers, since a newer driver may have others.
fn is_sticky(DriverError(code): DriverError) -> bool {
    const STICKY: [u32; 14] = [46, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719];
    STICKY.contains(&(code as u32)) || code as u32 == 999
}

/// Waits until nothing is under way on the device, whatever failed before.
pub(crate) fn settle(context: &CudaContext) -> Result<(), CudaError> {
    // An error that some earlier release left behind would stand for this call's own.
    if let Err(error) = context.check_err() {
        tracing::warn!(%error, "an earlier call of the driver had failed");
    }
    context.synchronize().map_err(driver("cuCtxSynchronize"))
}
