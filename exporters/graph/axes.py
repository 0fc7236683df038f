"""The dynamic axes of a graph: which they are, and what they are called."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import onnx_ir
import torch

from melora_fx import MELoRAError

DynamicAxes = Literal["auto"] | Mapping[str, Mapping[int, str]]
"""Axes that stay dynamic: "auto" for all that the model leaves free, or input name → {axis: name}."""


def check_dynamic_axes(inputs: Mapping[str, Any], dynamic_axes: DynamicAxes) -> None:
    """Raises a ValueError for axes of inputs that are not there, and for names that cannot be theirs."""
    if isinstance(dynamic_axes, str):
        return
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    sizes: dict[str, int] = {}
    for name, axes in dynamic_axes.items():
        if name not in tensors:
            raise ValueError(f"`dynamic_axes` names the input `{name}`; the inputs are {', '.join(tensors)}")
        shape = tuple(tensors[name].shape)
        if outside := [axis for axis in axes if axis not in range(len(shape))]:
            raise ValueError(f"`dynamic_axes` of `{name}`, of shape {shape}: it has no axis {outside[0]}")
        for axis, label in axes.items():
            if not isinstance(label, str) or not label.isidentifier():
                raise ValueError(f"`dynamic_axes` of `{name}`, axis {axis}: {label!r} must be a name such as 'batch'")
            if sizes.setdefault(label, shape[axis]) != shape[axis]:
                raise ValueError(
                    f"`dynamic_axes` of `{name}`, axis {axis}: `{label}` is {shape[axis]} here and {sizes[label]} "
                    "before: axes of one name have one size"
                )


def refuse_fixed_axes(graph: onnx_ir.Graph, dynamic_axes: DynamicAxes) -> None:
    """Raises for axes that were to be dynamic and that the export has fixed."""
    if isinstance(dynamic_axes, str):
        return
    lines = []
    for value in graph.inputs:
        for axis, name in dynamic_axes.get(value.name or "", {}).items():
            size = axes_of(value)[axis]
            if isinstance(size, int) or size.isdigit():
                lines.append(f"`{value.name}` axis {axis} (`{name}`): the model fixes it to {size}")
    if lines:
        raise MELoRAError("these axes cannot be dynamic:\n" + "\n".join(lines))


def name_axes(graph: onnx_ir.Graph, examples: dict[str, Any], dynamic_axes: DynamicAxes) -> None:
    """Renames the symbols of dynamic axes, in every shape of the graph: `batch` for axis 0, `sequence` for axis 1,
    or as `dynamic_axes` says.

    Where axis 1 has several sizes in the examples, the later ones take the input's name as prefix.
    """
    names: dict[str, str] = {}
    taken: dict[str, int] = {}
    for value in graph.inputs:
        example = examples.get(value.name or "")
        for axis, size in enumerate(value.shape or ()):
            if (
                isinstance(size, int)
                or example is None
                or not (size.value or "1").isidentifier()
                or size.value in names
            ):
                continue
            name = ("batch", "sequence")[axis] if axis < 2 else f"axis_{axis}"
            if not isinstance(dynamic_axes, str):
                names[str(size.value)] = dynamic_axes[value.name or ""].get(axis, name)
                continue
            if taken.setdefault(name, example.size(axis)) != example.size(axis):
                name = f"{value.name}_{name}"
            names[str(size.value)] = name
    for value in _values(graph):
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_renamed(size, names) for size in value.shape])


def _values(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def _renamed(size: int | onnx_ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    if size.value.isdigit():  # the exporter writes an axis that the model has fixed as a symbol called "12"
        return int(size.value)
    return re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), str(size.value))


def axes_of(value: onnx_ir.Value) -> tuple[int | str, ...]:
    """Size of each axis of a graph input or output: a number, or the name of a dynamic axis."""
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ())
