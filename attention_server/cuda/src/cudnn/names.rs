//! cuDNN's backend enumerations, as integers: a value that a newer library returns is then a number like any other, where
//! a Rust enum would be undefined behaviour. Values are those of the header `cudnn_graph.h` of cuDNN 9.

/// Kinds of descriptor (`cudnnBackendDescriptorType_t`).
pub(crate) mod kind {
    pub(crate) const POINTWISE: i32 = 0;
    pub(crate) const ENGINE: i32 = 2;
    pub(crate) const ENGINE_CONFIG: i32 = 3;
    pub(crate) const ENGINE_HEURISTICS: i32 = 4;
    pub(crate) const EXECUTION_PLAN: i32 = 5;
    pub(crate) const KNOB_CHOICE: i32 = 7;
    pub(crate) const OPERATION_POINTWISE: i32 = 13;
    pub(crate) const OPERATION_GRAPH: i32 = 15;
    pub(crate) const VARIANT_PACK: i32 = 16;
    pub(crate) const TENSOR: i32 = 17;
    pub(crate) const MATMUL: i32 = 18;
    pub(crate) const OPERATION_MATMUL: i32 = 19;
    pub(crate) const REDUCTION: i32 = 21;
    pub(crate) const OPERATION_REDUCTION: i32 = 22;
    pub(crate) const OPERATION_RESHAPE: i32 = 31;
    pub(crate) const DEVICE_PROPERTIES: i32 = 38;
}

/// Attributes of descriptors (`cudnnBackendAttributeName_t`).
pub(crate) mod attribute {
    pub(crate) const POINTWISE_MODE: i32 = 0;
    pub(crate) const POINTWISE_PRECISION: i32 = 1;
    pub(crate) const POINTWISE_AXIS: i32 = 9;
    pub(crate) const HEURISTICS_MODE: i32 = 200;
    pub(crate) const HEURISTICS_GRAPH: i32 = 201;
    pub(crate) const HEURISTICS_RESULTS: i32 = 202;
    pub(crate) const HEURISTICS_DEVICE: i32 = 204;
    pub(crate) const CONFIG_ENGINE: i32 = 300;
    pub(crate) const CONFIG_KNOBS: i32 = 302;
    pub(crate) const PLAN_HANDLE: i32 = 400;
    pub(crate) const PLAN_CONFIG: i32 = 401;
    pub(crate) const PLAN_WORKSPACE: i32 = 402;
    pub(crate) const PLAN_JSON: i32 = 405;
    pub(crate) const PLAN_DEVICE: i32 = 407;
    pub(crate) const KNOB_TYPE: i32 = 600;
    pub(crate) const KNOB_VALUE: i32 = 601;
    pub(crate) const OPERATION_POINTWISE_MODE: i32 = 750;
    pub(crate) const OPERATION_POINTWISE_X: i32 = 751;
    pub(crate) const OPERATION_POINTWISE_B: i32 = 752;
    pub(crate) const OPERATION_POINTWISE_Y: i32 = 753;
    pub(crate) const OPERATION_POINTWISE_T: i32 = 758;
    pub(crate) const GRAPH_HANDLE: i32 = 800;
    pub(crate) const GRAPH_OPERATIONS: i32 = 801;
    pub(crate) const TENSOR_ALIGNMENT: i32 = 900;
    pub(crate) const TENSOR_TYPE: i32 = 901;
    pub(crate) const TENSOR_DIMENSIONS: i32 = 902;
    pub(crate) const TENSOR_STRIDES: i32 = 903;
    pub(crate) const TENSOR_ID: i32 = 906;
    pub(crate) const TENSOR_VIRTUAL: i32 = 907;
    pub(crate) const TENSOR_BY_VALUE: i32 = 908;
    pub(crate) const TENSOR_RAGGED_OFFSET: i32 = 913;
    pub(crate) const PACK_IDS: i32 = 1000;
    pub(crate) const PACK_POINTERS: i32 = 1001;
    pub(crate) const PACK_WORKSPACE: i32 = 1003;
    pub(crate) const ENGINE_GRAPH: i32 = 1300;
    pub(crate) const ENGINE_INDEX: i32 = 1301;
    pub(crate) const ENGINE_DEVICE: i32 = 1307;
    pub(crate) const MATMUL_TYPE: i32 = 1500;
    pub(crate) const MATMUL_PADDING: i32 = 1503;
    pub(crate) const OPERATION_MATMUL_A: i32 = 1520;
    pub(crate) const OPERATION_MATMUL_B: i32 = 1521;
    pub(crate) const OPERATION_MATMUL_C: i32 = 1522;
    pub(crate) const OPERATION_MATMUL_KIND: i32 = 1523;
    pub(crate) const OPERATION_MATMUL_M: i32 = 1525;
    pub(crate) const OPERATION_MATMUL_N: i32 = 1526;
    pub(crate) const OPERATION_MATMUL_K: i32 = 1527;
    pub(crate) const REDUCTION_OPERATOR: i32 = 1600;
    pub(crate) const REDUCTION_TYPE: i32 = 1601;
    pub(crate) const OPERATION_REDUCTION_X: i32 = 1610;
    pub(crate) const OPERATION_REDUCTION_Y: i32 = 1611;
    pub(crate) const OPERATION_REDUCTION_KIND: i32 = 1612;
    pub(crate) const OPERATION_RESHAPE_X: i32 = 2200;
    pub(crate) const OPERATION_RESHAPE_Y: i32 = 2201;
    pub(crate) const DEVICE_HANDLE: i32 = 2701;
    pub(crate) const DEVICE_JSON: i32 = 2702;
}

/// Types of attribute values (`cudnnBackendAttributeType_t`).
pub(crate) mod value {
    pub(crate) const HANDLE: i32 = 0;
    pub(crate) const DATA_TYPE: i32 = 1;
    pub(crate) const BOOLEAN: i32 = 2;
    pub(crate) const INT64: i32 = 3;
    pub(crate) const DOUBLE: i32 = 5;
    pub(crate) const POINTER: i32 = 6;
    pub(crate) const HEURISTICS_MODE: i32 = 8;
    pub(crate) const KNOB_TYPE: i32 = 9;
    pub(crate) const POINTWISE_MODE: i32 = 14;
    pub(crate) const DESCRIPTOR: i32 = 15;
    pub(crate) const REDUCTION_OPERATOR: i32 = 18;
    pub(crate) const CHAR: i32 = 24;
}

/// Element types (`cudnnDataType_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum DataType {
    F32 = 0,
    F16 = 2,
    I32 = 4,
    Bf16 = 9,
    I64 = 10,
    Bool = 11,
}

/// Modes of pointwise operations (`cudnnPointwiseMode_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Pointwise {
    Add = 0,
    Mul = 1,
    Div = 6,
    Sub = 9,
    Exp = 13,
    Log = 15,
    Identity = 21,
    AtLeast = 303,
    Below = 304,
    And = 400,
    Index = 501,
    Select = 601,
}

/// Operators of reductions (`cudnnReduceTensorOp_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Reduction {
    Add = 0,
    Max = 3,
}

/// Heuristics that know the device (`CUDNN_HEUR_MODE_A`).
pub(crate) const HEURISTICS_A: i32 = 3;

/// The knob of an engine's pipeline depth (`CUDNN_KNOB_TYPE_STAGES`).
pub(crate) const KNOB_STAGES: i32 = 14;
