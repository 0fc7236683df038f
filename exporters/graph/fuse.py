"""ONNX Runtime's own operators for one of its providers, and where the weights are afterwards.

transformers' `fuse_for_onnxruntime` does the fusing. It packs the weights of products that share an input side by side
into one, as q, k and v of an attention. It never looks at their values, so each weight goes through it as a stand-in:
one byte an element, its number in the first bytes of every row. Packed ones are then read off, named after all that
they hold, and put together when the graph is saved: no weight is copied, and equal weights are told apart.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir

from exporters.onnx_files.weight_place import WeightPlace
from exporters.private import fuse_for_onnxruntime

from .clean import quiet
from .stand_ins import STAND_IN_TYPE, joined_name, matrix_of, read_off, side_by_side, stand_in
from .weights import add_initializer

FUSED_TARGETS = {"ort-cpu": "cpu", "ort-cuda": "cuda"}
"""Target → the provider whose fusions it gets."""


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
    tensors = {name: tensor for name in names if (tensor := matrix_of(graph, name)) is not None}
    for number, name in enumerate(tensors, start=1):
        graph.initializers[name].const_value = stand_in(number, tensors[name])
    with quiet():  # shape inference refuses the stand-ins' type; no fusion needs it
        fuse_for_onnxruntime(graph_model, FUSED_TARGETS[target])
    _flatten_attentions(graph)
    packed: dict[str, tuple[onnx_ir.Value, tuple[int, int]]] = {}
    for value in list(graph.initializers.values()):
        if value.const_value is None or value.const_value.dtype != STAND_IN_TYPE:
            continue
        columns = read_off(value, tensors)
        parts = [tensors[name] for name in columns]
        tensor = parts[0] if len(parts) == 1 else side_by_side(parts, joined_name([*columns]))
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
