"""Which nodes of an ONNX graph TensorRT would not build, and why.

A shape may be computed in the graph, from other shapes and from constants: exporters write chains of Shape, Gather,
Concat, Reshape. What may not decide a shape is the *values* of an input: they are known on the GPU only, after the
engine has been built for its range of shapes. So each tensor is followed from the inputs: its values depend on theirs,
unless it is a Shape or a Size.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from melora_fx import MELoRAError

from .operators import IO_TYPES, OPSETS, RESTRICTIONS, SHAPE_INPUTS, TABLE, TYPES, VALUE_SHAPED, Restriction

_MAIN_INPUT = {"OneHot": 2, "Where": 1}
_MAIN_OUTPUT = ("Constant", "ConstantOfShape", "EyeLike", "If", "Loop", "RandomNormalLike", "RandomUniformLike")
_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Obstacle:
    """What TensorRT would not build: a node, or an input of the graph, and why."""

    node: str
    op_type: str
    reason: str


@dataclass
class _Tensors:
    """What is known of a graph's tensors by name; subgraphs see those of the graphs around them."""

    opset: int
    types: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    constants: dict[str, TensorProto | None] = field(default_factory=dict)
    from_values: set[str] = field(default_factory=set)


def find_obstacles(model: ModelProto) -> tuple[Obstacle, ...]:
    """Everything in a graph that keeps TensorRT from building the whole of it; external data is not read.

    Raises:
        MELoRAError: for a graph whose types cannot be inferred.
    """
    try:
        model = onnx.inliner.inline_local_functions(model) if model.functions else model
        model = onnx.shape_inference.infer_shapes(model)
    except Exception as error:  # the C++ code raises its own kinds
        raise MELoRAError(f"the types of the graph `{model.graph.name}` cannot be inferred: {error}") from error
    opset = next((entry.version for entry in model.opset_import if entry.domain in _DOMAINS), OPSETS[0])
    found = []
    if not OPSETS[0] <= opset <= OPSETS[1]:
        found.append(Obstacle("", "graph", f"opset {opset}: TensorRT takes {OPSETS[0]} to {OPSETS[1]}"))
    found += _walk(model.graph, _Tensors(opset), "")
    return tuple(found)


def group_obstacles(obstacles: tuple[Obstacle, ...]) -> list[str]:
    """One line for each operator and reason: how many nodes, and the first of them."""
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


def refuse_obstacles(model: ModelProto, name: str) -> None:
    """Lets pass only graphs that TensorRT builds whole.

    Raises:
        MELoRAError: names everything that would not build; `name` is the graph's, for the text.
    """
    if lines := group_obstacles(find_obstacles(model)):
        raise MELoRAError(
            f"TensorRT would not build all of `{name}`:\n"
            + "\n".join(lines)
            + '\nchange the model, or export it for another runtime: `target="ort-cuda"` or "portable"'
        )


def _walk(graph: GraphProto, tensors: _Tensors, path: str) -> Iterator[Obstacle]:
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for name, tensor in initializers.items():
        tensors.constants[name] = tensor
        tensors.types[name] = TensorProto.DataType.Name(tensor.data_type)
        tensors.ranks[name] = len(tensor.dims)
    for value in (*graph.input, *graph.output, *graph.value_info):
        _note(value, tensors)
    if not path:
        yield from _check_inputs(graph, initializers, tensors)
        tensors.from_values.update(value.name for value in graph.input if value.name not in initializers)
    for index, node in enumerate(graph.node):
        name = path + (node.name or f"{node.op_type} {index}")
        yield from (Obstacle(name, _full_type(node), reason) for reason in _reasons(node, tensors))
        _follow(node, tensors)
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _walk(attribute.g, tensors, f"{name}/{attribute.name}/")


def _note(value: ValueInfoProto, tensors: _Tensors) -> None:
    kind = value.type.tensor_type
    if value.type.HasField("tensor_type") and kind.elem_type:
        tensors.types[value.name] = TensorProto.DataType.Name(kind.elem_type)
    if kind.HasField("shape"):
        tensors.ranks[value.name] = len(kind.shape.dim)


def _check_inputs(graph: GraphProto, initializers: dict[str, TensorProto], tensors: _Tensors) -> Iterator[Obstacle]:
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            if kind == "input" and value.name in initializers:
                yield Obstacle(value.name, kind, "optional: TensorRT builds its default in, and nothing can be given")
            elif not value.type.HasField("tensor_type"):
                yield Obstacle(value.name, kind, "not a tensor")
            elif tensors.types.get(value.name) not in IO_TYPES:
                element_type = tensors.types.get(value.name, "no type")
                yield Obstacle(value.name, kind, f"{element_type}: TensorRT does not take it")


def _full_type(node: NodeProto) -> str:
    return node.op_type if node.domain in _DOMAINS else f"{node.domain}.{node.op_type}"


def _reasons(node: NodeProto, tensors: _Tensors) -> Iterator[str]:
    if node.domain not in _DOMAINS:
        yield f"an operator of the domain {node.domain}, which TensorRT does not know"
        return
    if node.op_type in VALUE_SHAPED:
        yield "the shape of its output depends on values, not on shapes"
    deciding = [name for name in _shape_inputs(node) if name in tensors.from_values]
    if deciding:
        names = ", ".join(f"`{name}`" for name in deciding)
        yield f"the values of {names} decide the shape of its output; only shapes and constants may"
    if node.op_type not in TYPES:
        yield f"not among the operators of {TABLE}"
        return
    if wrong := sorted(_main_types(node, tensors) - TYPES[node.op_type]):
        yield f"{', '.join(wrong)} is not among its types: {', '.join(sorted(TYPES[node.op_type]))}"
    for restriction in RESTRICTIONS.get(node.op_type, ()):
        if (reason := _violation(node, restriction, tensors)) is not None:
            yield reason


