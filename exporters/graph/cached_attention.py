"""Rewrites the nodes around ONNX Runtime's attention over a cache.

Lengths: the number of earlier tokens is computed from the mask, not from the cache. The runtime may pass one buffer for
past and present, large enough for the longest text (`past_present_share_buffer`). The attention then writes into the
memory of the past, and the sizes of the cache are those of the buffer. So lengths are computed from the sizes of the
mask and the tokens:

    past = mask.shape[1] - tokens.shape[1]        past + new = mask.shape[1]

Views: reshapes that split heads off and join them again between two operators on (batch, tokens, width) are removed.

Zeros: transformers' exporter sets the result of each attention to zero at padded tokens. These zeros are removed: ONNX
Runtime's attention returns a mean of the values there, and nothing reads it.
"""

import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporters.decoders.step_conditions import ONE_TOKEN_OR_TEXT
from exporters.onnx_files.cache_names import MASK, TOKENS, is_cross, is_past

from .export import CACHED_ATTENTION, Export

_LENGTH_AXIS = 2


def read_lengths_off_mask(export: Export) -> None:
    """Computes the lengths of past and present from the mask, if the graph has an attention that extends the cache
    itself, and adds that attention's condition to `export.conditions`.
    """
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
    """Puts `length` into the result of a `Shape` of `value`, if it has that axis; returns the nodes to insert."""
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


def drop_needless_views(export: Export) -> None:
    """Removes the zeros at padding, and reshapes that only restore an earlier shape, around these attentions.

    In half precision the zeros stay: the number added to the scores of masked tokens is near the dtype's limit.
    """
    if not export.has_one_token_steps:
        return
    if export.options.precision.convert is None:
        for node in [node for node in export.graph if node.op_type == "Where"]:
            if (states := _zeroed(node)) is not None:
                onnx_ir.convenience.replace_all_uses_with(node.outputs[0], states)
    for node in [node for node in export.graph if node.op_type == "Reshape"]:
        source = _same_before(node)
        if source is not None:
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], source)
    RemoveUnusedNodesPass()(export.graph_model)


def _zeroed(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """Returns the attention's result that a `Where` sets to zero at fully masked tokens; None for any other `Where`."""
    condition, zeros, states = node.inputs
    constant = zeros.const_value if zeros is not None else None
    if constant is None or constant.size != 1 or constant.numpy().item() != 0:
        return None
    before = _producer(condition)
    if before is not None and before.op_type == "Transpose":
        before = _producer(before.inputs[0])
    counted = _producer(before.inputs[0]) if before is not None and before.op_type == "Less" else None
    attention = _producer(_without_reshapes(states))
    if counted is None or counted.op_type != "ReduceSum" or attention is None:
        return None
    return states if attention.op_type == CACHED_ATTENTION else None


def _same_before(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """Returns the earlier value whose shape (batch, tokens, width) a chain of reshapes restores, else None."""
    leading = _leading(node.outputs[0])
    value = node.inputs[0]
    while leading is not None and leading[1] == _JOINED and (before := _producer(value)) is not None:
        if before.op_type != "Reshape":
            return None
        value = before.inputs[0]
        if value is not None and _leading(value) == leading:
            return value
    return None


_JOINED = 3
"""Number of dimensions of states whose heads are side by side."""


def _leading(value: onnx_ir.Value | None, depth: int = 8) -> tuple[tuple[str, ...], int] | None:
    """Returns the first two axes of a value and its number of axes, if they are known or follow from its producers."""
    if value is None or depth == 0:
        return None
    if value.shape is not None and all(_is_known(axis) for axis in value.shape[:2]):
        return tuple(map(str, value.shape[:2])), len(value.shape)
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Reshape":
        shape = node.inputs[1].const_value if node.inputs[1] is not None else None
        source = _leading(node.inputs[0], depth - 1)
        if shape is None or source is None or shape.numpy()[:2].tolist() != [0, 0]:
            return None
        return source[0], shape.size
    if node.op_type in ("MatMul", "Split", "Add", "RotaryEmbedding", CACHED_ATTENTION):
        return _leading(node.inputs[0], depth - 1)
    return None


def _is_known(axis: int | onnx_ir.SymbolicDim) -> bool:
    return isinstance(axis, int) or axis.value is not None


def _without_reshapes(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    while (node := _producer(value)) is not None and node.op_type == "Reshape":
        value = node.inputs[0]
    return value


def _producer(value: onnx_ir.Value | None) -> onnx_ir.Node | None:
    return value.producer() if value is not None else None
