"""Finds the nodes of an ONNX graph that TensorRT would not build, and the reasons.

A graph may compute a shape from other shapes and from constants: exporters write chains of Shape, Gather, Concat,
Reshape. The *values* of an input must not decide a shape: they are known only on the GPU, after the engine has been
built for its range of shapes. So the values of the inputs are traced through the graph: the outputs of a node depend on
them if one of its inputs does, unless the node is a Shape or a Size.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir
from onnx_ir import AttributeType
from onnx_ir.convenience import get_const_tensor

from melora_fx import MELoRAError

from .operators import IO_TYPES, OPSETS, RESTRICTIONS, SHAPE_INPUTS, TABLE, TYPES, VALUE_SHAPED, Restriction

_MAIN_INPUT = {"OneHot": 2, "Where": 1}
_MAIN_OUTPUT = ("Constant", "ConstantOfShape", "EyeLike", "If", "Loop", "RandomNormalLike", "RandomUniformLike")
_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Obstacle:
    """A node, an input or output, or an opset of a graph that TensorRT would not build, and the reason."""

    node: str
    op_type: str
    reason: str


@dataclass
class _Known:
    """Known facts about a graph's values that the values themselves do not store.

    Attributes:
        opset: the ONNX operator set of the graph.
        constants: the values that are constant.
        from_values: the values that depend on the values of the graph's inputs.
    """

    opset: int
    constants: set[onnx_ir.Value] = field(default_factory=set)
    from_values: set[onnx_ir.Value] = field(default_factory=set)


def find_obstacles(model: onnx_ir.Model) -> tuple[Obstacle, ...]:
    """Returns everything that keeps TensorRT from building the whole of a graph; external data is not read.

    Raises:
        MELoRAError: if the types of the graph cannot be inferred.
    """
    try:
        proto = onnx_ir.to_proto(model)
        proto = onnx.inliner.inline_local_functions(proto) if proto.functions else proto
        graph = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto)).graph
    except Exception as error:  # the C++ code raises its own kinds of errors
        raise MELoRAError(f"the types of the graph `{model.graph.name}` cannot be inferred: {error}") from error
    opset = next((model.opset_imports[domain] for domain in _DOMAINS if domain in model.opset_imports), OPSETS[0])
    found = []
    if not OPSETS[0] <= opset <= OPSETS[1]:
        found.append(Obstacle("", "graph", f"opset {opset}: TensorRT supports {OPSETS[0]} to {OPSETS[1]}"))
    known = _Known(opset, from_values={value for value in graph.inputs if not value.is_initializer()})
    return (*found, *_check_ends(graph), *_walk(graph, known, ""))


def group_obstacles(obstacles: tuple[Obstacle, ...]) -> list[str]:
    """Returns one line per operator and reason, with the first two nodes and the number of further ones."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for obstacle in obstacles:
        grouped.setdefault((obstacle.op_type, obstacle.reason), []).append(obstacle.node)
    lines = []
    for (op_type, reason), nodes in grouped.items():
        names = ", ".join(f"`{name}`" for name in nodes[:2] if name)
        if len(nodes) > 2:
            names += f" and {len(nodes) - 2} more"
        lines.append(f"{op_type} {names}: {reason}" if names else f"{op_type}: {reason}")
    return lines


def refuse_obstacles(model: onnx_ir.Model, name: str) -> None:
    """Checks that TensorRT builds the whole of a graph.

    Raises:
        MELoRAError: if it does not; names everything that would not build. `name` is the graph's name in the text.
    """
    if lines := group_obstacles(find_obstacles(model)):
        raise MELoRAError(
            f"TensorRT would not build all of `{name}`:\n"
            + "\n".join(lines)
            + '\nchange the model, or export it for another runtime: `target="ort-cuda"` or "portable"'
        )