def _shape_inputs(node: NodeProto) -> list[str]:
    """The inputs whose values decide the shape of the node's output."""
    if node.op_type != "Loop":
        return [_input(node, place) for place in SHAPE_INPUTS.get(node.op_type, ())]
    has_scan_outputs = len(node.output) > len(node.input) - 2  # beside trip count and condition: what it carries
    return [_input(node, place) for place in (0, 1)] if has_scan_outputs else []


def _main_types(node: NodeProto, tensors: _Tensors) -> set[str]:
    """Element types of the tensors that the node computes with: those that share its main input's type."""
    schema = _schema(node.op_type, tensors.opset)
    if schema is None:
        return set()
    inputs = [(_formal(schema.inputs, place).type_str, name) for place, name in enumerate(node.input) if name]
    outputs = [(_formal(schema.outputs, place).type_str, name) for place, name in enumerate(node.output) if name]
    if node.op_type == "Cast":
        return {tensors.types[name] for _, name in (*inputs, *outputs) if name in tensors.types}
    if node.op_type in _MAIN_OUTPUT or not schema.inputs:
        main = schema.outputs[0].type_str
    else:
        main = schema.inputs[_MAIN_INPUT.get(node.op_type, 0)].type_str
    return {tensors.types[name] for kind, name in (*inputs, *outputs) if kind == main and name in tensors.types}


@functools.cache
def _schema(op_type: str, opset: int) -> Any:
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:  # not in this opset: the operator is a plain name in the table
        return None


def _formal(parameters: Any, place: int) -> Any:
    return parameters[min(place, len(parameters) - 1)]  # the last one may be variadic


def _input(node: NodeProto, place: int) -> str:
    return node.input[place] if place < len(node.input) else ""


def _violation(node: NodeProto, restriction: Restriction, tensors: _Tensors) -> str | None:
    """How a node breaks a restriction, in words, or None."""
    place = restriction.place
    if isinstance(place, str):
        return _attribute_violation(node, place, restriction.allowed)
    if restriction.kind == "no_output":
        given = place < len(node.output) and node.output[place]
        return f"its output {place}, `{node.output[place]}`, is not supported" if given else None
    name = _input(node, place)
    if not name:
        return None
    if restriction.kind == "no_input":
        return f"its input {place}, `{name}`, is not supported"
    return _input_violation(name, restriction, tensors)


def _attribute_violation(node: NodeProto, name: str, allowed: tuple[Any, ...]) -> str | None:
    values = next((_values(attribute) for attribute in node.attribute if attribute.name == name), ())
    if all(value in allowed for value in values):
        return None
    choice = f"must be {' or '.join(map(str, allowed))}" if allowed else "is not supported"
    return f"its attribute `{name}` (={', '.join(map(str, values))}) {choice}"


def _input_violation(name: str, restriction: Restriction, tensors: _Tensors) -> str | None:
    allowed = restriction.allowed
    if restriction.kind == "rank":
        rank = tensors.ranks.get(name)
        return None if rank in (None, *allowed) else f"`{name}` has {rank} axes, not {' or '.join(map(str, allowed))}"
    is_constant = name in tensors.constants
    if restriction.kind == "constant":
        return None if is_constant else f"`{name}` must be a constant"
    numbers = _numbers(tensors.constants.get(name))
    if restriction.kind == "below":
        if numbers is None or numbers.max() < allowed[0]:
            return None
        return f"`{name}` (={numbers.max()}) must be below {allowed[0]}"
    is_zero = is_constant and (numbers is None or not numbers.any())
    return None if is_zero else f"`{name}` must be a constant zero"


def _values(attribute: AttributeProto) -> tuple[Any, ...]:
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.type in (AttributeProto.TENSOR, AttributeProto.SPARSE_TENSOR):
        return ("a tensor",)
    values = value if isinstance(value, list) else [value]
    return tuple(entry.decode() if isinstance(entry, bytes) else entry for entry in values)


def _numbers(tensor: TensorProto | None) -> np.ndarray | None:
    """A constant's values, or None where it is empty, computed, or kept in another file."""
    if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
        return None
    array = onnx.numpy_helper.to_array(tensor)
    return array if array.size else None


def _follow(node: NodeProto, tensors: _Tensors) -> None:
    """Notes of a node's outputs whether they are constants, or depend on the values of the graph's inputs."""
    used = {*node.input, *_captured(node)} - {""}
    if node.op_type == "Constant":
        value = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
        tensors.constants.update(dict.fromkeys(node.output, value))
    elif used and used <= tensors.constants.keys():
        tensors.constants.update(dict.fromkeys(node.output))
    elif node.op_type not in ("Shape", "Size") and used & tensors.from_values:
        tensors.from_values.update(node.output)
        for attribute in node.attribute:  # what a loop carries and scans depends on what it was given
            if attribute.type == AttributeProto.GRAPH:
                skipped = 2 if node.op_type == "Loop" else 0  # the iteration's number and the condition do not
                tensors.from_values.update(value.name for value in attribute.g.input[skipped:])


def _captured(node: NodeProto) -> Iterator[str]:
    """Names that a node's subgraphs use, those of the graphs around them among them."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from inner.input
                yield from _captured(inner)
            yield from (value.name for value in attribute.g.output)
