"""Removes rows that are never read: a classifier reads one token of each text, so its last layer needs no other.

    rows (B·T, I) → Gemm → Gelu → Gemm → as (B, T, O) → Gather token 0 (B, O)           becomes
    rows (B·T, I) → as (B, T, I) → Gather token 0 (B, I) → Gemm → Gelu → Gemm

The choice moves back to where tokens are mixed, an attention. It saves three quarters of the last layer: the output
projection and the MLP. Run `rows.py` on the graph first: operators over rows do not depend on the number of rows.
"""

import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .rows import DEFAULT_AXIS, ELEMENTWISE, as_rows
from .values import Shapes, constant_of, dims_of, insert_after, is_given, is_standard, num_axes, producer, replace

_TOKENS = 1
"""The axis of the tokens in (B, T, O)."""

_OF_BLOCKS = (1, 0, 2)
"""The permutation from (B·T, N, I) to (N, B·T, I), and back, in the updates of adapters in blocks."""


def choose_rows(model: onnx_ir.Model, shapes: Shapes) -> None:
    """Moves choices of a token by a constant index before operators on single tokens, in the main graph."""
    for node in list(model.graph):
        if is_standard(node, "Gather") and node.attributes.get_int("axis", 0) == _TOKENS and _has_one_index(node):
            _choose(model.graph, node, shapes)
    RemoveUnusedNodesPass()(model)
    model.graph.sort()


def _has_one_index(gather: onnx_ir.Node) -> bool:
    return num_axes(gather.inputs[1]) == 0 and constant_of(gather.inputs[1]) is not None


def _choose(graph: onnx_ir.Graph, gather: onnx_ir.Node, shapes: Shapes) -> None:
    view = gather.inputs[0]
    rows = as_rows(view)
    if rows is None or view is None or num_axes(view) != 3 or view.is_graph_output():
        return
    needless = _needed_by_these_alone(graph, {user for user in view.consumers() if _is_same_choice(user, gather)})
    if rows.producer() not in needless or _needs(view.producer().inputs[1], needless):  # type: ignore[union-attr]
        return
    chosen: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for node in [node for node in graph if node in needless and not _is_view(node)]:
        inputs = list(node.inputs)
        for index in _places_of_rows(node):
            value = inputs[index]
            assert value is not None
            inputs[index] = chosen.get(value) or _chosen_before(graph, value, view, gather, shapes, chosen)
        copy = onnx_ir.Node("", node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs))
        for own, new in zip(node.outputs, copy.outputs, strict=True):
            new.type, new.shape = own.type, own.shape
            chosen[own] = new
        graph.insert_before(node, copy)
    for user in [user for user in view.consumers() if _is_same_choice(user, gather)]:
        same = onnx_ir.node("Identity", [chosen[rows]])
        replace(user, [same], same.outputs)


def _is_same_choice(node: onnx_ir.Node, gather: onnx_ir.Node) -> bool:
    is_choice = is_standard(node, "Gather") and node.attributes.get_int("axis", 0) == _TOKENS
    return is_choice and _has_one_index(node) and constant_of(node.inputs[1]) == constant_of(gather.inputs[1])


def _needed_by_these_alone(graph: onnx_ir.Graph, users: set[onnx_ir.Node]) -> set[onnx_ir.Node]:
    """Returns the nodes over rows or blocks of rows whose outputs lead only to `users`."""
    usable = {node for node in graph if _is_view(node) or _works_on_rows(node)}
    while True:
        found: set[onnx_ir.Node] = set()
        for node in reversed(list(graph)):
            readers = {reader for output in node.outputs for reader in output.consumers()}
            is_output = any(output.is_graph_output() for output in node.outputs)
            if readers and not is_output and readers <= users | found and node in usable:
                found.add(node)
        of_whole_blocks = {node for node in found if num_axes(node.inputs[0]) == 3 and not _is_made_by(node, found)}
        if not of_whole_blocks:
            return found
        usable -= of_whole_blocks


def _is_made_by(node: onnx_ir.Node, nodes: set[onnx_ir.Node]) -> bool:
    """Returns whether one of `nodes` produces the first input of `node`."""
    value = node.inputs[0]
    return value is not None and value.producer() in nodes