def _check_ends(graph: onnx_ir.Graph) -> Iterator[Obstacle]:
    for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
        for value in values:
            name = value.name or ""
            if kind == "input" and value.is_initializer():
                yield Obstacle(name, kind, "optional: TensorRT builds its default in, and no value can be passed")
            elif not isinstance(value.type, onnx_ir.TensorType):
                yield Obstacle(name, kind, "not a tensor")
            elif value.type.dtype.name not in IO_TYPES:
                yield Obstacle(name, kind, f"{value.type.dtype.name}: TensorRT does not accept it")


def _walk(graph: onnx_ir.Graph, known: _Known, path: str) -> Iterator[Obstacle]:
    known.constants.update(graph.initializers.values())
    for index, node in enumerate(graph):
        name = path + (node.name or f"{node.op_type} {index}")
        yield from (Obstacle(name, _full_type(node), reason) for reason in _reasons(node, known))
        _follow(node, known)
        for attribute, subgraph in _subgraphs(node):
            yield from _walk(subgraph, known, f"{name}/{attribute}/")


def _subgraphs(node: onnx_ir.Node) -> list[tuple[str, onnx_ir.Graph]]:
    """Returns (name of the attribute, graph) for each subgraph of a node."""
    return [(name, each.as_graph()) for name, each in node.attributes.items() if each.type == AttributeType.GRAPH]


def _full_type(node: onnx_ir.Node) -> str:
    return node.op_type if node.domain in _DOMAINS else f"{node.domain}.{node.op_type}"


def _reasons(node: onnx_ir.Node, known: _Known) -> Iterator[str]:
    if node.domain not in _DOMAINS:
        yield f"an operator of the domain {node.domain}, which TensorRT does not know"
        return
    if node.op_type in VALUE_SHAPED:
        yield "the shape of its output depends on values, not on shapes"
    deciding = [value for value in _shape_inputs(node) if value in known.from_values]
    if deciding:
        names = ", ".join(f"`{value.name}`" for value in deciding)
        yield f"the values of {names} decide the shape of its output; only shapes and constants may"
    if node.op_type not in TYPES:
        yield f"not among the operators of {TABLE}"
        return
    if wrong := sorted(_main_types(node, known.opset) - TYPES[node.op_type]):
        yield f"{', '.join(wrong)} is not among its types: {', '.join(sorted(TYPES[node.op_type]))}"
    for restriction in RESTRICTIONS.get(node.op_type, ()):
        if (reason := _violation(node, restriction, known)) is not None:
            yield reason


def _shape_inputs(node: onnx_ir.Node) -> list[onnx_ir.Value]:
    """Returns the inputs whose values decide the shape of the node's output."""
    places = SHAPE_INPUTS.get(node.op_type, ())
    if node.op_type == "Loop":
        has_scan_outputs = len(node.outputs) > len(node.inputs) - 2  # all but trip count and condition are carried
        places = (0, 1) if has_scan_outputs else ()
    return [value for place in places if (value := _at(node.inputs, place)) is not None]


def _main_types(node: onnx_ir.Node, opset: int) -> set[str]:
    """Returns the element types of the tensors that the node computes with: those that share its main input's type."""
    schema = _schema(node.op_type, opset)
    if schema is None or (len(node.inputs) and not schema.inputs):  # it has inputs, and its operator has none
        return set()
    inputs = [(_formal(schema.inputs, place).type_str, value) for place, value in enumerate(node.inputs)]
    outputs = [(_formal(schema.outputs, place).type_str, value) for place, value in enumerate(node.outputs)]
    main = None  # all tensors
    if node.op_type in _MAIN_OUTPUT or not schema.inputs:
        main = schema.outputs[0].type_str
    elif node.op_type != "Cast":
        main = schema.inputs[_MAIN_INPUT.get(node.op_type, 0)].type_str
    return {
        value.dtype.name
        for kind, value in (*inputs, *outputs)
        if value is not None and value.dtype and main in (None, kind)
    }


@functools.cache
def _schema(op_type: str, opset: int) -> Any:
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:  # not in this opset: the operator is only a name in the table
        return None


