"""The dynamic axes of a graph: which they are, and what they are called."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir

from exporters.decoders.example_step import step_axes
from melora_fx.whole_capture.dynamic_axes import DynamicAxes

_AXIS_NAMES = ("batch", "sequence")
"""Of the axes 0 and 1, where `dynamic_axes` gives none."""

_SEQUENCE_AXIS = 1
_DECODER = "decoder_"
"""Before the names of a decoder's inputs: as long as an encoder's in an example, they need not be so otherwise."""


def name_axes(graph: onnx_ir.Graph, examples: Mapping[str, Any], dynamic_axes: DynamicAxes) -> None:
    """Renames the symbols of dynamic axes, in every shape of the graph: `batch` for axis 0, `sequence` for axis 1,
    or as `dynamic_axes` says.

    Where axis 1 has several sizes in the examples, the later ones take the input's name as prefix, and a decoder's is
    called `decoder_sequence` where it is not the encoder's own.
    """
    names = _names_of_symbols(graph, examples, dynamic_axes)
    apart = _kept_apart(names)
    for value in _values(graph):
        if value.shape is not None:
            is_seen = value.is_graph_input() or value.is_graph_output()
            value.shape = onnx_ir.Shape([_renamed(size, names if is_seen else apart) for size in value.shape])


def _kept_apart(names: Mapping[str, str]) -> dict[str, str]:
    """Names for inside of the graph, where two axes of one name would be taken for equal ones by fusions."""
    first: dict[str, str] = {}
    return {
        symbol: name if first.setdefault(name, symbol) == symbol else f"{name}_{symbol}"
        for symbol, name in names.items()
    }


def _names_of_symbols(graph: onnx_ir.Graph, examples: Mapping[str, Any], dynamic_axes: DynamicAxes) -> dict[str, str]:
    """The exporter's symbol, such as `s77` → the axis's name."""
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
    """Names the axes of a decoder's inputs and outputs, also those that the exporter computes from others."""
    for value in (*graph.inputs, *graph.outputs):
        names = step_axes(value.name or "")
        value.shape = onnx_ir.Shape([names.get(index, size) for index, size in enumerate(value.shape or ())])


def _symbol(size: int | onnx_ir.SymbolicDim) -> str | None:
    """The symbol of a dynamic axis; None for a fixed size and for one that is computed from others."""
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
    if size.value.isdigit():  # the exporter writes an axis that the model has fixed as a symbol called "12"
        return int(size.value)
    return re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), str(size.value))


def axes_of(value: onnx_ir.Value) -> tuple[int | str, ...]:
    """Size of each axis of a graph input or output: a number, or the name of a dynamic axis."""
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ())
