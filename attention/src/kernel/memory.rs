//! Aligned working memory, kept for reuse.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes of a cache line, which every buffer and piece is aligned to.
const LINE: usize = 64;
/// Elements of a cache line.
const LINE_ELEMENTS: usize = LINE / size_of::<f32>();
/// Bytes of a huge page of x86-64 and of most other systems; large buffers are aligned to it and ask for them.
const HUGE_PAGE: usize = 2 << 20;

/// A buffer of f32 on cache-line boundaries. It only ever grows; its content is whatever was last written.
#[derive(Debug)]
pub(super) struct Buffer {
    data: NonNull<f32>,
    /// Elements, a multiple of a cache line.
    len: usize,
}

// SAFETY: it owns its memory, which any thread may use and free.
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for Buffer {}

impl Default for Buffer {
    fn default() -> Self {
        Buffer { data: NonNull::dangling(), len: 0 }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.len) {
            // SAFETY: the memory was allocated with this layout, which depends on the length alone.
            unsafe { dealloc(self.data.as_ptr().cast(), layout) }
        }
    }
}

impl Buffer {
    /// The layout of `len` elements, `None` for no elements.
    fn layout(len: usize) -> Option<Layout> {
        let bytes = len.checked_mul(size_of::<f32>())?;
        let align = if bytes >= 2 * HUGE_PAGE { HUGE_PAGE } else { LINE };
        (bytes > 0).then(|| Layout::from_size_align(bytes, align).ok())?
    }

    /// Makes room for `len` elements. Aborts when memory runs out.
    pub(super) fn grow(&mut self, len: usize) {
        if len <= self.len {
            return;
        }
        *self = Buffer::default();
        let len = len.next_multiple_of(LINE_ELEMENTS);
        let Some(layout) = Self::layout(len) else {
            handle_alloc_error(Layout::new::<[f32; LINE_ELEMENTS]>());
        };
        // SAFETY: the layout has a size above zero.
        let Some(data) = NonNull::new(unsafe { alloc(layout) }) else { handle_alloc_error(layout) };
        advise_huge_pages(data, layout);
        // SAFETY: the memory was just allocated with this size.
        unsafe { data.write_bytes(0, layout.size()) }
        *self = Buffer { data: data.cast(), len };
    }

    /// At least `len` elements, any content.
    pub(super) fn of(&mut self, len: usize) -> &mut [f32] {
        self.grow(len);
        // SAFETY: the memory holds `len` elements, initialised when allocated, and is borrowed with the buffer.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }

    pub(super) fn address(&self) -> *mut f32 {
        self.data.as_ptr()
    }

    pub(super) fn bytes(&self) -> usize {
        self.len * size_of::<f32>()
    }
}

/// Fewer misses of the address cache: packed keys and tiles are read over and over.
#[cfg(all(target_os = "linux", not(miri)))]
fn advise_huge_pages(data: NonNull<u8>, layout: Layout) {
    if layout.align() == HUGE_PAGE {
        // SAFETY: advice about memory that was just allocated; it changes no content. Where the system does not take
        // it, pages stay small, which is only slower.
        let _ = unsafe {
            rustix::mm::madvise(data.as_ptr().cast(), layout.size(), rustix::mm::Advice::LinuxHugepage)
        };
    }
}

#[cfg(not(all(target_os = "linux", not(miri))))]
fn advise_huge_pages(_data: NonNull<u8>, _layout: Layout) {}

/// Hands out consecutive pieces of a buffer, each on a cache-line boundary.
pub(super) struct Carver<'a>(&'a mut [f32]);

impl<'a> Carver<'a> {
    pub(super) fn new(buffer: &'a mut Buffer, len: usize) -> Self {
        Carver(buffer.of(len))
    }

    /// Elements that a piece of `len` elements takes.
    pub(super) fn room(len: usize) -> usize {
        len.next_multiple_of(LINE_ELEMENTS)
    }

    /// The next `len` elements.
    pub(super) fn take(&mut self, len: usize) -> &'a mut [f32] {
        let (piece, rest) = std::mem::take(&mut self.0).split_at_mut(Self::room(len));
        self.0 = rest;
        &mut piece[..len]
    }
}

/// Buffers that threads share: as many as were reserved, and who finds none waits for one.
#[derive(Debug, Default)]
pub(super) struct Pool {
    state: Mutex<PoolState>,
    returned: Condvar,
}

#[derive(Debug, Default)]
struct PoolState {
    free: Vec<Buffer>,
    /// No one will give a buffer back any more.
    abandoned: bool,
}

impl Pool {
    /// Holds exactly `count` buffers of at least `len` elements from now on.
    pub(super) fn reserve(&self, count: usize, len: usize) {
        let mut state = self.lock();
        state.abandoned = false;
        state.free.resize_with(count, Buffer::default);
        for buffer in &mut state.free {
            buffer.grow(len);
        }
    }

    /// A buffer that was reserved, as soon as one is free; `None` once the pool is abandoned.
    pub(super) fn take(&self) -> Option<Buffer> {
        let mut state = self.lock();
        loop {
            if state.abandoned {
                return None;
            }
            if let Some(buffer) = state.free.pop() {
                return Some(buffer);
            }
            state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn give_back(&self, buffer: Buffer) {
        self.lock().free.push(buffer);
        self.returned.notify_one();
    }

    /// Lets no one wait for a buffer that a thread which panicked has.
    pub(super) fn abandon(&self) {
        self.lock().abandoned = true;
        self.returned.notify_all();
    }

    /// Bytes of the largest buffer there.
    pub(super) fn largest(&self) -> usize {
        self.lock().free.iter().map(Buffer::bytes).max().unwrap_or(0)
    }

    /// Bytes of the buffers there.
    pub(super) fn bytes(&self) -> usize {
        self.lock().free.iter().map(Buffer::bytes).sum()
    }

    fn lock(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