def _formal(parameters: Any, place: int) -> Any:
    return parameters[min(place, len(parameters) - 1)]  # the last one may be variadic


def _at(values: Sequence[onnx_ir.Value | None], place: int) -> onnx_ir.Value | None:
    """Returns an input or output, or None if it is left out; one that is left out has no name."""
    value = values[place] if place < len(values) else None
    return value if value is not None and value.name else None


def _violation(node: onnx_ir.Node, restriction: Restriction, known: _Known) -> str | None:
    """Describes how a node violates a restriction; returns None if it does not."""
    place = restriction.place
    if isinstance(place, str):
        return _attribute_violation(node, place, restriction.allowed)
    if restriction.kind == "no_output":
        output = _at(node.outputs, place)
        return f"its output {place}, `{output.name}`, is not supported" if output else None
    value = _at(node.inputs, place)
    if value is None:
        return None
    if restriction.kind == "no_input":
        return f"its input {place}, `{value.name}`, is not supported"
    return _input_violation(value, restriction, value in known.constants)


def _attribute_violation(node: onnx_ir.Node, name: str, allowed: tuple[Any, ...]) -> str | None:
    values = _values(node.attributes[name]) if name in node.attributes else ()
    if all(value in allowed for value in values):
        return None
    choice = f"must be {' or '.join(map(str, allowed))}" if allowed else "is not supported"
    return f"its attribute `{name}` (={', '.join(map(str, values))}) {choice}"


def _input_violation(value: onnx_ir.Value, restriction: Restriction, is_constant: bool) -> str | None:
    allowed = restriction.allowed
    if restriction.kind == "rank":
        if value.shape is None or len(value.shape) in allowed:
            return None
        return f"`{value.name}` has {len(value.shape)} axes, not {' or '.join(map(str, allowed))}"
    if restriction.kind == "constant":
        return None if is_constant else f"`{value.name}` must be a constant"
    numbers = _numbers(value)
    if restriction.kind == "below":
        if numbers is None or numbers.max() < allowed[0]:
            return None
        return f"`{value.name}` (={numbers.max()}) must be below {allowed[0]}"
    is_zero = is_constant and (numbers is None or not numbers.any())
    return None if is_zero else f"`{value.name}` must be a constant zero"


def _values(attribute: onnx_ir.Attr) -> tuple[Any, ...]:
    if attribute.type in (AttributeType.TENSOR, AttributeType.SPARSE_TENSOR):
        return ("a tensor",)
    return tuple(attribute.value) if isinstance(attribute.value, (list, tuple)) else (attribute.value,)


def _numbers(value: onnx_ir.Value) -> np.ndarray | None:
    """Returns a constant's values, or None if the value is empty, computed, or stored in another file."""
    tensor = get_const_tensor(value)
    if tensor is None or isinstance(tensor, onnx_ir.ExternalTensor) or not tensor.size:
        return None
    return tensor.numpy()


def _follow(node: onnx_ir.Node, known: _Known) -> None:
    """Records whether a node's outputs are constants, or depend on the values of the graph's inputs."""
    used = _used(node)
    if node.op_type == "Constant" or (used and used <= known.constants):
        known.constants.update(node.outputs)
    elif node.op_type not in ("Shape", "Size") and used & known.from_values:
        known.from_values.update(node.outputs)
        for _, subgraph in _subgraphs(node):  # a loop's carried and scanned values depend on its inputs
            skipped = 2 if node.op_type == "Loop" else 0  # except iteration number and condition
            known.from_values.update(subgraph.inputs[skipped:])


def _used(node: onnx_ir.Node) -> set[onnx_ir.Value]:
    """Returns the values that a node and its subgraphs use, including values of the graphs around them."""
    used = {value for value in node.inputs if value is not None}
    for _, subgraph in _subgraphs(node):
        used.update(*map(_used, subgraph), subgraph.outputs)
    return used
