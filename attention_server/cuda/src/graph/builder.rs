//! Operation graphs of cuDNN, operation by operation.

use std::sync::Arc;

use crate::CudaError;
use crate::cudnn::names::{DataType, Pointwise, Reduction, attribute, kind};
use crate::cudnn::{Cudnn, Descriptor, Handle};

/// A tensor of a graph under construction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tensor(usize);

/// Sizes and strides, in elements, of a tensor `[batch, heads, tokens, dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) dims: [i64; 4],
    pub(crate) strides: [i64; 4],
}

impl Layout {
    pub(crate) const SCALAR: Layout = Layout { dims: [1; 4], strides: [1; 4] };

    /// A vector of `n` elements.
    pub(crate) fn vector(n: i64) -> Layout {
        Layout { dims: [n, 1, 1, 1], strides: [1; 4] }
    }

    /// With the last two axes exchanged.
    pub(crate) fn transposed(self) -> Layout {
        let ([a, b, c, d], [w, x, y, z]) = (self.dims, self.strides);
        Layout { dims: [a, b, d, c], strides: [w, x, z, y] }
    }
}

/// Limits of a matrix product by sequence: tensors `[batch, 1, 1, 1]` of lengths.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lengths {
    pub(crate) m: Option<Tensor>,
    pub(crate) n: Option<Tensor>,
    pub(crate) k: Option<Tensor>,
}

/// A graph under construction.
pub(crate) struct Builder {
    cudnn: Arc<Cudnn>,
    tensors: Vec<Descriptor>,
    operations: Vec<Descriptor>,
    /// What operations do, which they refer to.
    kinds: Vec<Descriptor>,
    next_id: i64,
}

/// Identifiers below this are given by the caller, those above to virtual tensors.
const FIRST_VIRTUAL: i64 = 1000;

impl Builder {
    pub(crate) fn new(cudnn: &Arc<Cudnn>) -> Builder {
        let (tensors, operations, kinds) = (Vec::new(), Vec::new(), Vec::new());
        Builder { cudnn: Arc::clone(cudnn), tensors, operations, kinds, next_id: FIRST_VIRTUAL }
    }

    /// A tensor in the device's memory.
    pub(crate) fn device(&mut self, id: i64, dtype: DataType, layout: Layout) -> Result<Tensor, CudaError> {
        self.tensor(id, dtype, layout, |_, _| Ok(()))
    }

    /// A tensor of sequences one after the other, each from its element in `offsets` on.
    pub(crate) fn ragged(
        &mut self,
        id: i64,
        dtype: DataType,
        layout: Layout,
        offsets: Tensor,
    ) -> Result<Tensor, CudaError> {
        self.tensor(id, dtype, layout, |tensor, all| {
            tensor.set_descriptors(attribute::TENSOR_RAGGED_OFFSET, &[&all[offsets.0]]).map(|_| ())
        })
    }

    /// A float that is given with each call, from the host's memory.
    pub(crate) fn scalar(&mut self, id: i64) -> Result<Tensor, CudaError> {
        self.tensor(id, DataType::F32, Layout::SCALAR, |tensor, _| {
            tensor.set(attribute::TENSOR_BY_VALUE, &[true]).map(|_| ())
        })
    }

    /// A tensor that is never stored.
    pub(crate) fn interim(&mut self, dtype: DataType, layout: Layout) -> Result<Tensor, CudaError> {
        let id = self.take_id();
        self.tensor(id, dtype, layout, |tensor, _| tensor.set(attribute::TENSOR_VIRTUAL, &[true]).map(|_| ()))
    }

    /// As [`Builder::interim`], of sequences as in [`Builder::ragged`].
    pub(crate) fn interim_ragged(
        &mut self,
        dtype: DataType,
        layout: Layout,
        offsets: Tensor,
    ) -> Result<Tensor, CudaError> {
        let id = self.take_id();
        self.tensor(id, dtype, layout, |tensor, all| {
            tensor.set(attribute::TENSOR_VIRTUAL, &[true])?;
            tensor.set_descriptors(attribute::TENSOR_RAGGED_OFFSET, &[&all[offsets.0]]).map(|_| ())
        })
    }

