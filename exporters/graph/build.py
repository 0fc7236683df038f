"""From a torch module to an `onnx_ir.Model`: Hugging Face models by transformers' exporter, all others by torch's.

The graph's inputs, outputs and dynamic axes get the names that a user of the model expects.
"""

import contextlib
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import onnx_ir
import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from melora_fx import MELoRAError
from melora_fx.capture.whole_model import all_dynamic, in_mode, without_cache

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


def build_graph(
    model: nn.Module, inputs: dict[str, Any], *, dynamic_axes: DynamicAxes = "auto", opset: int | None = None
) -> onnx_ir.Model:
    """The ONNX graph of `model` in evaluation mode, without a key-value cache.

    Weights are not copied: the graph refers to the model's own tensors until it is saved.

    Args:
        model: the model.
        inputs: keyword arguments of the model; what is no tensor becomes a constant of the graph.
        dynamic_axes: which axes stay dynamic.
        opset: ONNX operator set; None leaves the exporter's default.

    Raises:
        MELoRAError: where the model or the exporter fails, its own message is given; for an axis that the model fixes.
    """
    with in_mode(model, training=False), without_cache(model), torch.no_grad():
        try:
            outputs = model(**inputs)
        except Exception as error:  # the model's own forward can raise anything
            raise MELoRAError(
                f"`{type(model).__name__}` does not take `example_inputs`: {type(error).__name__}: {error}"
            ) from error
        outputs = named_outputs(outputs)
        try:
            with quiet():
                graph_model = _export(model, inputs, dynamic_axes, opset)
        except Exception as error:  # exporters raise many kinds
            raise MELoRAError(f"`{type(model).__name__}` cannot be exported: {_reason(error)}") from error
    graph = graph_model.graph
    if len(graph.outputs) != len(outputs):
        raise MELoRAError(
            f"the export has {len(graph.outputs)} outputs, the model {len(outputs)}: {', '.join(outputs)}"
        )
    taken = {value.name for value in graph.inputs}
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = f"{name}_output" if name in taken else name
    if opset is not None and graph_model.opset_imports[""] != opset:
        raise MELoRAError(f"the exporter cannot write opset {opset}: it gave {graph_model.opset_imports['']}")
    _refuse_fixed(graph, dynamic_axes)
    _name_axes(graph, inputs, dynamic_axes)
    return graph_model


def _reason(error: BaseException) -> str:
    """The exporter's message; torch's outermost one advises torch's developers, those below it say what happened."""
    causes = [error]
    while isinstance(causes[-1], torch.onnx.errors.OnnxExporterError) and causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return "; ".join(f"{type(cause).__name__}: {cause}" for cause in causes[1:][-2:] or causes)


def _refuse_fixed(graph: onnx_ir.Graph, dynamic_axes: DynamicAxes) -> None:
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


def _export(model: nn.Module, inputs: dict[str, Any], dynamic_axes: DynamicAxes, opset: int | None) -> onnx_ir.Model:
    if isinstance(dynamic_axes, str):
        shapes = pytree.tree_map(all_dynamic, inputs)
    else:
        shapes = {
            name: dict.fromkeys(dynamic_axes.get(name, {}), Dim.AUTO) if isinstance(value, torch.Tensor) else None
            for name, value in inputs.items()
        }
    if isinstance(model, PreTrainedModel):
        from transformers.exporters import OnnxConfig, OnnxExporter  # heavy: only where it is used

        config = OnnxConfig(dynamic_shapes=shapes, opset_version=opset)
        attributes = dict(vars(model))
        try:
            return OnnxExporter().export(model, dict(inputs), config).program
        finally:  # it leaves its replacement of `forward` on the instance
            model.__dict__.clear()
            model.__dict__.update(attributes)
    program = torch.export.export(model, (), inputs, strict=False, dynamic_shapes=shapes)
    names = [name for name, value in inputs.items() if isinstance(value, torch.Tensor)]
    exported = torch.onnx.export(
        program, dynamo=True, opset_version=opset, input_names=names, verbose=False,
        custom_translation_table=_grouped_products(program),
    )  # fmt: skip
    assert exported is not None
    return exported.model


def _grouped_products(program: torch.export.ExportedProgram) -> dict[Any, Any]:
    """How products of rows that are sorted by expert are written, where there are any: as transformers does."""
    if not any("grouped_mm" in str(node.target) for node in program.graph.nodes):
        return {}
    from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE  # heavy: only where it is used

    return {target: write for target, write in _ONNX_TRANSLATION_TABLE.items() if "grouped_mm" in str(target)}


def named_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model's output by name: its fields' names, else `output` or `output_0`, `output_1`, …"""
    if isinstance(outputs, torch.Tensor):
        return {"output": outputs}
    named = {}
    for path, leaf in pytree.tree_flatten_with_path(_plain(outputs))[0]:
        if isinstance(leaf, torch.Tensor):
            keys = [_key(key) for key in path]
            named["_".join(keys if not keys[0].isdigit() else ["output", *keys])] = leaf
    if not named:
        raise MELoRAError(f"the model returns no tensor that has a name, but a {type(outputs).__name__}")
    return named


def _key(key: Any) -> str:
    """A step of a pytree path as text: a mapping's key, a sequence's index or a field's name."""
    return str(next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)))


def _plain(outputs: Any) -> Any:
    """Hugging Face outputs as dicts, without their empty fields."""
    return {k: v for k, v in outputs.items() if v is not None} if isinstance(outputs, Mapping) else outputs


def _name_axes(graph: onnx_ir.Graph, examples: dict[str, Any], dynamic_axes: DynamicAxes) -> None:
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


def count_ops(graph_model: onnx_ir.Model) -> dict[str, int]:
    """Number of nodes of each operator type, subgraphs included, most frequent first."""
    return dict(Counter(node.op_type for node in graph_model.graph.all_nodes()).most_common())


def axes_of(value: onnx_ir.Value) -> tuple[int | str, ...]:
    """Size of each axis of a graph input or output: a number, or the name of a dynamic axis."""
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the progress, notices and deprecations of exporters and graph passes from the user; errors are raised, not
    logged.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers.exporters", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
