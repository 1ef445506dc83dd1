//! The device: which there are, their memory, and our own kernels.

pub(crate) mod memory;
pub(crate) mod movers;

use std::fmt;
use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, sys};

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
/// [`CudaError::NoDriver`] and [`CudaError::NoDevice`] when there is none, [`CudaError::Driver`] when one does not answer.
pub fn devices() -> Result<Vec<DeviceInfo>, CudaError> {
    // Without this check every call of the driver would panic where there is none.
    // SAFETY: loading the driver's library runs its initialisers, which any user of a GPU does.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    let count = CudaContext::device_count().map_err(|e| CudaError::NoDevice { message: e.to_string() })?;
    if count == 0 {
        return Err(CudaError::NoDevice { message: "it counts none".to_owned() });
    }
    (0..usize::try_from(count).unwrap_or(0)).map(|number| info(number, &*context(number)?)).collect()
}

/// Opens a device that can compute attention.
pub(crate) fn open(number: usize) -> Result<(Arc<CudaContext>, DeviceInfo), CudaError> {
    let count = devices()?.len();
    if number >= count {
        return Err(CudaError::DeviceNumber { device: number, count });
    }
    let context = context(number)?;
    let info = info(number, &context)?;
    let (major, minor) = info.compute;
    if major < 9 {
        return Err(CudaError::OldDevice { device: number, name: info.name, major, minor });
    }
    Ok((context, info))
}

fn context(number: usize) -> Result<Arc<CudaContext>, CudaError> {
    CudaContext::new(number).map_err(driver("cuDevicePrimaryCtxRetain"))
}

fn info(number: usize, context: &CudaContext) -> Result<DeviceInfo, CudaError> {
    Ok(DeviceInfo {
        number,
        name: context.name().map_err(driver("cuDeviceGetName"))?,
        compute: context.compute_capability().map_err(driver("cuDeviceGetAttribute"))?,
        memory_bytes: context.total_mem().map_err(driver("cuDeviceTotalMem"))?,
    })
}

/// Names the call of a driver's error.
pub(crate) fn driver(call: &'static str) -> impl FnOnce(DriverError) -> CudaError {
    move |error| CudaError::Driver { call, message: error.to_string() }
}
