"""ONNX Runtime's own operators for one of its providers, and where the weights are afterwards.

transformers' `fuse_for_onnxruntime` does the fusing. It packs the weights of products that share an input side by side
into one, as q, k and v of an attention. It never looks at their values, so each weight goes through it as a stand-in:
one byte an element, its number in the first bytes of every row. Packed ones are then read off, named after all that
they hold, and put together when the graph is saved: no weight is copied, and equal weights are told apart.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

from melora_fx import MELoRAError

from .build import quiet
from .weights import WeightPlace, add_initializer

FUSED_TARGETS = {"ort-cpu": "cpu", "ort-cuda": "cuda"}
"""Target → the provider whose fusions it gets."""

_STAND_IN_TYPE = onnx_ir.DataType.UINT8
_NUMBER_BYTES = 4


def fuse(graph_model: onnx_ir.Model, target: str, places: Mapping[str, WeightPlace]) -> dict[str, WeightPlace]:
    """Fuses the graph in place; the other targets' graphs stay as they are.

    Args:
        graph_model: a graph whose weights have been named.
        target: as for `export_onnx`.
        places: where the parameters live before.

    Returns:
        where they live afterwards.

    Raises:
        MELoRAError: where the fusions did something to a weight that is not known here.
    """
    if target not in FUSED_TARGETS:
        return dict(places)
    graph = graph_model.graph
    names = dict.fromkeys(place.initializer for place in places.values())
    tensors = {name: tensor for name in names if (tensor := _matrix(graph, name)) is not None}
    for number, name in enumerate(tensors, start=1):
        graph.initializers[name].const_value = _stand_in(number, tensors[name])
    with quiet():  # shape inference refuses the stand-ins' type; no fusion needs it
        fuse_for_onnxruntime(graph_model, FUSED_TARGETS[target])
    _flatten_attentions(graph)
    packed: dict[str, tuple[onnx_ir.Value, tuple[int, int]]] = {}
    for value in list(graph.initializers.values()):
        if value.const_value is None or value.const_value.dtype != _STAND_IN_TYPE:
            continue
        columns = _read_off(value, tensors)
        parts = [tensors[name] for name in columns]
        tensor = parts[0] if len(parts) == 1 else _side_by_side(parts, _joined([*columns]))
        value.const_value, value.type = tensor, onnx_ir.TensorType(tensor.dtype)
        value.shape = onnx_ir.Shape(tensor.shape.numpy())
        if len(parts) > 1:
            value.name = tensor.name
            packed |= {name: (value, span) for name, span in columns.items()}
    return {
        parameter: _place_in(packed.get(place.initializer), place)
        for parameter, place in places.items()
        if place.initializer in packed or place.initializer in graph.initializers
    }


def _flatten_attentions(graph: onnx_ir.Graph) -> None:
    """Gives a `Gemm` after an attention its (B·T, H·D) back, as torch's exporter writes it before an `addmm`.

    transformers 5.23 puts an attention's (B, T, H·D) in the place of its flattened output too.
    """
    for node in list(graph):
        states = node.inputs[0] if node.op_type == "Gemm" else None
        if states is None or node.inputs[1] is None or not _is_attention(states.producer()):
            continue
        rows, columns = node.inputs[1].shape or (None, None)
        width = columns if node.attributes.get_int("transB", 0) else rows
        shape = add_initializer(graph, f"{states.name}_flat", np.array([-1, width]))
        flatten = onnx_ir.node("Reshape", [states, shape])
        graph.insert_before(node, flatten)
        node.replace_input_with(0, flatten.outputs[0])


def _is_attention(node: onnx_ir.Node | None) -> bool:
    """Whether the node ends an attention in three dimensions: a fused one, or one written out for the CPU."""
    if node is None:
        return False
    if node.op_type == "Reshape":
        shape = node.inputs[1].const_value if node.inputs[1] is not None else None
        return shape is not None and shape.size == 3
    return node.op_type in ("MultiHeadAttention", "GroupQueryAttention", "Attention")


def _place_in(found: tuple[onnx_ir.Value, tuple[int, int]] | None, place: WeightPlace) -> WeightPlace:
    return place if found is None else WeightPlace(found[0].name or "", place.is_transposed, found[1])


def _matrix(graph: onnx_ir.Graph, name: str) -> onnx_ir.TensorProtocol | None:
    """The initializer's tensor, where a stand-in can take its place."""
    tensor = graph.initializers[name].const_value if name in graph.initializers else None
    if tensor is None or len(tensor.shape) != 2 or tensor.shape.numpy()[1] < _NUMBER_BYTES:
        return None
    return tensor


def _stand_in(number: int, tensor: onnx_ir.TensorProtocol) -> onnx_ir.TensorProtocol:
    rows, width = tensor.shape.numpy()
    return onnx_ir.tensor(np.broadcast_to(_row(number, width), (rows, width)), name=tensor.name)


def _row(number: int, width: int) -> np.ndarray:
    row = np.zeros(width, np.uint8)
    row[:_NUMBER_BYTES] = np.frombuffer(number.to_bytes(_NUMBER_BYTES, "little"), np.uint8)
    return row


def _read_off(value: onnx_ir.Value, tensors: Mapping[str, onnx_ir.TensorProtocol]) -> dict[str, tuple[int, int]]:
    """The weights whose stand-ins `value` holds side by side: name → its columns."""
    assert value.const_value is not None
    array, names = value.const_value.numpy(), [*tensors]
    row = array[0] if array.ndim == 2 else array
    found: dict[str, tuple[int, int]] = {}
    start = 0
    while start < row.size:
        number = int.from_bytes(row[start : start + _NUMBER_BYTES].tobytes(), "little")
        width = tensors[names[number - 1]].shape.numpy()[1] if 0 < number <= len(names) else 0
        if not width or not np.array_equal(row[start : start + width], _row(number, width)) or (array != row).any():
            raise MELoRAError(
                f"ONNX Runtime's fusions made `{value.name}` of weights, in a way that is not known here: export for "
                '`target="portable"`, which ONNX Runtime runs too'
            )
        found[names[number - 1]] = (start, start + width)
        start += width
    return found


def _side_by_side(parts: list[onnx_ir.TensorProtocol], name: str) -> onnx_ir.LazyTensor:
    """[W_1 | W_2 | …], put together whenever it is read."""
    rows, width = parts[0].shape.numpy()[0], sum(part.shape.numpy()[1] for part in parts)
    return onnx_ir.LazyTensor(
        lambda: onnx_ir.tensor(np.concatenate([part.numpy() for part in parts], axis=1), name=name),
        dtype=parts[0].dtype,
        shape=onnx_ir.Shape((rows, width)),
        name=name,
    )


def _joined(names: list[str]) -> str:
    """`a.query.weight.T`, `a.key.weight.T` → `a.{query,key}.weight.T`."""
    paths = [name.split(".") for name in names]
    first = _common(paths)
    last = _common([path[first:][::-1] for path in paths])
    middles = [".".join(path[first : len(path) - last]) for path in paths]
    end = len(paths[0]) - last
    return ".".join([*paths[0][:first], f"{{{','.join(middles)}}}", *paths[0][end:]])


def _common(paths: list[list[str]]) -> int:
    """Number of leading components that all paths share."""
    return next(
        (index for index, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), min(map(len, paths))
    )
