"""Tables of the ONNX operators that TensorRT builds, with their types and restrictions.

Source: the operator table of onnx-tensorrt, TensorRT's own parser, for TensorRT 10.15 (2 February 2026; read in
November 2026): https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md

Two rows list more types than that table, which has only float types for them, because transformers count masks in
integers. CumSum becomes a layer that also accepts INT32 and INT64
(https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/Cumulative.html). The parser builds a Clip of
integers from Max and Min (`builtin_op_importers.cpp` of onnx-tensorrt).
"""

from dataclasses import dataclass

TABLE = "onnx-tensorrt's operator table for TensorRT 10.15 (2026-02-02)"
OPSETS = (9, 24)
"""The first and the last ONNX operator set that TensorRT supports."""

_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")
_HALVES = ("FLOAT", "FLOAT16")
_NUMBERS = (*_FLOATS, "INT32", "INT64")
_ALL = (*_NUMBERS, "BOOL")

IO_TYPES = frozenset((*_ALL, "INT8", "UINT8"))
"""The element types that a graph's inputs and outputs may have."""

_ROWS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        _FLOATS,
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Conv ConvTranspose Cos Cosh "
        "Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization GRU "
        "HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf LayerNormalization LeakyRelu Log "
        "LogSoftmax LRN LSTM LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization ParametricSoftplus PRelu "
        "QuantizeLinear RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal Resize "
        "RMSNormalization RNN RotaryEmbedding Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign "
        "Sqrt Tan Tanh ThresholdedRelu Upsample",
    ),
    (
        _NUMBERS,
        "Abs Add ArgMax ArgMin Clip CumSum DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max "
        "Min Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin "
        "ReduceProd ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum "
        "TopK",
    ),
    (
        _ALL,
        "Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape ReverseSequence "
        "Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
    ),
    (("BOOL",), "And Not Or Xor"),
    (
        _HALVES,
        "BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign",
    ),
    (("FLOAT",), "STFT"),
    ((*_FLOATS, "INT8", "FLOAT8E4M3FN"), "Attention"),
    ((*_ALL, "UINT8"), "Cast CastLike"),
    ((*_ALL, "FLOAT8E4M3FN", "FLOAT4E2M1", "INT4"), "Constant ConstantOfShape"),
    (("INT8", "FLOAT8E4M3FN", "FLOAT4E2M1", "INT4"), "DequantizeLinear"),
    ((*_NUMBERS, "INT8"), "Gelu"),
    ((*_NUMBERS, "FLOAT8E4M3FN"), "Mean"),
    ((*_FLOATS, "INT32"), "TensorScatter"),
)
TYPES = {operator: frozenset(types) for types, operators in _ROWS for operator in operators.split()}
"""Operator → element types of the tensors that it computes with, without indices and shapes."""


@dataclass(frozen=True)
class Restriction:
    """A restriction of a supported operator.

    Attributes:
        kind: "constant", "zero", "below", "rank" or "no_input" for an input, "no_output" for an output, or "attribute".
        place: the index of the input or output, or the attribute's name.
        allowed: the allowed ranks or values of the attribute (none: it must be missing), or the bound.
    """

    kind: str
    place: int | str
    allowed: tuple[int | float | str, ...] = ()


def _constant(*places: int) -> tuple[Restriction, ...]:
    return tuple(Restriction("constant", place) for place in places)


def _rank(place: int, *ranks: int) -> Restriction:
    return Restriction("rank", place, ranks)


def _attribute(name: str, *values: int | float | str) -> Restriction:
    return Restriction("attribute", name, values)


_DILATIONS = _attribute("dilations", 1)
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")

RESTRICTIONS: dict[str, tuple[Restriction, ...]] = {
    "Attention": (
        *(_rank(place, 4) for place in range(4)),
        *(Restriction("no_input", place) for place in (4, 5, 6)),
        *(Restriction("no_output", place) for place in (1, 2, 3)),
        _attribute("softcap", 0.0),
        _attribute("qk_matmul_output_mode", 0),
    ),
    "AveragePool": (_rank(0, 4, 5), _DILATIONS),
    "Constant": tuple(_attribute(name) for name in ("sparse_value", "value_string", "value_strings")),
    "CumSum": _constant(1),
    "DeformConv": (_rank(0, 3, 4),),
    "DequantizeLinear": (Restriction("zero", 2),),
    "Dropout": (Restriction("zero", 2),),
    "GridSample": (_rank(0, 4),),
    "LSTM": (_attribute("input_forget", 0), _attribute("layout", 0)),
    "LayerNormalization": (Restriction("no_output", 1), Restriction("no_output", 2)),
    "LpPool": (_DILATIONS,),
    "MaxPool": (_rank(0, 4, 5), Restriction("no_output", 1), _DILATIONS),
    "OneHot": _constant(1),
    "QuantizeLinear": (Restriction("zero", 2),),
    **{f"Reduce{kind}": _constant(1) for kind in _REDUCTIONS},
    "Resize": (
        _attribute("antialias", 0),
        _attribute(
            "coordinate_transformation_mode",
            *("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"),
        ),
        _attribute("keep_aspect_ratio_policy", "stretch"),
        _attribute("mode", "nearest", "linear"),
        _attribute("nearest_mode", "floor", "ceil", "round_prefer_floor", "round_prefer_ceil"),
    ),
    "STFT": _constant(1, 2),
    "ScatterND": (_attribute("reduction", "none"),),
    "Squeeze": _constant(1),
    "TensorScatter": (_rank(0, 4), _rank(1, 4), _attribute("axis", -2)),
    "TopK": (_attribute("sorted", 1), Restriction("below", 1, (3840,))),
    "Unsqueeze": _constant(1),
}
"""Operator → the restrictions of the table that can be seen in a graph."""

UNCHECKED = {
    "DeformConv": "each spatial axis must be padded alike at both ends",
    "EyeLike": "its input must have a fixed shape",
    "GRU": "both directions must have the same activations",
    "Hardmax": "the size along `axis` must be known when the engine is built",
    "If": "both branches must return tensors of the same rank",
    "LSTM": "both directions must have the same activations",
    "Loop": "carried tensors must keep their shape from one iteration to the next",
    "RNN": "both directions must have the same activations",
}
"""Operator → the restriction of the table that cannot always be seen in a graph."""

SHAPE_INPUTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("ConstantOfShape", "BlackmanWindow", "HammingWindow", "HannWindow", "Loop"), (0,)),
    **dict.fromkeys(("Expand", "OneHot", "Reshape", "Split", "Tile", "TopK", "Upsample"), (1,)),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
}
"""Operator → the indices of the inputs whose values decide the shape of its output."""

VALUE_SHAPED = frozenset(("Compress", "NonMaxSuppression", "NonZero", "Unique"))
"""Operators whose outputs have a length that depends on the values of their inputs.

TensorRT can build two of them, but the sizes of all later tensors are then unknown until the operator has run: no
profile applies to them, and ONNX Runtime advises to keep such operators out
(https://github.com/microsoft/onnxruntime/pull/23705).
"""
