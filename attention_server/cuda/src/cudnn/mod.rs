//! cuDNN's backend interface: the library, loaded at run time, and its descriptors.
//!
//! These bindings are our own because statuses must be integers ([`names`] says why), and small because the backend
//! interface is: everything is a descriptor with attributes.

pub(crate) mod names;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::Arc;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use names::{attribute, kind, value};

use crate::CudaError;

/// A descriptor, handle or device address as cuDNN takes it.
pub(crate) type Raw = *mut c_void;

/// The oldest version known to have every kernel that the graphs ask for.
const OLDEST: usize = 91_000;

/// The first version with a backward kernel for Hopper that sums dQ in a fixed order.
const FIRST_ORDERED: usize = 92_500;

/// cuDNN, loaded.
pub(crate) struct Cudnn {
    create_descriptor: unsafe extern "C" fn(c_int, *mut Raw) -> c_int,
    destroy_descriptor: unsafe extern "C" fn(Raw) -> c_int,
    set_attribute: unsafe extern "C" fn(Raw, c_int, c_int, i64, *const c_void) -> c_int,
    get_attribute: unsafe extern "C" fn(Raw, c_int, c_int, i64, *mut i64, *mut c_void) -> c_int,
    finalize: unsafe extern "C" fn(Raw) -> c_int,
    execute: unsafe extern "C" fn(Raw, Raw, Raw) -> c_int,
    create: unsafe extern "C" fn(*mut Raw) -> c_int,
    destroy: unsafe extern "C" fn(Raw) -> c_int,
    set_stream: unsafe extern "C" fn(Raw, Raw) -> c_int,
    last_error: unsafe extern "C" fn(*mut c_char, usize),
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    version: usize,
    /// Keeps the code above mapped.
    _libraries: Vec<Library>,
}

impl fmt::Debug for Cudnn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cudnn").field("version", &self.version).finish_non_exhaustive()
    }
}

/// What is loaded, in this order: cuDNN calls `abort` when it does not find cuBLASLt, and NVRTC its built-in functions
/// by name, so both are loaded first, for everyone.
const LIBRARIES: [(&str, &str); 4] = [
    ("libcublasLt.so.13", "nvidia-cublas"),
    ("libnvrtc-builtins.so.13.0", "nvidia-cuda-nvrtc"),
    ("libnvrtc.so.13", "nvidia-cuda-nvrtc"),
    ("libcudnn.so.9", "nvidia-cudnn-cu13"),
];

impl Cudnn {
    /// Loads cuDNN, and what it needs, from `folders` or else by the system's loader.
    pub(crate) fn load(folders: &[PathBuf]) -> Result<Arc<Cudnn>, CudaError> {
        let mut libraries = Vec::new();
        for (library, package) in LIBRARIES {
            match load(library, folders) {
                Ok(loaded) => libraries.push(loaded),
                // A later minor version of NVRTC brings its built-in functions under another name, beside itself.
                Err(_) if library.contains("builtins") => {}
                Err(message) => {
                    return Err(CudaError::Library { library, package, folders: folders.to_vec(), message });
                }
            }
        }
        let Some(cudnn) = libraries.last() else {
            return Err(CudaError::OldCudnn { found: "none".to_owned() });
        };
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the type is that of the function's declaration in cuDNN 9's header.
                *unsafe { cudnn.get($name.as_bytes()) }.map_err(|e| CudaError::Cudnn {
                    call: format!("loading {}", $name),
                    message: e.to_string(),
                })?
            };
        }
        let get_version: unsafe extern "C" fn() -> usize = symbol!("cudnnGetVersion");
        // SAFETY: it takes nothing and reads a constant.
        let version = unsafe { get_version() };
        if version < OLDEST {
            return Err(CudaError::OldCudnn { found: dotted(version) });
        }
        Ok(Arc::new(Cudnn {
            create_descriptor: symbol!("cudnnBackendCreateDescriptor"),
            destroy_descriptor: symbol!("cudnnBackendDestroyDescriptor"),
            set_attribute: symbol!("cudnnBackendSetAttribute"),
            get_attribute: symbol!("cudnnBackendGetAttribute"),
            finalize: symbol!("cudnnBackendFinalize"),
            execute: symbol!("cudnnBackendExecute"),
            create: symbol!("cudnnCreate"),
            destroy: symbol!("cudnnDestroy"),
            set_stream: symbol!("cudnnSetStream"),
            last_error: symbol!("cudnnGetLastErrorString"),
            error_string: symbol!("cudnnGetErrorString"),
            version,
            _libraries: libraries,
        }))
    }

    /// Whether it has a backward kernel that sums in a fixed order.
    pub(crate) fn can_order(&self) -> bool {
        self.version >= FIRST_ORDERED
    }

    /// The version, such as 9.19.0.
    pub(crate) fn version(&self) -> String {
        dotted(self.version)
    }

    fn check(&self, status: c_int, call: impl FnOnce() -> String) -> Result<(), CudaError> {
        if status == 0 {
            return Ok(());
        }
        let mut detail = [0u8; 2048];
        // SAFETY: the buffer has the length given, and cuDNN ends what it writes with a zero.
        unsafe { (self.last_error)(detail.as_mut_ptr().cast(), detail.len()) };
        // SAFETY: cuDNN returns a constant string for any status.
        let name = unsafe { (self.error_string)(status) };
        let name = if name.is_null() {
            format!("status {status}")
        } else {
            // SAFETY: as above; it is not null and ends with a zero.
            unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
        };
        let detail = CStr::from_bytes_until_nul(&detail).map(CStr::to_string_lossy).unwrap_or_default();
        Err(CudaError::Cudnn { call: call(), message: format!("{name} {detail}").trim_end().to_owned() })
    }
}

