"""The number of earlier tokens, read off the mask and not off the cache.

ONNX Runtime's attention over a cache writes into the memory of the past where the runtime gives a buffer for the
longest text, past and present in one (`past_present_share_buffer`). The sizes of the cache are the buffer's then. What
a graph computes of them is computed of those of the mask and the tokens instead:

    past = mask.shape[1] - tokens.shape[1]        past + new = mask.shape[1]
"""

import onnx_ir

from exporters.decoders.step_conditions import ONE_TOKEN_OR_TEXT
from exporters.onnx_files.cache_names import MASK, TOKENS, is_cross, is_past

from .export import CACHED_ATTENTION, Export

_LENGTH_AXIS = 2


def read_lengths_off_mask(export: Export) -> None:
    """Replaces the lengths of past and present wherever the graph has an attention that updates the cache itself."""
    attentions = [node for node in export.graph if node.op_type == CACHED_ATTENTION]
    if not export.has_own_mask or not attentions:
        return
    inputs = {value.name: value for value in export.graph.inputs}
    total, new = _length(inputs[MASK]), _length(inputs[TOKENS])
    past = onnx_ir.node("Sub", [total.outputs[0], new.outputs[0]])
    added = [total, new, past]
    pasts = [value for name, value in inputs.items() if is_past(name or "") and not is_cross(name or "")]
    presents = [output for node in attentions for output in node.outputs[1:3]]
    for values, length in ((pasts, past.outputs[0]), (presents, total.outputs[0])):
        for value in values:
            for node in [node for node in value.consumers() if node.op_type == "Shape"]:
                added += _replace_length(node, value, length)
    first = next(iter(export.graph))
    export.graph.insert_before(first, added)
    export.graph.sort()
    export.conditions.append(ONE_TOKEN_OR_TEXT)
    export.has_stale_types = True


def _length(value: onnx_ir.Value) -> onnx_ir.Node:
    return _shape(value, 1, 2)


def _shape(value: onnx_ir.Value, start: int, end: int) -> onnx_ir.Node:
    node = onnx_ir.node("Shape", [value], {"start": start, "end": end})
    node.outputs[0].dtype, node.outputs[0].shape = onnx_ir.DataType.INT64, onnx_ir.Shape([end - start])
    return node


def _replace_length(node: onnx_ir.Node, value: onnx_ir.Value, length: onnx_ir.Value) -> list[onnx_ir.Node]:
    """Puts `length` into a `Shape` of `value`, where it asks for it; returns the nodes that are needed for that."""
    rank = 4
    start, end, _ = slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", rank)).indices(rank)
    if not start <= _LENGTH_AXIS < end:
        return []
    before = [_shape(value, start, _LENGTH_AXIS)] if start < _LENGTH_AXIS else []
    after = [_shape(value, _LENGTH_AXIS + 1, end)] if end > _LENGTH_AXIS + 1 else []
    parts = [*(part.outputs[0] for part in before), length, *(part.outputs[0] for part in after)]
    joined = [onnx_ir.node("Concat", parts, {"axis": 0})] if len(parts) > 1 else []
    onnx_ir.convenience.replace_all_uses_with(node.outputs[0], joined[0].outputs[0] if joined else length)
    node.graph.remove(node, safe=True)  # type: ignore[union-attr]
    return [*before, *after, *joined]
