//! Memory of the device and pinned memory of the host, which grow as batches need.

use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, result, sys};

use super::driver;
use crate::CudaError;

/// Memory grows in steps of this.
const STEP: usize = 2 << 20;

/// Device memory.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    context: Arc<CudaContext>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

impl DeviceMemory {
    /// None yet.
    pub(crate) fn new(context: &Arc<CudaContext>) -> DeviceMemory {
        DeviceMemory { context: Arc::clone(context), address: 0, bytes: 0 }
    }

    /// Makes room for `bytes`. What was there is lost when it grows; nothing that is enqueued may use it any more.
    pub(crate) fn reserve(&mut self, bytes: usize) -> Result<(), CudaError> {
        if bytes <= self.bytes {
            return Ok(());
        }
        let grown = grown(bytes, "device")?;
        self.free();
        self.context.bind_to_thread().map_err(driver("cuCtxSetCurrent"))?;
        // SAFETY: plain allocation; it is freed once, by `free`.
        let allocated = unsafe { result::malloc_sync(grown) };
        self.address = allocated.map_err(|e| CudaError::Memory {
            bytes: grown,
            place: "device",
            message: e.to_string(),
        })?;
        self.bytes = grown;
        Ok(())
    }

    /// The device address of byte `offset`.
    pub(crate) fn at(&self, offset: usize) -> sys::CUdeviceptr {
        self.address + offset as sys::CUdeviceptr
    }

    fn free(&mut self) {
        if self.bytes > 0 {
            // SAFETY: it was allocated by `reserve`; freeing waits for what is enqueued. On a lost device nothing can be
            // done about a failure.
            let _ = self.context.bind_to_thread().map(|()| unsafe { result::free_sync(self.address) });
        }
        (self.address, self.bytes) = (0, 0);
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        self.free();
    }
}

/// Pinned memory of the host, which the device reads and writes by itself.
#[derive(Debug)]
pub(crate) struct PinnedMemory {
    context: Arc<CudaContext>,
    address: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it is plain memory, owned by this value alone.
unsafe impl Send for PinnedMemory {}

impl PinnedMemory {
    /// None yet.
    pub(crate) fn new(context: &Arc<CudaContext>) -> PinnedMemory {
        PinnedMemory { context: Arc::clone(context), address: NonNull::dangling(), bytes: 0 }
    }

    /// Makes room for `bytes`. What was there is lost when it grows; nothing that is enqueued may use it any more.
    pub(crate) fn reserve(&mut self, bytes: usize) -> Result<(), CudaError> {
        if bytes <= self.bytes {
            return Ok(());
        }
        let grown = grown(bytes, "pinned host")?;
        self.free();
        self.context.bind_to_thread().map_err(driver("cuCtxSetCurrent"))?;
        let failed = |message: String| CudaError::Memory { bytes: grown, place: "pinned host", message };
        // SAFETY: plain allocation, cached as usual since the host reads it; it is freed once, by `free`.
        let address = unsafe { result::malloc_host(grown, 0) }.map_err(|e| failed(e.to_string()))?;
        self.address = NonNull::new(address.cast()).ok_or_else(|| failed("no address".to_owned()))?;
        self.bytes = grown;
        Ok(())
    }

    /// The bytes.
    ///
    /// # Safety
    /// The device must not be writing them.
    pub(crate) unsafe fn slice(&self) -> &[u8] {
        // SAFETY: the memory is live and of this size; the system zeroed it for the driver; any byte is a `u8`. The caller vouches for the device.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.bytes) }
    }

    /// The bytes, to be written.
    ///
    /// # Safety
    /// The device must be neither reading nor writing them.
    pub(crate) unsafe fn slice_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.bytes) }
    }

    fn free(&mut self) {
        if self.bytes > 0 {
            let address = self.address.as_ptr().cast();
            // SAFETY: it was allocated by `reserve`. On a lost device nothing can be done about a failure.
            let _ = self.context.bind_to_thread().map(|()| unsafe { result::free_host(address) });
        }
        (self.address, self.bytes) = (NonNull::dangling(), 0);
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        self.free();
    }
}

/// An eighth more than asked for, so that batches of slowly growing size do not each allocate.
fn grown(bytes: usize, place: &'static str) -> Result<usize, CudaError> {
    let grown = bytes.checked_add(bytes / 8).and_then(|bytes| bytes.checked_next_multiple_of(STEP));
    let fits = grown.filter(|bytes| isize::try_from(*bytes).is_ok());
    fits.ok_or_else(|| CudaError::Memory { bytes, place, message: "no machine has so many".to_owned() })
}

/// Enqueues a copy of the first `bytes` to the device.
///
/// # Safety
/// Both must be at least that large and stay as they are until the stream has passed this point.
pub(crate) unsafe fn upload(
    stream: &CudaStream,
    from: &PinnedMemory,
    to: &DeviceMemory,
    bytes: usize,
) -> Result<(), CudaError> {
    assert!(bytes <= from.bytes && bytes <= to.bytes, "an upload beyond its memory");
    // SAFETY: the caller vouches for both ends.
    let copied = unsafe {
        let source = std::slice::from_raw_parts(from.address.as_ptr(), bytes);
        result::memcpy_htod_async(to.at(0), source, stream.cu_stream())
    };
    copied.map_err(driver("cuMemcpyHtoDAsync"))
}

/// Enqueues a copy of the first `bytes` to the host.
///
/// # Safety
/// As for [`upload`]; and nobody may read the host's memory until then.
pub(crate) unsafe fn download(
    stream: &CudaStream,
    from: &DeviceMemory,
    to: &mut PinnedMemory,
    bytes: usize,
) -> Result<(), CudaError> {
    assert!(bytes <= from.bytes && bytes <= to.bytes, "a download beyond its memory");
    // SAFETY: the caller vouches for both ends.
    let copied = unsafe {
        let target = std::slice::from_raw_parts_mut(to.address.as_ptr(), bytes);
        result::memcpy_dtoh_async(target, from.at(0), stream.cu_stream())
    };
    copied.map_err(driver("cuMemcpyDtoHAsync"))
}