fn dotted(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

fn load(library: &str, folders: &[PathBuf]) -> Result<Library, String> {
    let mut message = String::new();
    let places = folders.iter().map(|folder| folder.join(library)).filter(|path| path.exists());
    for place in places.chain([Path::new(library).to_path_buf()]) {
        // SAFETY: these libraries have no initialisers that depend on the state of this process.
        match unsafe { Library::open(Some(&place), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(loaded) => return Ok(loaded),
            Err(error) => message = error.to_string(),
        }
    }
    Err(message)
}

/// A cuDNN handle: one for each thread that builds or executes plans.
#[derive(Debug)]
pub(crate) struct Handle {
    cudnn: Arc<Cudnn>,
    raw: Raw,
}

// SAFETY: a handle may be used by any thread, one at a time; `Handle` is not `Sync`.
unsafe impl Send for Handle {}

impl Handle {
    /// A handle for the context that is current on this thread.
    pub(crate) fn new(cudnn: &Arc<Cudnn>) -> Result<Handle, CudaError> {
        let mut raw = null_mut();
        // SAFETY: `raw` is written.
        cudnn.check(unsafe { (cudnn.create)(&mut raw) }, || "cudnnCreate".to_owned())?;
        Ok(Handle { cudnn: Arc::clone(cudnn), raw })
    }

    /// Lets all later work go to `stream`.
    ///
    /// # Safety
    /// `stream` must be a stream of the handle's context that lives until the handle is given another or dropped.
    pub(crate) unsafe fn set_stream(&self, stream: Raw) -> Result<(), CudaError> {
        // SAFETY: the handle is live; the caller vouches for the stream.
        self.cudnn.check(unsafe { (self.cudnn.set_stream)(self.raw, stream) }, || "cudnnSetStream".to_owned())
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle is live and not used again. A failure leaves nothing to be done.
        let _ = unsafe { (self.cudnn.destroy)(self.raw) };
    }
}

/// A backend descriptor.
#[derive(Debug)]
pub(crate) struct Descriptor {
    cudnn: Arc<Cudnn>,
    raw: Raw,
}

// SAFETY: descriptors belong to no thread; a finalized one is only read.
unsafe impl Send for Descriptor {}
// SAFETY: as above; nothing changes a descriptor through a shared reference once it is finalized, and before that it
// never leaves the thread that makes it.
unsafe impl Sync for Descriptor {}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: the descriptor is live and not used again.
        let _ = unsafe { (self.cudnn.destroy_descriptor)(self.raw) };
    }
}

/// Rust types of attribute values.
///
/// # Safety
/// `TYPE` must name the type whose C form `Self` has.
pub(crate) unsafe trait Value: Copy {
    /// The attribute type's number.
    const TYPE: i32;
}

// SAFETY: an `int64_t`.
unsafe impl Value for i64 {
    const TYPE: i32 = value::INT64;
}

