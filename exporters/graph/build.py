"""Translates torch modules to `onnx_ir.Model`: with transformers' exporter for Hugging Face models, else with torch's.

The graph's inputs, outputs and dynamic axes get the names that a user of the model expects.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import onnx_ir
import torch
from torch import nn
from torch.export import ExportedProgram

from exporters.decoders.example_step import step_axes
from exporters.decoders.flat_cache import identifier
from exporters.decoders.step_conditions import step_conditions
from exporters.hugging_face import is_hugging_face_model
from exporters.onnx_files.cache_names import has_cache
from exporters.private import export_by_transformers, grouped_translations, quick_matching
from melora_fx import MELoRAError
from melora_fx.capture.model_settings import changed_attributes, in_mode, own_attributes, without_cache
from melora_fx.torch_private import tree_map
from melora_fx.whole_capture.conditions import Condition, conditions_of, exporting
from melora_fx.whole_capture.dynamic_axes import DynamicAxes, dynamic_shapes, refuse_fixed_axes
from melora_fx.whole_capture.example_inputs import changed_names, copied, name_keywords

from .axes import axes_of, name_axes, name_step_axes
from .clean import quiet
from .named_tensors import named_outputs
from .ranges import without_empty_axes


class BuiltGraph(NamedTuple):
    """A graph, the conditions on its inputs' sizes that the export assumed, and notes on effects that it lacks."""

    graph_model: onnx_ir.Model
    conditions: tuple[Condition, ...]
    left_out: tuple[str, ...]


def build_graph(
    model: nn.Module,
    inputs: dict[str, Any],
    forward: Callable[[nn.Module], AbstractContextManager[None]] = without_cache,
    *,
    dynamic_axes: DynamicAxes = "auto",
    opset: int | None = None,
) -> BuiltGraph:
    """Returns the ONNX graph of `model` in evaluation mode, by default without a key-value cache.

    Weights are not copied: the graph shares the model's tensors until it is saved.

    Args:
        model: the model.
        inputs: keyword arguments of the model; values that are not tensors become constants of the graph.
        forward: the context in which the model computes what the graph must compute.
        dynamic_axes: which axes stay dynamic; ignored if the inputs include a cache.
        opset: ONNX operator set; None leaves the exporter's default.

    Raises:
        MELoRAError: if the model or the exporter fails, with the original message; if the exporter cannot write
            `opset`; if the model fixes an axis that `dynamic_axes` names.
    """
    is_step = has_cache(inputs)
    if is_step:
        dynamic_axes = {name: step_axes(name) for name in inputs}
    with own_attributes(model), in_mode(model, training=False), forward(model), torch.no_grad():
        outputs, left_out = _run(model, inputs)
        graph_model, program = _export(model, inputs, dynamic_axes, opset)
    _name_inputs(graph_model.graph, inputs)
    _name_outputs(graph_model.graph, outputs)
    if opset is not None and graph_model.opset_imports[""] != opset:
        raise MELoRAError(f"the exporter cannot write opset {opset}: it wrote opset {graph_model.opset_imports['']}")
    refuse_fixed_axes({value.name or "": _sizes(value) for value in graph_model.graph.inputs}, dynamic_axes)
    name_axes(graph_model.graph, inputs, dynamic_axes)
    conditions = conditions_of(program)
    if is_step:
        name_step_axes(graph_model.graph)
        conditions = step_conditions(conditions, inputs)
    else:
        conditions += without_empty_axes({value.name or "": axes_of(value) for value in graph_model.graph.inputs})
    return BuiltGraph(graph_model, tuple(conditions), left_out)


def _sizes(value: onnx_ir.Value) -> list[int | str]:
    """Returns the axes of a value; fixed ones become ints, because the exporter may write them as strings."""
    return [int(axis) if str(axis).isdigit() else axis for axis in axes_of(value)]


