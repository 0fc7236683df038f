"""Computes products with one matrix, and the operators between two products, over all rows at once.

    x (B, T, I) → MatMul W → Add b → Gelu → MatMul V                                  becomes
    x → Reshape (B·T, I) → MatMul W → Add b → Gelu → MatMul V → Reshape (B, T, O)

Then `gemm.py` can write a product and its bias as one operator. Operators that work on each row separately
(activations, normalisations, residual sums) use rows too. The axes are restored only for operators that need them,
such as an attention.
"""

import math

import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .values import (
    Dims,
    Shapes,
    constant_of,
    dims_of,
    insert_after,
    is_standard,
    may_be_zero,
    num_axes,
    producer,
    replace,
)

ELEMENTWISE = {
    "Abs", "Add", "Cast", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Mul",
    "Neg", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Sum", "Swish", "Tanh",
}  # fmt: skip

DEFAULT_AXIS = {"LayerNormalization": -1, "RMSNormalization": -1, "LogSoftmax": -1, "Softmax": -1, "Split": 0}
"""Operator with an attribute `axis` → the default of `axis`."""


def flatten_rows(model: onnx_ir.Model, shapes: Shapes) -> None:
    """Rewrites the nodes of the main graph whose axes are known."""
    _Flattening(model.graph, shapes).run()
    RemoveUnusedNodesPass()(model)


class _Flattening:
    """One walk over a graph."""

    def __init__(self, graph: onnx_ir.Graph, shapes: Shapes) -> None:
        self._graph = graph
        self._shapes = shapes
        self._rows: dict[onnx_ir.Value, onnx_ir.Value] = {}

    def run(self) -> None:
        for node in list(self._graph):
            if is_standard(node, "Reshape"):
                self._join(node)
            elif any(output.is_graph_output() for output in node.outputs):
                continue  # a reshape after it would have to copy
            elif is_standard(node) and (_is_product(node) or _starts_rows(node) or _continues_rows(node)):
                self._flatten(node)

    def _flatten(self, node: onnx_ir.Node) -> None:
        """Replaces `node` with the same operator over rows, and reshapes of its outputs."""
        dims = _leading(node.outputs[0])
        of_rows = [value for value in node.inputs if value is not None and _leading(value) == dims]
        inputs = [self._rows_of(value) if value in of_rows else value for value in node.inputs]
        attributes = [attribute for name, attribute in node.attributes.items() if name != "axis"]
        if node.op_type in DEFAULT_AXIS:
            attributes.append(onnx_ir.AttrInt64("axis", -1))
        if node.op_type == "ReduceMean":
            inputs[1] = self._shapes.constant([-1])
        num_outputs = len(node.outputs)
        over_rows = onnx_ir.Node("", node.op_type, inputs, attributes, num_outputs=num_outputs, version=node.version)
        views = []
        for output, rows in zip(node.outputs, over_rows.outputs, strict=True):
            width = _known_width(output)
            rows.type, rows.shape = output.type, onnx_ir.Shape([_num_rows(dims), width])
            views.append(onnx_ir.node("Reshape", [rows, self._shapes.like(of_rows[0], width)]))
        replace(node, [over_rows, *views], [view.outputs[0] for view in views])

    def _rows_of(self, value: onnx_ir.Value) -> onnx_ir.Value:
        """Returns a value as rows; inserts a reshape if there are no rows yet."""
        rows = as_rows(value) or self._rows.get(value)
        if rows is None:
            width = _known_width(value)
            view = onnx_ir.node("Reshape", [value, self._shapes.constant([-1, width])])
            insert_after(self._graph, value, view)
            rows = self._rows[value] = view.outputs[0]
            rows.type, rows.shape = value.type, onnx_ir.Shape([_num_rows(_leading(value)), width])
            self._join(view)
        return rows

    def _join(self, node: onnx_ir.Node) -> None:
        """Connects a reshape of a reshape to the input of the first one, or removes it if it restores that input."""
        view, output = node.inputs[0], node.outputs[0]
        if view is None or _may_copy_axes(node):
            return
        rows = as_rows(view) or self._rows.get(view)
        if rows is not None and rows is not output:
            if num_axes(output) == 2 and _width(output) == _width(rows) and not output.is_graph_output():
                onnx_ir.convenience.replace_all_uses_with(output, rows)
            else:
                node.replace_input_with(0, rows)
        elif (first := producer(view, "Reshape")) is not None:
            node.replace_input_with(0, first.inputs[0])


