//! Element types of tensors, and views of a type known only at run time.

use half::{bf16, f16};

use crate::{DType, InvalidAttention, Span, TensorView};

/// An element type of Q, K, V and dO.
pub trait Element: Copy + Send + Sync + 'static {
    /// Its name.
    const DTYPE: DType;

    /// Wraps a view of this type.
    fn erase(view: TensorView<'_, Self>) -> AnyTensor<'_>;
    /// The nearest element, ties to even.
    fn from_f32(x: f32) -> Self;
    /// The same value.
    fn to_f32(self) -> f32;
}

/// A [`TensorView`] of any element type.
#[derive(Clone, Copy, Debug)]
pub enum AnyTensor<'a> {
    /// IEEE 754 single precision.
    F32(TensorView<'a, f32>),
    /// bfloat16.
    Bf16(TensorView<'a, bf16>),
    /// IEEE 754 half precision.
    F16(TensorView<'a, f16>),
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;

    fn erase(view: TensorView<'_, f32>) -> AnyTensor<'_> {
        AnyTensor::F32(view)
    }

    fn from_f32(x: f32) -> f32 {
        x
    }

    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;

    fn erase(view: TensorView<'_, bf16>) -> AnyTensor<'_> {
        AnyTensor::Bf16(view)
    }

    fn from_f32(x: f32) -> bf16 {
        bf16::from_f32(x)
    }

    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;

    fn erase(view: TensorView<'_, f16>) -> AnyTensor<'_> {
        AnyTensor::F16(view)
    }

    fn from_f32(x: f32) -> f16 {
        f16::from_f32(x)
    }

    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

impl<'a, T: Element> From<TensorView<'a, T>> for AnyTensor<'a> {
    fn from(view: TensorView<'a, T>) -> Self {
        T::erase(view)
    }
}

/// The same expression over the view inside, whatever its element type.
macro_rules! each {
    ($tensor:expr, $view:ident => $result:expr) => {
        match $tensor {
            AnyTensor::F32($view) => $result,
            AnyTensor::Bf16($view) => $result,
            AnyTensor::F16($view) => $result,
        }
    };
}

impl<'a> AnyTensor<'a> {
    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            AnyTensor::F32(_) => DType::F32,
            AnyTensor::Bf16(_) => DType::Bf16,
            AnyTensor::F16(_) => DType::F16,
        }
    }

    /// `[tokens, heads, dim]`.
    pub fn shape(&self) -> [usize; 3] {
        each!(self, view => view.shape())
    }

    /// A view of some of the tokens and heads, as [`TensorView::part`].
    pub fn part(&self, tokens: Span, heads: Span) -> Option<AnyTensor<'a>> {
        each!(self, view => view.part(tokens, heads).map(AnyTensor::from))
    }

    /// Checks shape and element type.
    ///
    /// # Errors
    /// [`InvalidAttention::ShapeMismatch`] and [`InvalidAttention::DTypeMismatch`].
    pub fn expect(
        &self,
        tensor: &'static str,
        expected: [usize; 3],
        dtype: DType,
    ) -> Result<(), InvalidAttention> {
        if self.dtype() != dtype {
            let (actual, expected) = (self.dtype(), dtype);
            return Err(InvalidAttention::DTypeMismatch { tensor, actual, expected });
        }
        each!(self, view => view.expect(tensor, expected))
    }
}
