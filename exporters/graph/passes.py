"""A model as a finished graph: the passes in their order."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir
import torch
from torch import nn

from exporters.onnx_files.metadata import places_as_json
from exporters.onnx_files.weight_place import find_tensor
from melora_fx.names import shared_parameters
from melora_fx.rewriting.sites import is_disabled
from melora_fx.saving.model_adapter import kept_names

from .axes import DynamicAxes
from .build import build_graph
from .clean import drop_inferred, drop_traces
from .forms import add_biases_last, write_forms
from .fuse import FUSED_TARGETS, fuse
from .half import to_float16
from .swap_inputs import attach_defaults, distinct_values, open_inputs
from .weights import fold_adapter_constants, name_weights


@dataclass(frozen=True)
class ExportOptions:
    adapter: str
    target: str
    precision: str
    form: str
    dynamic_axes: DynamicAxes
    opset: int | None


def build_for_target(
    model: nn.Module, inputs: dict[str, Any], options: ExportOptions, step: Callable[[str], None]
) -> tuple[onnx_ir.Model, dict[str, Any]]:
    """The finished graph, and what its description says of it beside `describe`. The passes in their order."""
    step("translating the model")
    swaps = options.adapter == "swap"
    with distinct_values(model) if swaps else contextlib.nullcontext():
        graph_model = build_graph(model, inputs, dynamic_axes=options.dynamic_axes, opset=options.opset)
        fold_adapter_constants(graph_model, model)
        weights = name_weights(graph_model, model)
    kept = {name: find_tensor(graph_model.graph.initializers, name) for name in kept_names(model)}
    drop_traces(graph_model)
    keeps = options.adapter == "keep" and not is_disabled(model)
    forms = write_forms(graph_model, model, options.form, _tokens(inputs)) if keeps else {}
    if keeps or swaps:
        add_biases_last(graph_model, model)
    defaults = open_inputs(graph_model, model, kept) if swaps else {}
    step("fusing")
    weights = fuse(graph_model, options.target, weights)
    if options.precision == "fp16":
        graph_model = to_float16(graph_model)
    if options.precision == "fp16" or options.target in FUSED_TARGETS:
        drop_inferred(graph_model)
    attach_defaults(graph_model.graph, defaults)
    shared = _shared(model)
    return graph_model, {
        "forms": forms,
        "weights": places_as_json({name: place for name, place in weights.items() if name not in shared}),
        "kept": places_as_json({name: place for name, place in kept.items() if place}),
    }


def _shared(model: nn.Module) -> set[str]:
    """Names of the parameters that other parameters of the model are too: a fold into one would change the others."""
    users = shared_parameters(model)
    return {name for name, parameter in model.named_parameters() if len(users[id(parameter)]) > 1}


def _tokens(inputs: Mapping[str, Any]) -> int:
    """Number of tokens of the example: the leading two sizes of its first tensor."""
    shapes = [value.shape[:2] for value in inputs.values() if isinstance(value, torch.Tensor)]
    return shapes[0].numel() if shapes else 1