// SAFETY: cuDNN reads one byte, zero or one.
unsafe impl Value for bool {
    const TYPE: i32 = value::BOOLEAN;
}

// SAFETY: a C double.
unsafe impl Value for f64 {
    const TYPE: i32 = value::DOUBLE;
}

// SAFETY: characters.
unsafe impl Value for u8 {
    const TYPE: i32 = value::CHAR;
}

// SAFETY: a C enumeration of an `int`'s size.
unsafe impl Value for names::DataType {
    const TYPE: i32 = value::DATA_TYPE;
}

// SAFETY: a C enumeration of an `int`'s size.
unsafe impl Value for names::Pointwise {
    const TYPE: i32 = value::POINTWISE_MODE;
}

// SAFETY: a C enumeration of an `int`'s size.
unsafe impl Value for names::Reduction {
    const TYPE: i32 = value::REDUCTION_OPERATOR;
}

impl Descriptor {
    /// An empty descriptor of a kind of [`names::kind`].
    pub(crate) fn new(cudnn: &Arc<Cudnn>, kind: i32) -> Result<Descriptor, CudaError> {
        let mut raw = null_mut();
        // SAFETY: `raw` is written.
        let status = unsafe { (cudnn.create_descriptor)(kind, &mut raw) };
        cudnn.check(status, || format!("creating a descriptor of kind {kind}"))?;
        Ok(Descriptor { cudnn: Arc::clone(cudnn), raw })
    }

    /// Sets an attribute to some values.
    pub(crate) fn set<T: Value>(&self, attribute: i32, values: &[T]) -> Result<&Self, CudaError> {
        // SAFETY: `T` has the C form that its type number says.
        unsafe { self.set_raw(attribute, T::TYPE, values) }
    }

    /// Sets an attribute to an integer of a C enumeration other than those of [`Value`].
    pub(crate) fn set_enum(&self, attribute: i32, kind: i32, value: i32) -> Result<&Self, CudaError> {
        // SAFETY: a C enumeration has an `int`'s size.
        unsafe { self.set_raw(attribute, kind, &[value]) }
    }

    /// Sets an attribute to descriptors, which cuDNN copies.
    pub(crate) fn set_descriptors(&self, attribute: i32, values: &[&Descriptor]) -> Result<&Self, CudaError> {
        let raw: Vec<Raw> = values.iter().map(|d| d.raw).collect();
        // SAFETY: the pointers are live descriptors.
        unsafe { self.set_raw(attribute, value::DESCRIPTOR, &raw) }
    }

    /// Sets an attribute to a handle.
    pub(crate) fn set_handle(&self, attribute: i32, handle: &Handle) -> Result<&Self, CudaError> {
        // SAFETY: the handle is live.
        unsafe { self.set_raw(attribute, value::HANDLE, &[handle.raw]) }
    }

    /// # Safety
    /// `values` must have the C form of the type `kind`, and pointers in it must be live for as long as the descriptor
    /// is used.
    unsafe fn set_raw<T>(&self, attribute: i32, kind: i32, values: &[T]) -> Result<&Self, CudaError> {
        let (count, data) = (values.len() as i64, values.as_ptr().cast());
        // SAFETY: the caller vouches for the values; cuDNN copies them.
        let status = unsafe { (self.cudnn.set_attribute)(self.raw, attribute, kind, count, data) };
        self.cudnn.check(status, || format!("setting attribute {attribute}"))?;
        Ok(self)
    }

    /// Ends the setting of attributes. `what` is named in errors.
    pub(crate) fn finalize(&self, what: impl FnOnce() -> String) -> Result<(), CudaError> {
        // SAFETY: the descriptor is live.
        self.cudnn.check(unsafe { (self.cudnn.finalize)(self.raw) }, what)
    }

    /// An attribute of one value.
    pub(crate) fn get<T: Value + Default>(&self, attribute: i32) -> Result<T, CudaError> {
        self.get_as(attribute, T::TYPE)
    }

    /// An attribute that is an integer of a C enumeration.
    pub(crate) fn get_enum(&self, attribute: i32, kind: i32) -> Result<i32, CudaError> {
        self.get_as(attribute, kind)
    }

