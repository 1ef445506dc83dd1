//! Element types of tensors, and tensors of a type known only at run time.

use std::borrow::Cow;
use std::sync::Arc;

use half::{bf16, f16};

use crate::{DType, InvalidAttention, Span, TensorView};

/// An element type of Q, K, V and dO.
pub trait Element: Copy + Send + Sync + 'static {
    /// Its name.
    const DTYPE: DType;

    /// Wraps a view of this type.
    fn erase(view: TensorView<'_, Self>) -> AnyTensor<'_>;
    /// Wraps elements of this type.
    fn share(elements: Arc<Vec<Self>>) -> Elements;
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

/// The memory of a tensor, of any element type. Cloning costs a reference count.
#[derive(Clone, Debug, PartialEq)]
pub enum Elements {
    /// IEEE 754 single precision.
    F32(Arc<Vec<f32>>),
    /// bfloat16.
    Bf16(Arc<Vec<bf16>>),
    /// IEEE 754 half precision.
    F16(Arc<Vec<f16>>),
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;

    fn erase(view: TensorView<'_, f32>) -> AnyTensor<'_> {
        AnyTensor::F32(view)
    }

    fn share(elements: Arc<Vec<f32>>) -> Elements {
        Elements::F32(elements)
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

    fn share(elements: Arc<Vec<bf16>>) -> Elements {
        Elements::Bf16(elements)
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

    fn share(elements: Arc<Vec<f16>>) -> Elements {
        Elements::F16(elements)
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

impl<T: Element> From<Arc<Vec<T>>> for Elements {
    fn from(elements: Arc<Vec<T>>) -> Self {
        T::share(elements)
    }
}

impl<T: Element> From<Vec<T>> for Elements {
    fn from(elements: Vec<T>) -> Self {
        Arc::new(elements).into()
    }
}

/// The same expression over what is inside, whatever its element type.
macro_rules! each {
    ($any:ident, $tensor:expr, $inside:ident => $result:expr) => {
        match $tensor {
            $any::F32($inside) => $result,
            $any::Bf16($inside) => $result,
            $any::F16($inside) => $result,
        }
    };
}

impl Elements {
    /// None.
    pub fn empty(dtype: DType) -> Elements {
        match dtype {
            DType::F32 => Vec::<f32>::new().into(),
            DType::Bf16 => Vec::<bf16>::new().into(),
            DType::F16 => Vec::<f16>::new().into(),
        }
    }

    /// `values` as the nearest elements of a type, ties to even.
    pub fn rounded(dtype: DType, values: impl IntoIterator<Item = f32>) -> Elements {
        fn round<T: Element>(values: impl IntoIterator<Item = f32>) -> Elements {
            values.into_iter().map(T::from_f32).collect::<Vec<T>>().into()
        }
        match dtype {
            DType::F32 => round::<f32>(values),
            DType::Bf16 => round::<bf16>(values),
            DType::F16 => round::<f16>(values),
        }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            Elements::F32(_) => DType::F32,
            Elements::Bf16(_) => DType::Bf16,
            Elements::F16(_) => DType::F16,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        each!(Elements, self, data => data.len())
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same values in f32; copied unless that is what they are.
    pub fn values(&self) -> Cow<'_, [f32]> {
        fn widen<T: Element>(data: &[T]) -> Cow<'static, [f32]> {
            data.iter().map(|x| x.to_f32()).collect()
        }
        match self {
            Elements::F32(data) => Cow::Borrowed(data),
            Elements::Bf16(data) => widen(data),
            Elements::F16(data) => widen(data),
        }
    }

    /// The elements if they are f32, copied only when somebody else holds them too.
    pub fn into_f32(self) -> Option<Vec<f32>> {
        match self {
            Elements::F32(data) => Some(Arc::unwrap_or_clone(data)),
            _ => None,
        }
    }

    /// A view `[tokens, heads, dim]` from element `offset` on, as [`TensorView::new`].
    ///
    /// # Errors
    /// [`InvalidAttention::BadTensor`] when it reaches beyond the elements.
    pub fn view(
        &self,
        tensor: &'static str,
        offset: usize,
        shape: [usize; 3],
        stride: usize,
    ) -> Result<AnyTensor<'_>, InvalidAttention> {
        each!(Elements, self, data => {
            let data = data.get(offset..).unwrap_or_default();
            TensorView::new(tensor, data, shape, stride).map(AnyTensor::from)
        })
    }

    /// A view of all elements, as [`TensorView::contiguous`].
    ///
    /// # Errors
    /// [`InvalidAttention::BadTensor`] when there are not exactly the shape's elements.
    pub fn contiguous(
        &self,
        tensor: &'static str,
        shape: [usize; 3],
    ) -> Result<AnyTensor<'_>, InvalidAttention> {
        each!(Elements, self, data => TensorView::contiguous(tensor, data, shape).map(AnyTensor::from))
    }

    /// The address of the memory, which equals that of other elements only while both live and share it.
    pub(crate) fn address(&self) -> usize {
        each!(Elements, self, data => Arc::as_ptr(data) as usize)
    }

    /// A view that was checked when its slice was made.
    pub(crate) fn part(&self, offset: usize, shape: [usize; 3], stride: usize) -> AnyTensor<'_> {
        each!(Elements, self, data => {
            TensorView::unchecked(data.get(offset..).unwrap_or_default(), shape, stride).into()
        })
    }
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
        each!(AnyTensor, self, view => view.shape())
    }

    /// Elements from one token to the next.
    pub fn stride(&self) -> usize {
        each!(AnyTensor, self, view => view.stride())
    }

    /// The view of an f32 tensor, as LSE and D are.
    ///
    /// # Errors
    /// [`InvalidAttention::NotF32`] when it is of another type.
    pub fn f32(self, tensor: &'static str) -> Result<TensorView<'a>, InvalidAttention> {
        match self {
            AnyTensor::F32(view) => Ok(view),
            other => Err(InvalidAttention::NotF32 { tensor, actual: other.dtype() }),
        }
    }

    /// A view of some of the tokens and heads, as [`TensorView::part`].
    pub fn part(&self, tokens: Span, heads: Span) -> Option<AnyTensor<'a>> {
        each!(AnyTensor, self, view => view.part(tokens, heads).map(AnyTensor::from))
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
        each!(AnyTensor, self, view => view.expect(tensor, expected))
    }
}