def _is_product(node: onnx_ir.Node) -> bool:
    """Returns whether a node multiplies rows along several axes by one matrix."""
    if node.op_type != "MatMul" or num_axes(node.inputs[1]) != 2 or _width(node.outputs[0]) is None:
        return False
    return _has_more_axes(node.inputs[0]) and _leading(node.inputs[0]) == _leading(node.outputs[0])


def _starts_rows(node: onnx_ir.Node) -> bool:
    """Returns whether a node is a normalisation of rows along several axes.

    ONNX Runtime fuses a sum with three known axes and the normalisation after it into an operator that is slower on a
    CPU.
    """
    return node.op_type == "LayerNormalization" and _has_more_axes(node.inputs[0]) and _is_rowwise(node)


def _continues_rows(node: onnx_ir.Node) -> bool:
    return any(as_rows(value) is not None for value in node.inputs) and _is_rowwise(node)


def _is_rowwise(node: onnx_ir.Node) -> bool:
    """Returns whether each row of the outputs depends only on the same row of the inputs."""
    dims = _leading(node.outputs[0])
    if dims is None or any(_leading(output) != dims or _width(output) is None for output in node.outputs):
        return False
    if node.op_type in ELEMENTWISE:
        return all(_leading(value) == dims or _is_one_row(value) for value in node.inputs)
    if _leading(node.inputs[0]) != dims:
        return False
    if node.op_type == "ReduceMean":
        return _axes_of_mean(node) in ([-1], [len(dims)]) and bool(node.attributes.get_int("keepdims", 1))
    default = DEFAULT_AXIS.get(node.op_type)
    return default is not None and node.attributes.get_int("axis", default) in (-1, len(dims))


def _axes_of_mean(node: onnx_ir.Node) -> list[int] | None:
    axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    return axes.tolist() if axes is not None else None


def _leading(value: onnx_ir.Value | None) -> Dims | None:
    """Returns the axes before the last, or None if there are none or not all axes are known."""
    dims = dims_of(value)
    return dims[:-1] if dims is not None and len(dims) > 1 else None


def _num_rows(dims: Dims | None) -> int | str:
    """Returns the product of leading axes, as a string if one is dynamic."""
    assert dims is not None
    fixed = [axis for axis in dims if isinstance(axis, int)]
    return math.prod(fixed) if len(fixed) == len(dims) else "*".join(map(str, dims))


def _has_more_axes(value: onnx_ir.Value | None) -> bool:
    """Returns whether a value consists of rows of a known width along several axes."""
    dims = _leading(value)
    return dims is not None and len(dims) > 1 and _width(value) is not None


def _width(value: onnx_ir.Value | None) -> int | None:
    """Returns the size of the last axis of a value, or None if it is dynamic or there is none."""
    last = value.shape[-1] if value is not None and value.shape else None
    return last if isinstance(last, int) else None


def _known_width(value: onnx_ir.Value) -> int:
    width = _width(value)
    assert width is not None
    return width


def _is_one_row(value: onnx_ir.Value | None) -> bool:
    """Returns whether a value is a number or one row, and so the same for every row."""
    axes = num_axes(value)
    return axes is not None and axes <= 1


def as_rows(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """Returns the rows of which a value with more axes is a view, or None if it is not a view of rows."""
    view = producer(value, "Reshape")
    if view is None or num_axes(view.inputs[0]) != 2 or not _has_more_axes(value):
        return None
    return view.inputs[0] if _width(value) == _width(view.inputs[0]) else None


def _may_copy_axes(node: onnx_ir.Node) -> bool:
    """Returns whether a reshape may copy the size of an axis from its input, which a zero in its shape requests."""
    return not node.attributes.get_int("allowzero", 0) and may_be_zero(node.inputs[1])
