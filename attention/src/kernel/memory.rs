//! Cache-line aligned buffers that are kept for reuse.

use std::sync::{Mutex, PoisonError};

/// Elements of a cache line.
const LINE: usize = 16;

#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

/// A buffer of f32 on cache-line boundaries. It only ever grows; its content is whatever was last written.
#[derive(Debug, Default)]
pub(super) struct Buffer(Vec<Line>);

impl Buffer {
    /// At least `len` elements, any content.
    pub(super) fn of(&mut self, len: usize) -> &mut [f32] {
        let lines = len.div_ceil(LINE);
        if self.0.len() < lines {
            self.0 = vec![Line([0.0; LINE]); lines];
        }
        // SAFETY: `Line` is exactly 16 f32 in memory, without padding, and the length counts initialised lines.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * LINE) }
    }

    /// All elements.
    pub(super) fn as_slice(&self) -> &[f32] {
        // SAFETY: as in `of`.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * LINE) }
    }
}

/// Hands out consecutive pieces of a buffer, each on a cache-line boundary.
pub(super) struct Carver<'a>(&'a mut [f32]);

impl<'a> Carver<'a> {
    pub(super) fn new(buffer: &'a mut Buffer, len: usize) -> Self {
        Carver(buffer.of(len))
    }

    /// Elements that a piece of `len` elements takes.
    pub(super) fn room(len: usize) -> usize {
        len.next_multiple_of(LINE)
    }

    /// The next `len` elements.
    pub(super) fn take(&mut self, len: usize) -> &'a mut [f32] {
        let (piece, rest) = std::mem::take(&mut self.0).split_at_mut(Self::room(len));
        self.0 = rest;
        &mut piece[..len]
    }
}

/// Buffers that no one uses at the moment.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<Vec<Buffer>>);

impl Pool {
    /// A buffer of at least `len` elements, any content: the smallest that fits, else the largest, grown.
    pub(super) fn take(&self, len: usize) -> Buffer {
        let mut buffer = {
            let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let capacity = |n: usize| free[n].0.len() * LINE;
            let fit = (0..free.len()).filter(|n| capacity(*n) >= len).min_by_key(|n| capacity(*n));
            match fit.or_else(|| (0..free.len()).max_by_key(|n| capacity(*n))) {
                Some(n) => free.swap_remove(n),
                None => Buffer::default(),
            }
        };
        buffer.of(len);
        buffer
    }

    pub(super) fn give_back(&self, buffer: Buffer) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }
}
