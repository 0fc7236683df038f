"""Converts the weights and the computation of graphs to float16, and of the inputs and outputs only a cache's.

ONNX Runtime's own converter does it. Operators that square or sum values of any size stay in float32: norms that no
fusion has replaced, softmax, reductions, the sums of experts. Fused norms accumulate in float32 by themselves.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporters.onnx_files.cache_names import is_past, is_present
from exporters.onnx_runtime import import_onnxruntime
from exporters.private import float16_converter

from .export import Export

FLOAT32_OPS = (
    "Pow",
    "Sqrt",
    "Reciprocal",
    "ReduceMean",
    "ReduceSum",
    "ReduceL2",
    "ReduceSumSquare",
    "Exp",
    "Log",
    "Softmax",
    "LogSoftmax",
    "ScatterElements",
)
"""Operators kept in float32, in addition to those for which ONNX Runtime has no float16 kernel."""

_FLOAT32_PREFIX = "float32_"
"""Prefix of the names of nodes between two `FLOAT32_OPS`, which stay in float32 too."""

_STUB_BYTES = 4096
"""Larger initializers bypass the converter, so that its memory does not grow with the model."""


def to_float16(export: Export) -> None:
    """Replaces the float32 graph with a float16 one; inputs and outputs keep their dtypes, except a cache's.

    Large initializers are cast one at a time when the graph is saved.
    """
    import_onnxruntime()  # raises the error that names the extras
    graph = export.graph
    keep = [value.name for value in (*graph.inputs, *graph.outputs) if not _is_cache(value.name or "")]
    large = _set_aside_large(graph)
    export.graph_model = _convert(export.graph_model, keep)
    _join_float32(export.graph_model)
    _put_back_in_half(export.graph, large)
    export.graph.sort()
    export.has_stale_types = True


def _is_cache(name: str) -> bool:
    return is_past(name) or is_present(name)


def _set_aside_large(graph: onnx_ir.Graph) -> dict[str, onnx_ir.TensorProtocol]:
    """Turns large initializers into inputs, so that the converter changes their dtype without copying values; returns
    their tensors by name.
    """
    large = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.dtype == onnx_ir.DataType.FLOAT and tensor.nbytes > _STUB_BYTES:
            large[name] = tensor
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
    return large


def _convert(graph_model: onnx_ir.Model, keep: Sequence[str | None]) -> onnx_ir.Model:
    """Returns the graph converted to float16 by ONNX Runtime; the inputs and outputs in `keep` keep their dtypes."""
    float16 = float16_converter()
    proto = float16.convert_float_to_float16(
        onnx_ir.to_proto(graph_model),
        keep_io_types=keep,
        disable_shape_infer=True,
        op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPS],
        node_block_list=_name_between(graph_model.graph),
    )
    return onnx_ir.from_proto(proto)


def _put_back_in_half(graph: onnx_ir.Graph, large: dict[str, onnx_ir.TensorProtocol]) -> None:
    for value in [value for value in graph.inputs if value.name in large]:
        graph.inputs.remove(value)
        value.const_value = _cast(large[value.name or ""])
        graph.register_initializer(value)


def _name_between(graph: onnx_ir.Graph) -> list[str]:
    """Names the nodes between two `FLOAT32_OPS`, such as the addition of epsilon in a norm, and returns the names."""
    names = []
    for index, node in enumerate(graph):
        before = [value.producer() for value in node.inputs if value is not None]
        after = [user for output in node.outputs for user in output.consumers()]
        if _any_in_float32(before) and _any_in_float32(after):
            node.name = f"{_FLOAT32_PREFIX}{index}"
            names.append(node.name)
    return names


def _any_in_float32(nodes: Sequence[onnx_ir.Node | None]) -> bool:
    return any(node is not None and node.op_type in FLOAT32_OPS for node in nodes)


def _join_float32(graph_model: onnx_ir.Model) -> None:
    """Removes the casts to half precision and back between two nodes that both compute in float32."""
    for node in graph_model.graph:
        narrow = node.inputs[0].producer() if _casts_to(node, onnx_ir.DataType.FLOAT) and node.inputs[0] else None
        wide = narrow.inputs[0] if narrow is not None and _casts_to(narrow, onnx_ir.DataType.FLOAT16) else None
        source = wide.producer() if wide is not None else None
        if wide is None or source is None:
            continue
        if source.op_type in FLOAT32_OPS or (source.name or "").startswith(_FLOAT32_PREFIX):
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], wide)
    RemoveUnusedNodesPass()(graph_model)


def _casts_to(node: onnx_ir.Node, dtype: onnx_ir.DataType) -> bool:
    return node.op_type == "Cast" and node.attributes.get_int("to", 0) == dtype


def _cast(tensor: onnx_ir.TensorProtocol) -> onnx_ir.LazyTensor:
    """Returns `tensor` in half precision, converted whenever it is read; values beyond the range are clamped to it."""
    return onnx_ir.LazyTensor(
        lambda: onnx_ir.tensor(_rounded(tensor.numpy()), name=tensor.name),
        dtype=onnx_ir.DataType.FLOAT16,
        shape=onnx_ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )


def _rounded(values: np.ndarray) -> np.ndarray:
    limit = np.finfo(np.float16).max
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return np.clip(half, -limit, limit, out=half)
