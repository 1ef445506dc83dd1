//! Half-open ranges of tokens or heads.

use std::fmt;
use std::ops::Range;

/// A half-open range `[start, end)` of token positions or head indices.
///
/// Unlike [`Range`] it is `Copy`, compares by start then end, and can never run backwards.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Span {
    start: usize,
    end: usize,
}

impl Span {
    /// The range `[start, end)`, or `None` when it would run backwards. An empty span is allowed.
    pub fn new(start: usize, end: usize) -> Option<Span> {
        (start <= end).then_some(Span { start, end })
    }

    /// The range `[0, end)`.
    pub fn to(end: usize) -> Span {
        Span { start: 0, end }
    }

    /// `len` elements from `start`. Saturates at the largest index.
    pub fn at(start: usize, len: usize) -> Span {
        Span { start, end: start.saturating_add(len) }
    }

    /// First element.
    pub fn start(self) -> usize {
        self.start
    }

    /// One past the last element.
    pub fn end(self) -> usize {
        self.end
    }

    /// Number of elements.
    pub fn len(self) -> usize {
        self.end - self.start
    }

    /// True when the span holds nothing.
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// True when `index` lies inside.
    pub fn contains(self, index: usize) -> bool {
        self.start <= index && index < self.end
    }

    /// True when `other` lies wholly inside. An empty span lies inside where its start does, or at the end.
    pub fn covers(self, other: Span) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// What both hold; empty when they do not meet.
    pub fn intersect(self, other: Span) -> Span {
        let start = self.start.max(other.start);
        Span { start, end: self.end.min(other.end).max(start) }
    }

    /// The smallest span that holds both.
    pub fn hull(self, other: Span) -> Span {
        Span { start: self.start.min(other.start), end: self.end.max(other.end) }
    }

    /// True when both hold a common element.
    pub fn meets(self, other: Span) -> bool {
        !self.intersect(other).is_empty()
    }

    /// The elements in order.
    pub fn iter(self) -> Range<usize> {
        self.start..self.end
    }

    /// The same elements as a standard range, for slicing.
    pub fn range(self) -> Range<usize> {
        self.start..self.end
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {})", self.start, self.end)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