    fn get_as<T: Default>(&self, attribute: i32, kind: i32) -> Result<T, CudaError> {
        let (mut count, mut out) = (0, T::default());
        // SAFETY: `out` has room for the one value that is asked for.
        let status = unsafe {
            (self.cudnn.get_attribute)(self.raw, attribute, kind, 1, &mut count, (&raw mut out).cast())
        };
        self.cudnn.check(status, || format!("reading attribute {attribute}"))?;
        Ok(out)
    }

    /// An attribute that is text.
    pub(crate) fn text(&self, attribute: i32) -> Result<String, CudaError> {
        let mut count = 0;
        let call = || format!("reading attribute {attribute}");
        // SAFETY: with no room for values, cuDNN writes their number alone.
        let status = unsafe {
            (self.cudnn.get_attribute)(self.raw, attribute, value::CHAR, 0, &mut count, null_mut())
        };
        self.cudnn.check(status, call)?;
        let mut text = vec![0u8; usize::try_from(count).unwrap_or(0)];
        // SAFETY: the buffer has room for `count` characters.
        let status = unsafe {
            (self.cudnn.get_attribute)(
                self.raw,
                attribute,
                value::CHAR,
                count,
                &mut count,
                text.as_mut_ptr().cast(),
            )
        };
        self.cudnn.check(status, call)?;
        Ok(String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned())
    }

    /// An attribute that is a list of descriptors of one kind, at most `max`.
    pub(crate) fn list(&self, attribute: i32, kind: i32, max: usize) -> Result<Vec<Descriptor>, CudaError> {
        let mut list = Vec::with_capacity(max);
        for _ in 0..max {
            list.push(Descriptor::new(&self.cudnn, kind)?);
        }
        let mut raw: Vec<Raw> = list.iter().map(|d| d.raw).collect();
        let (mut count, room) = (0, raw.len() as i64);
        // SAFETY: there is room for `room` descriptors, all of them live; cuDNN fills them.
        let status = unsafe {
            (self.cudnn.get_attribute)(
                self.raw,
                attribute,
                value::DESCRIPTOR,
                room,
                &mut count,
                raw.as_mut_ptr().cast(),
            )
        };
        self.cudnn.check(status, || format!("reading attribute {attribute}"))?;
        list.truncate(usize::try_from(count).unwrap_or(0));
        Ok(list)
    }
}

/// Device properties as cuDNN writes them down: what plans are built for.
pub(crate) fn device_properties(cudnn: &Arc<Cudnn>, handle: &Handle) -> Result<String, CudaError> {
    let properties = Descriptor::new(cudnn, kind::DEVICE_PROPERTIES)?;
    properties.set_handle(attribute::DEVICE_HANDLE, handle)?;
    properties.finalize(|| "reading the device's properties".to_owned())?;
    properties.text(attribute::DEVICE_JSON)
}

/// Enqueues a plan on the handle's stream.
///
/// # Safety
/// `tensors` must hold, for every tensor of the plan's graph, an address of memory of the tensor's size on the handle's
/// device, or on the host for scalars; `workspace` that of as many bytes as the plan says. All of it must stay until the
/// stream has passed this point; scalars are read before the call returns.
pub(crate) unsafe fn execute(
    handle: &Handle,
    plan: &Descriptor,
    tensors: (&[i64], &[Raw]),
    workspace: Raw,
) -> Result<(), CudaError> {
    let cudnn = &handle.cudnn;
    let pack = Descriptor::new(cudnn, kind::VARIANT_PACK)?;
    pack.set(attribute::PACK_IDS, tensors.0)?;
    // SAFETY: the caller vouches for the addresses, which the pack holds no longer than this call.
    unsafe {
        pack.set_raw(attribute::PACK_POINTERS, value::POINTER, tensors.1)?;
        pack.set_raw(attribute::PACK_WORKSPACE, value::POINTER, &[workspace])?;
    }
    pack.finalize(|| "gathering the tensors of a call".to_owned())?;
    // SAFETY: handle, plan and pack are live; the caller vouches for the memory.
    let status = unsafe { (cudnn.execute)(handle.raw, plan.raw, pack.raw) };
    // Unlike everything before, this can fail for what has happened on the device.
    cudnn
        .check(status, || "executing a plan".to_owned())
        .map_err(|error| CudaError::Driver { call: "cudnnBackendExecute", message: error.to_string() })
}