def _needs(value: onnx_ir.Value | None, nodes: set[onnx_ir.Node]) -> bool:
    """Returns whether a value is computed from an output of `nodes`."""
    made_by = value.producer() if value is not None else None
    if made_by is None:
        return False
    return made_by in nodes or any(_needs(each, nodes) for each in made_by.inputs)


def _is_view(node: onnx_ir.Node) -> bool:
    """Returns whether a node restores the axes of rows."""
    return as_rows(node.outputs[0]) is not None


def _works_on_rows(node: onnx_ir.Node) -> bool:
    """Returns whether a node has rows (B·T, I), or rows of blocks, as its input and computes each row separately."""
    first = node.inputs[0] if node.inputs else None
    if not is_standard(node) or first is None or num_axes(first) not in (2, 3):
        return False
    if node.op_type == "Gemm":
        has_matrix = len(node.inputs) > 2 and num_axes(node.inputs[2]) != 1
        return not node.attributes.get_int("transA", 0) and not has_matrix and is_given(node.inputs[1])
    if node.op_type == "MatMul":
        return num_axes(node.inputs[1]) == num_axes(first) and is_given(node.inputs[1])
    if node.op_type == "Transpose":
        return num_axes(first) == 3 and tuple(node.attributes["perm"].as_ints()) == _OF_BLOCKS
    if node.op_type == "Reshape":
        return _is_reshape_of_rows(node)
    if num_axes(first) != 2:
        return False
    if node.op_type in ELEMENTWISE:
        return all(num_axes(value) in (0, 1) or _have_as_many_rows(value, node.outputs[0]) for value in node.inputs)
    return node.op_type in DEFAULT_AXIS and node.attributes.get_int("axis", DEFAULT_AXIS[node.op_type]) == -1


def _have_as_many_rows(value: onnx_ir.Value | None, other: onnx_ir.Value) -> bool:
    dims, others = dims_of(value), dims_of(other)
    return dims is not None and others is not None and len(dims) == 2 and dims[0] == others[0]


def _places_of_rows(node: onnx_ir.Node) -> list[int]:
    """Returns the indices of the inputs of a node over rows that are rows, or blocks of rows."""
    if node.op_type in ELEMENTWISE:
        return [index for index, value in enumerate(node.inputs) if num_axes(value) == 2]
    return [0]


def _is_reshape_of_rows(node: onnx_ir.Node) -> bool:
    """Returns whether a reshape splits each row into blocks, (B·T, I) → (B·T, N, I/N), or joins them again."""
    sizes = constant_of(node.inputs[1])
    if sizes is None or sizes[0] != -1:
        return False
    if len(sizes) == 3:
        first = _width_of_rows(node.inputs[0])
        return first is not None and first == sizes[1] * sizes[2]
    parted = producer(node.inputs[0], "Transpose")
    return len(sizes) == 2 and parted is not None and tuple(parted.attributes["perm"].as_ints()) == _OF_BLOCKS


def _width_of_rows(value: onnx_ir.Value | None) -> int | None:
    """Returns the width I of rows (B·T, I), or None for a value of other axes or a dynamic width."""
    width = value.shape[1] if value is not None and value.shape is not None and len(value.shape) == 2 else None
    return width if isinstance(width, int) else None


def _chosen_before(
    graph: onnx_ir.Graph,
    rows: onnx_ir.Value,
    view: onnx_ir.Value,
    gather: onnx_ir.Node,
    shapes: Shapes,
    chosen: dict[onnx_ir.Value, onnx_ir.Value],
) -> onnx_ir.Value:
    """Inserts the choice of the token from rows that stay whole, and returns the chosen rows."""
    width = _width_of_rows(rows)
    assert width is not None
    with_axes = onnx_ir.node("Reshape", [rows, shapes.like(view, width)])
    choice = onnx_ir.node("Gather", [with_axes.outputs[0], gather.inputs[1]], {"axis": _TOKENS})
    for node in (choice, with_axes):
        insert_after(graph, rows, node)
    result = choice.outputs[0]
    result.type, result.shape = rows.type, onnx_ir.Shape([None, width])
    chosen[rows] = result
    return result