def _run(model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Runs the model; returns its outputs by name, and notes on the inputs and attributes that it changes."""
    outputs, given = list[dict[str, torch.Tensor]](), list[dict[str, Any]]()

    def run() -> None:
        given.append(tree_map(copied, inputs))
        outputs.append(named_outputs(model(**given[-1])))

    try:
        kept = changed_attributes(model, run)
    except Exception as error:  # the model's own forward can raise anything
        raise MELoRAError(
            f"`{type(model).__name__}` does not accept `example_inputs`: {type(error).__name__}: {error}"
        ) from error
    notes = [f"the model changes its input `{name}`, the graph does not" for name in changed_names(given[0], inputs)]
    notes += [f"the model changes `{name}` from call to call, the graph contains its current value" for name in kept]
    return outputs[0], tuple(notes)


def _export(
    model: nn.Module, inputs: dict[str, Any], dynamic_axes: DynamicAxes, opset: int | None
) -> tuple[onnx_ir.Model, ExportedProgram]:
    try:
        with quiet(), exporting(), quick_matching():
            inputs = {identifier(name): value for name, value in inputs.items()}
            if not isinstance(dynamic_axes, str):
                dynamic_axes = {identifier(name): axes for name, axes in dynamic_axes.items()}
            shapes = dynamic_shapes(inputs, dynamic_axes)
            if is_hugging_face_model(model):
                return export_by_transformers(model, inputs, shapes, opset)
            return _export_by_torch(model, inputs, shapes, opset)
    except Exception as error:  # exporters raise many types
        raise MELoRAError(f"`{type(model).__name__}` cannot be exported: {_reason(error)}") from error


def _export_by_torch(
    model: nn.Module, inputs: dict[str, Any], shapes: dict[str, Any], opset: int | None
) -> tuple[onnx_ir.Model, ExportedProgram]:
    name_keywords(model, inputs)
    program = torch.export.export(model, (), inputs, strict=False, dynamic_shapes=shapes)
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        input_names=[name for name, value in inputs.items() if isinstance(value, torch.Tensor)],
        verbose=False,
        custom_translation_table=_grouped_products(program),
    )
    assert exported is not None
    return exported.model, program


def _grouped_products(program: torch.export.ExportedProgram) -> dict[Any, Any]:
    """Returns transformers' translations of `grouped_mm`, products of rows sorted by expert, if the program has any."""
    if not any("grouped_mm" in str(node.target) for node in program.graph.nodes):
        return {}
    return grouped_translations()


def _reason(error: BaseException) -> str:
    """Returns the messages that say what happened: not torch's outermost one, which advises torch's developers."""
    if isinstance(error, MELoRAError):
        return str(error)
    causes = [error]
    while isinstance(causes[-1], torch.onnx.errors.OnnxExporterError) and causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return "; ".join(f"{type(cause).__name__}: {cause}" for cause in causes[1:][-2:] or causes)


def _name_inputs(graph: onnx_ir.Graph, names: Iterable[str]) -> None:
    """Restores the names of the model's inputs in the graph: the exporter was passed identifiers instead."""
    by_identifier = {identifier(name): name for name in names}
    for value in graph.inputs:
        value.name = by_identifier.get(value.name or "", value.name)


def _name_outputs(graph: onnx_ir.Graph, names: Iterable[str]) -> None:
    """Gives the graph's outputs the names of the model's; a name that an input has too gets the suffix `_output`."""
    names = list(names)
    if len(graph.outputs) != len(names):
        raise MELoRAError(f"the export has {len(graph.outputs)} outputs, the model {len(names)}: {', '.join(names)}")
    taken = {value.name for value in graph.inputs}
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = f"{name}_output" if name in taken else name


def count_ops(graph_model: onnx_ir.Model) -> dict[str, int]:
    """Returns the number of nodes of each operator type, subgraphs included, the most frequent first."""
    return dict(Counter(node.op_type for node in graph_model.graph.all_nodes()).most_common())
