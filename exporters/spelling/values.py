"""Known facts about a value: its axes, its constant, its producer; and shapes for reshapes."""

from collections.abc import Sequence

import numpy as np
import onnx_ir

Dims = tuple[int | str, ...]
_STANDARD = ("", "ai.onnx")
_SMALL = 8
"""The largest number of elements of a constant that is read."""


def dims_of(value: onnx_ir.Value | None) -> Dims | None:
    """Returns the size of each axis, a number or the name of a dynamic axis; None if the size of one is not known."""
    if value is None or value.shape is None:
        return None
    dims = [axis if isinstance(axis, int) else axis.value for axis in value.shape]
    return None if None in dims else tuple(axis if isinstance(axis, int) else str(axis) for axis in dims)


def num_axes(value: onnx_ir.Value | None) -> int | None:
    """Returns the number of axes, or None if it is not known."""
    return len(value.shape) if value is not None and value.shape is not None else None


def constant_of(value: onnx_ir.Value | None) -> np.ndarray | None:
    """Returns the constant that a value always has, or None if it is not known or has more than `_SMALL` elements."""
    tensor = value.const_value if value is not None and not value.is_graph_input() else None
    return tensor.numpy() if tensor is not None and tensor.size <= _SMALL else None


def is_given(value: onnx_ir.Value | None) -> bool:
    """Returns whether a value exists before any node runs: a constant or an input."""
    return value is not None and (value.const_value is not None or value.is_graph_input())


def is_standard(node: onnx_ir.Node, *op_types: str) -> bool:
    """Returns whether a node is a standard operator, of one of these types if any are passed."""
    return node.domain in _STANDARD and (not op_types or node.op_type in op_types)


def producer(value: onnx_ir.Value | None, op_type: str) -> onnx_ir.Node | None:
    """Returns the node that produces a value, or None if it is not a standard operator of this type."""
    node = value.producer() if value is not None else None
    return node if node is not None and is_standard(node, op_type) else None


def replace(node: onnx_ir.Node, new: Sequence[onnx_ir.Node], values: Sequence[onnx_ir.Value]) -> None:
    """Replaces `node` with the nodes `new`, and its outputs with `values`, which take over their names and shapes."""
    assert node.graph is not None
    onnx_ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, node.outputs, values)


def insert_after(graph: onnx_ir.Graph, value: onnx_ir.Value, node: onnx_ir.Node) -> None:
    """Inserts a node directly after the one that produces `value`, or at the start if there is none."""
    before = value.producer()
    if before is not None:
        graph.insert_after(before, node)
    else:
        graph.insert_before(graph[0], node)


def add_initializer(graph: onnx_ir.Graph, name: str, array: np.ndarray) -> onnx_ir.Value:
    """Adds an initializer to the graph, and returns it."""
    tensor = onnx_ir.tensor(array, name=name)
    value = onnx_ir.Value(
        name=name, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


class Shapes:
    """Shapes for reshapes in one graph, each built once.

    Two axes with the same name may have different lengths in a run, so a shape is identified by its source.
    """

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self._graph = graph
        self._constants: dict[tuple[int, ...], onnx_ir.Value] = {}
        self._leading: dict[onnx_ir.Value, onnx_ir.Value] = {}
        self._whole: dict[tuple[onnx_ir.Value, int], onnx_ir.Value] = {}

    def constant(self, sizes: Sequence[int]) -> onnx_ir.Value:
        """Returns a constant shape with these sizes."""
        key = tuple(sizes)
        if not self._is_there(self._constants.get(key)):
            name = f"shape.{'_'.join('any' if size == -1 else str(size) for size in key)}"
            self._constants[key] = add_initializer(self._graph, name, np.array(key, np.int64))
        return self._constants[key]

    def like(self, value: onnx_ir.Value, width: int) -> onnx_ir.Value:
        """Returns the shape of `value`, whose axes must be known, with `width` in place of the last axis."""
        dims = dims_of(value)
        assert dims is not None
        fixed = [axis for axis in dims[:-1] if isinstance(axis, int)]
        if len(fixed) == len(dims) - 1:
            return self.constant([*fixed, width])
        leading = self._leading_of(value, len(dims) - 1)
        if not self._is_there(self._whole.get((leading, width))):
            node = onnx_ir.node("Concat", [leading, self.constant([width])], {"axis": 0})
            insert_after(self._graph, leading, node)
            whole = _typed(node.outputs[0], len(dims))
            self._whole[leading, width] = whole
            self._leading[whole] = leading
        return self._whole[leading, width]

    def _is_there(self, value: onnx_ir.Value | None) -> bool:
        """Returns whether a value has been built, and no pass has since removed it as unused."""
        if value is None:
            return False
        node = value.producer()
        return node.graph is not None if node is not None else value.name in self._graph.initializers

    def _leading_of(self, value: onnx_ir.Value, length: int) -> onnx_ir.Value:
        """Returns the sizes of the axes before the last: those with which a view was built, else those of `Shape`."""
        view = producer(value, "Reshape")
        shape = view.inputs[1] if view is not None else None
        source = shape if shape is not None and not may_be_zero(shape) else value
        if not self._is_there(self._leading.get(source)):
            if source is shape:
                node = onnx_ir.node("Slice", [source, self.constant([0]), self.constant([-1])])
            else:
                node = onnx_ir.node("Shape", [source], {"start": 0, "end": length})
            insert_after(self._graph, source, node)
            self._leading[source] = _typed(node.outputs[0], length)
        return self._leading[source]


def may_be_zero(shape: onnx_ir.Value | None) -> bool:
    """Returns whether a size may be zero; `Reshape` replaces a zero with the size of its input."""
    sizes = constant_of(shape)
    if sizes is not None:
        return 0 in sizes
    if (joined := producer(shape, "Concat")) is not None:
        return any(may_be_zero(part) for part in joined.inputs)
    return producer(shape, "Shape") is None and producer(shape, "Slice") is None


def _typed(shape: onnx_ir.Value, length: int) -> onnx_ir.Value:
    shape.type, shape.shape = onnx_ir.TensorType(onnx_ir.DataType.INT64), onnx_ir.Shape([length])
    return shape
