"""Fuses a graph into ONNX Runtime's own operators for a provider, and finds its weights afterwards.

transformers' `fuse_for_onnxruntime` does the fusing. It packs the weights of products that share an input, such as q, k
and v of an attention, side by side into one. Meanwhile numbered stand-ins (`stand_ins.py`) replace the weights.
"""

import numpy as np
import onnx_ir

from exporters.onnx_files.weight_place import WeightPlace
from exporters.private import fuse_for_onnxruntime, quick_matching
from exporters.spelling.values import add_initializer

from .clean import quiet
from .export import Export
from .stand_ins import PackedPlace, put_stand_ins, take_stand_ins


def fuse(export: Export) -> None:
    """Fuses the graph, whose weights must have been named, if the target has fusions, and updates `export.weights`.

    Raises:
        MELoRAError: if the fusions changed a weight in an unknown way.
    """
    provider = export.options.target.fusions
    if provider is None:
        return
    names = dict.fromkeys(place.initializer for place in export.weights.values())
    weights = put_stand_ins(export.graph, [*names])
    with quiet(), quick_matching():  # shape inference refuses the stand-ins' dtype, but no fusion needs it
        fuse_for_onnxruntime(export.graph_model, provider, has_cache=export.has_own_mask)
    _flatten_attentions(export.graph)
    packed = take_stand_ins(export.graph, weights)
    export.has_stale_types = True
    export.weights = {
        parameter: _place_in(packed.get(place.initializer), place)
        for parameter, place in export.weights.items()
        if place.initializer in packed or place.initializer in export.graph.initializers
    }


def _place_in(packed: PackedPlace | None, place: WeightPlace) -> WeightPlace:
    return place if packed is None else WeightPlace(packed.initializer, place.is_transposed, packed.columns)


def _flatten_attentions(graph: onnx_ir.Graph) -> None:
    """Flattens the input of a `Gemm` after an attention to (B·T, H·D), as torch's exporter does before an `addmm`.

    transformers 5.23 replaces that flattened value, too, with the attention's (B, T, H·D).
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
    """Returns whether the node ends an attention, fused or written out for the CPU, in three dimensions."""
    if node is None:
        return False
    if node.op_type == "Reshape":
        shape = node.inputs[1].const_value if node.inputs[1] is not None else None
        return shape is not None and shape.size == 3
    return node.op_type in ("MultiHeadAttention", "GroupQueryAttention", "Attention")
