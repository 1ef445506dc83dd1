//! Views of tensors laid out `[tokens, heads, dim]`, with a stride from token to token.

use crate::{AnyTensor, DType, Elements, InvalidAttention, Span};

/// A borrowed view `[tokens, heads, dim]`: element `(t, h, d)` is `data[t * stride + h * dim + d]`.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a, T = f32> {
    data: &'a [T],
    shape: [usize; 3],
    stride: usize,
}

impl<'a, T> TensorView<'a, T> {
    /// A view of `data`. `stride` is the distance in elements from one token to the next.
    ///
    /// # Errors
    /// [`InvalidAttention::BadTensor`] when `data` is too short, or the stride shorter than a token.
    pub fn new(
        tensor: &'static str,
        data: &'a [T],
        shape: [usize; 3],
        stride: usize,
    ) -> Result<Self, InvalidAttention> {
        let [tokens, heads, dim] = shape;
        let row = heads.saturating_mul(dim);
        let needed = match tokens {
            0 => 0,
            n => (n - 1).saturating_mul(stride).saturating_add(row),
        };
        if data.len() < needed || stride < row {
            return Err(InvalidAttention::BadTensor { tensor, actual: data.len(), shape, stride, needed });
        }
        Ok(TensorView { data, shape, stride })
    }

    /// A view of contiguous data.
    ///
    /// # Errors
    /// [`InvalidAttention::BadTensor`] when `data` does not hold exactly the shape's elements.
    pub fn contiguous(
        tensor: &'static str,
        data: &'a [T],
        shape: [usize; 3],
    ) -> Result<Self, InvalidAttention> {
        let stride = shape[1].saturating_mul(shape[2]);
        let needed = shape[0].saturating_mul(stride);
        if data.len() != needed {
            return Err(InvalidAttention::BadTensor { tensor, actual: data.len(), shape, stride, needed });
        }
        Ok(TensorView { data, shape, stride })
    }

    /// A view that is known to fit.
    pub(crate) fn unchecked(data: &'a [T], shape: [usize; 3], stride: usize) -> Self {
        TensorView { data, shape, stride }
    }

    /// `[tokens, heads, dim]`.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Elements from one token to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The elements from the first token's first head on.
    pub fn data(&self) -> &'a [T] {
        self.data
    }

    /// The `heads * dim` elements of one token.
    ///
    /// # Panics
    /// When `token` is not below the number of tokens.
    pub fn token(&self, token: usize) -> &'a [T] {
        &self.data[token * self.stride..][..self.shape[1] * self.shape[2]]
    }

    /// The `dim` elements of one head of one token.
    ///
    /// # Panics
    /// When either index is out of range.
    pub fn row(&self, token: usize, head: usize) -> &'a [T] {
        &self.token(token)[head * self.shape[2]..][..self.shape[2]]
    }

    /// A view of some of the tokens and heads, counted from the view's first, `None` when they reach outside it.
    pub fn part(&self, tokens: Span, heads: Span) -> Option<TensorView<'a, T>> {
        let [all_tokens, all_heads, dim] = self.shape;
        if !(Span::to(all_tokens).covers(tokens) && Span::to(all_heads).covers(heads)) {
            return None;
        }
        let data = self.data.get(tokens.start() * self.stride + heads.start() * dim..).unwrap_or_default();
        Some(TensorView { data, shape: [tokens.len(), heads.len(), dim], stride: self.stride })
    }

    /// Checks that the view has the given shape.
    ///
    /// # Errors
    /// [`InvalidAttention::ShapeMismatch`] when it does not.
    pub fn expect(&self, tensor: &'static str, expected: [usize; 3]) -> Result<(), InvalidAttention> {
        if self.shape == expected {
            Ok(())
        } else {
            Err(InvalidAttention::ShapeMismatch { tensor, actual: self.shape, expected })
        }
    }
}

/// A shared, immutable tensor: some heads of some tokens of a document, inside storage that others may share.
///
/// Cloning costs a reference count. The storage lives as long as any slice of it, so an operation in flight owns what
/// it reads.
#[derive(Clone, Debug)]
pub struct TensorSlice {
    storage: Elements,
    offset: usize,
    stride: usize,
    tokens: Span,
    heads: usize,
    dim: usize,
}