    fn take_id(&mut self) -> i64 {
        self.next_id += 1;
        self.next_id
    }

    fn tensor(
        &mut self,
        id: i64,
        dtype: DataType,
        layout: Layout,
        more: impl FnOnce(&Descriptor, &[Descriptor]) -> Result<(), CudaError>,
    ) -> Result<Tensor, CudaError> {
        let tensor = Descriptor::new(&self.cudnn, kind::TENSOR)?;
        tensor
            .set(attribute::TENSOR_TYPE, &[dtype])?
            .set(attribute::TENSOR_DIMENSIONS, &layout.dims)?
            .set(attribute::TENSOR_STRIDES, &layout.strides)?
            .set(attribute::TENSOR_ID, &[id])?
            .set(attribute::TENSOR_ALIGNMENT, &[16i64])?;
        more(&tensor, &self.tensors)?;
        tensor.finalize(|| format!("describing tensor {id}"))?;
        self.tensors.push(tensor);
        Ok(Tensor(self.tensors.len() - 1))
    }

    /// `c = a b`, summed in f32. `zero_padding` lets what lies beyond the lengths count as zero.
    pub(crate) fn matmul(
        &mut self,
        [a, b, c]: [Tensor; 3],
        lengths: Lengths,
        zero_padding: bool,
    ) -> Result<(), CudaError> {
        let matmul = Descriptor::new(&self.cudnn, kind::MATMUL)?;
        matmul.set(attribute::MATMUL_TYPE, &[DataType::F32])?;
        if zero_padding {
            matmul.set(attribute::MATMUL_PADDING, &[0f64])?;
        }
        matmul.finalize(|| "describing a matrix product".to_owned())?;
        let operation = Descriptor::new(&self.cudnn, kind::OPERATION_MATMUL)?;
        let required = [
            (attribute::OPERATION_MATMUL_A, Some(a)),
            (attribute::OPERATION_MATMUL_B, Some(b)),
            (attribute::OPERATION_MATMUL_C, Some(c)),
            (attribute::OPERATION_MATMUL_M, lengths.m),
            (attribute::OPERATION_MATMUL_N, lengths.n),
            (attribute::OPERATION_MATMUL_K, lengths.k),
        ];
        self.operation(operation, (attribute::OPERATION_MATMUL_KIND, matmul), &required)
    }

    /// `y = mode(x)`, or of `x` and `b`.
    pub(crate) fn pointwise(
        &mut self,
        (mode, precision): (Pointwise, DataType),
        x: Tensor,
        b: Option<Tensor>,
        y: Tensor,
    ) -> Result<(), CudaError> {
        self.pointwise_with(mode, precision, None, [Some(x), b, None, Some(y)])
    }

    /// `y = x` where `condition` holds, else `otherwise`.
    pub(crate) fn select(
        &mut self,
        condition: Tensor,
        x: Tensor,
        otherwise: Tensor,
        y: Tensor,
    ) -> Result<(), CudaError> {
        let tensors = [Some(x), Some(otherwise), Some(condition), Some(y)];
        self.pointwise_with(Pointwise::Select, DataType::F32, None, tensors)
    }

    /// `y` = the index along `axis` of each element of `x`.
    pub(crate) fn index(&mut self, axis: i64, x: Tensor, y: Tensor) -> Result<(), CudaError> {
        let tensors = [Some(x), None, None, Some(y)];
        self.pointwise_with(Pointwise::Index, DataType::I32, Some(axis), tensors)
    }

