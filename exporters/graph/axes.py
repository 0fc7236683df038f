"""Names the dynamic axes of a graph."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir

from exporters.decoders.example_step import step_axes
from melora_fx.whole_capture.dynamic_axes import DynamicAxes

_AXIS_NAMES = ("batch", "sequence")
"""Names of the axes 0 and 1 if `dynamic_axes` has none for them."""

_SEQUENCE_AXIS = 1
_DECODER = "decoder_"
"""Prefix of the names of a decoder's inputs, whose lengths may equal the encoder's only in the example."""


def name_axes(graph: onnx_ir.Graph, examples: Mapping[str, Any], dynamic_axes: DynamicAxes) -> None:
    """Renames the symbols of dynamic axes in every shape of the graph: to the names in `dynamic_axes`, or, for "auto",
    `batch` for axis 0, `sequence` for axis 1, and `axis_2`, … for others.

    With "auto", if an axis differs in size between inputs, the later inputs prefix its name with their own. Axis 1 of a
    decoder's input is called `decoder_sequence` if it varies independently of the encoder's.
    """
    names = _names_of_symbols(graph, examples, dynamic_axes)
    apart = _kept_apart(names)
    for value in _values(graph):
        if value.shape is not None:
            is_seen = value.is_graph_input() or value.is_graph_output()
            value.shape = onnx_ir.Shape([_renamed(size, names if is_seen else apart) for size in value.shape])


def _kept_apart(names: Mapping[str, str]) -> dict[str, str]:
    """Returns distinct names for shapes inside the graph: fusions would treat two axes of one name as equal."""
    first: dict[str, str] = {}
    return {
        symbol: name if first.setdefault(name, symbol) == symbol else f"{name}_{symbol}"
        for symbol, name in names.items()
    }


def _names_of_symbols(graph: onnx_ir.Graph, examples: Mapping[str, Any], dynamic_axes: DynamicAxes) -> dict[str, str]:
    """Maps the exporter's symbol of each dynamic axis, such as `s77`, to the axis's name."""
    names: dict[str, str] = {}
    size_of: dict[str, int] = {}
    for value in graph.inputs:
        input_name = value.name or ""
        example = examples.get(input_name)
        for axis, size in enumerate(value.shape or ()):
            symbol = _symbol(size)
            if symbol is None or symbol in names or example is None:
                continue
            name = _AXIS_NAMES[axis] if axis < len(_AXIS_NAMES) else f"axis_{axis}"
            if not isinstance(dynamic_axes, str):
                name = dynamic_axes[input_name].get(axis, name)
            elif size_of.setdefault(name, example.size(axis)) != example.size(axis):
                name = f"{input_name}_{name}"
            elif input_name.startswith(_DECODER) and axis == _SEQUENCE_AXIS and name in names.values():
                name = _DECODER + name
            names[symbol] = name
    return names


def name_step_axes(graph: onnx_ir.Graph) -> None:
    """Names the axes of a decoder's inputs and outputs, including axes that the exporter computes from others."""
    for value in (*graph.inputs, *graph.outputs):
        names = step_axes(value.name or "")
        value.shape = onnx_ir.Shape([names.get(index, size) for index, size in enumerate(value.shape or ())])


def _symbol(size: int | onnx_ir.SymbolicDim) -> str | None:
    """Returns the symbol of a dynamic axis; None for a fixed size, and for a size that is computed from others."""
    symbol = None if isinstance(size, int) else size.value
    return str(symbol) if symbol is not None and symbol.isidentifier() else None


def _values(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def _renamed(size: int | onnx_ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    if isinstance(size, int):
        return size
    if size.value is None:
        return None
    if size.value.isdigit():  # the exporter writes an axis that the model fixes as a symbol such as "12"
        return int(size.value)
    return re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), str(size.value))


def axes_of(value: onnx_ir.Value) -> tuple[int | str, ...]:
    """Returns the axes of a graph input or output: a number for a fixed size, a name for a dynamic axis."""
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ())