/// See [`TensorSlice::identity`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TensorIdentity {
    storage: usize,
    origin: u64,
    stride: usize,
    heads: usize,
    dim: usize,
}

/// Where a [`TensorSlice`] lies in its storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorLayout {
    /// Index of the first token's first head.
    pub offset: usize,
    /// Elements from one token to the next.
    pub stride: usize,
    /// Positions in the document of the tokens held.
    pub tokens: Span,
    /// Heads held.
    pub heads: usize,
    /// Elements of a head.
    pub dim: usize,
}

impl TensorSlice {
    /// A slice of `storage`.
    ///
    /// # Errors
    /// [`InvalidAttention::BadTensor`] when it reaches beyond the storage.
    pub fn new(
        tensor: &'static str,
        storage: impl Into<Elements>,
        layout: TensorLayout,
    ) -> Result<Self, InvalidAttention> {
        let TensorLayout { offset, stride, tokens, heads, dim } = layout;
        let storage = storage.into();
        storage.view(tensor, offset, [tokens.len(), heads, dim], stride)?;
        Ok(TensorSlice { storage, offset, stride, tokens, heads, dim })
    }

    /// Contiguous data `[tokens, heads, dim]`.
    ///
    /// # Errors
    /// [`InvalidAttention::BadTensor`] when `data` does not hold exactly the shape's elements.
    pub fn contiguous(
        tensor: &'static str,
        data: impl Into<Elements>,
        tokens: Span,
        heads: usize,
        dim: usize,
    ) -> Result<Self, InvalidAttention> {
        let storage = data.into();
        storage.contiguous(tensor, [tokens.len(), heads, dim])?;
        Ok(TensorSlice { storage, offset: 0, stride: heads * dim, tokens, heads, dim })
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.storage.dtype()
    }

    /// Positions in the document of the tokens held.
    pub fn tokens(&self) -> Span {
        self.tokens
    }

    /// Heads held.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Elements of a head.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Bytes of the elements held, as they travel.
    pub fn bytes(&self) -> usize {
        self.tokens.len() * self.heads * self.dim * self.dtype().bytes()
    }

    /// The tokens at the positions `tokens` as a slice of the same storage, `None` when they are not all in it. They may
    /// reach beyond this slice, as long as the storage holds them.
    pub fn with_tokens(&self, tokens: Span) -> Option<TensorSlice> {
        let offset = match tokens.start().checked_sub(self.tokens.start()) {
            Some(after) => self.offset.checked_add(after.checked_mul(self.stride)?)?,
            None => {
                self.offset.checked_sub((self.tokens.start() - tokens.start()).checked_mul(self.stride)?)?
            }
        };
        let TensorSlice { stride, heads, dim, .. } = *self;
        let layout = TensorLayout { offset, stride, tokens, heads, dim };
        TensorSlice::new("slice", self.storage.clone(), layout).ok()
    }

    /// What slices of one storage have in common when they agree on where every position lies, so that equal positions
    /// are the same memory. Meaningful while the storage lives.
    pub fn identity(&self) -> TensorIdentity {
        let origin =
            (self.offset as u64).wrapping_sub((self.tokens.start() as u64).wrapping_mul(self.stride as u64));
        let storage = self.storage.address();
        TensorIdentity { storage, origin, stride: self.stride, heads: self.heads, dim: self.dim }
    }

    /// A borrowed view of all tokens.
    pub fn view(&self) -> AnyTensor<'_> {
        self.storage.part(self.offset, [self.tokens.len(), self.heads, self.dim], self.stride)
    }

    /// A borrowed view of the tokens at the positions `tokens`, `None` when the slice does not hold them all.
    pub fn view_of(&self, tokens: Span) -> Option<AnyTensor<'_>> {
        if !self.tokens.covers(tokens) {
            return None;
        }
        let skip = (tokens.start() - self.tokens.start()) * self.stride;
        Some(self.storage.part(self.offset + skip, [tokens.len(), self.heads, self.dim], self.stride))
    }
}