    fn pointwise_with(
        &mut self,
        mode: Pointwise,
        precision: DataType,
        axis: Option<i64>,
        [x, b, t, y]: [Option<Tensor>; 4],
    ) -> Result<(), CudaError> {
        let pointwise = Descriptor::new(&self.cudnn, kind::POINTWISE)?;
        pointwise
            .set(attribute::POINTWISE_MODE, &[mode])?
            .set(attribute::POINTWISE_PRECISION, &[precision])?;
        if let Some(axis) = axis {
            pointwise.set(attribute::POINTWISE_AXIS, &[axis])?;
        }
        pointwise.finalize(|| format!("describing the operation {mode:?}"))?;
        let operation = Descriptor::new(&self.cudnn, kind::OPERATION_POINTWISE)?;
        let tensors = [
            (attribute::OPERATION_POINTWISE_X, x),
            (attribute::OPERATION_POINTWISE_Y, y),
            (attribute::OPERATION_POINTWISE_B, b),
            (attribute::OPERATION_POINTWISE_T, t),
        ];
        self.operation(operation, (attribute::OPERATION_POINTWISE_MODE, pointwise), &tensors)
    }

    /// `y` = `x` reduced along the axes where `y` has size one.
    pub(crate) fn reduce(&mut self, operator: Reduction, x: Tensor, y: Tensor) -> Result<(), CudaError> {
        let reduction = Descriptor::new(&self.cudnn, kind::REDUCTION)?;
        reduction
            .set(attribute::REDUCTION_TYPE, &[DataType::F32])?
            .set(attribute::REDUCTION_OPERATOR, &[operator])?;
        reduction.finalize(|| format!("describing the reduction {operator:?}"))?;
        let operation = Descriptor::new(&self.cudnn, kind::OPERATION_REDUCTION)?;
        let tensors =
            [(attribute::OPERATION_REDUCTION_X, Some(x)), (attribute::OPERATION_REDUCTION_Y, Some(y))];
        self.operation(operation, (attribute::OPERATION_REDUCTION_KIND, reduction), &tensors)
    }

    /// `y` = the elements of `x` under other sizes and strides.
    pub(crate) fn reshape(&mut self, x: Tensor, y: Tensor) -> Result<(), CudaError> {
        let operation = Descriptor::new(&self.cudnn, kind::OPERATION_RESHAPE)?;
        let Builder { tensors, .. } = self;
        operation
            .set_descriptors(attribute::OPERATION_RESHAPE_X, &[&tensors[x.0]])?
            .set_descriptors(attribute::OPERATION_RESHAPE_Y, &[&tensors[y.0]])?;
        operation.finalize(|| "adding a reshape".to_owned())?;
        self.operations.push(operation);
        Ok(())
    }

    fn operation(
        &mut self,
        operation: Descriptor,
        (attribute, kind): (i32, Descriptor),
        tensors: &[(i32, Option<Tensor>)],
    ) -> Result<(), CudaError> {
        operation.set_descriptors(attribute, &[&kind])?;
        for (attribute, tensor) in tensors {
            if let Some(tensor) = tensor {
                operation.set_descriptors(*attribute, &[&self.tensors[tensor.0]])?;
            }
        }
        operation.finalize(|| format!("adding operation {}", self.operations.len()))?;
        self.operations.push(operation);
        self.kinds.push(kind);
        Ok(())
    }

    /// The finished graph, for the handle's device or, without one, for whatever device plans are built for.
    pub(crate) fn finish(self, sequences: usize, handle: Option<&Handle>) -> Result<Graph, CudaError> {
        let graph = Descriptor::new(&self.cudnn, kind::OPERATION_GRAPH)?;
        let operations: Vec<&Descriptor> = self.operations.iter().collect();
        graph.set_descriptors(attribute::GRAPH_OPERATIONS, &operations)?;
        if let Some(handle) = handle {
            graph.set_handle(attribute::GRAPH_HANDLE, handle)?;
        }
        graph.finalize(|| "ending the graph".to_owned())?;
        Ok(Graph {
            graph,
            sequences,
            _operations: self.operations,
            _kinds: self.kinds,
            _tensors: self.tensors,
        })
    }
}

/// A finished operation graph.
#[derive(Debug)]
pub(crate) struct Graph {
    pub(crate) graph: Descriptor,
    /// Sequences of a call, at most.
    pub(crate) sequences: usize,
    /// The graph refers to these.
    _operations: Vec<Descriptor>,
    _kinds: Vec<Descriptor>,
    _tensors: Vec<Descriptor>,
}
