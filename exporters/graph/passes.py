"""A model as a finished graph: the passes in their order."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from exporters.onnx_files.metadata import places_as_json
from melora_fx import sites
from melora_fx.shared_memory import sharing_parameters

from .build import build_graph
from .clean import drop_inferred, drop_traces
from .forms import add_biases_last, write_forms
from .fuse import fuse
from .graph_export import GraphExport
from .half import to_float16
from .options import ExportOptions
from .swap_inputs import attach_defaults, distinct_values, open_inputs
from .weights import find_kept_tensors, fold_adapter_constants, name_weights

Pass = Callable[[GraphExport], None]

NAMING_PASSES: tuple[Pass, ...] = (fold_adapter_constants, name_weights, find_kept_tensors, drop_traces)
"""Weights are recognised by their values, while the model still has those that were exported, and by the exporter's
traces.
"""

ADAPTER_PASSES: tuple[Pass, ...] = (write_forms, add_biases_last, open_inputs)
"""Each does nothing for a graph that holds no adapter in its way."""

TARGET_PASSES: tuple[Pass, ...] = (fuse, to_float16, drop_inferred, attach_defaults)
"""Each does nothing for a target or a precision that it is not for."""


def build_for_target(
    model: nn.Module, inputs: dict[str, Any], options: ExportOptions, holds: str, step: Callable[[str], None]
) -> GraphExport:
    """The finished graph of `model`, and what is known of it.

    Args:
        model: the model, folded where the graph is to hold merged weights.
        inputs: the example inputs by name.
        options: what was asked for.
        holds: which adapters the graph is to have, as `held_adapter` says.
        step: told what is done next.
    """
    step("translating the model")
    with distinct_values(model) if holds == "swap" else contextlib.nullcontext():
        graph_model = build_graph(model, inputs, dynamic_axes=options.dynamic_axes, opset=options.opset)
        export = GraphExport(graph_model, model, inputs, options, holds, sites(model))
        _run(NAMING_PASSES, export)
    _run(ADAPTER_PASSES, export)
    step("fusing")
    _run(TARGET_PASSES, export)
    return export


def graph_facts(export: GraphExport) -> dict[str, Any]:
    """What a graph's description says of it beside `describe`: the forms of its updates, and where weights live."""
    shared = sharing_parameters(export.model)  # a fold into one would change the others
    return {
        "forms": export.forms,
        "weights": places_as_json({name: place for name, place in export.weights.items() if name not in shared}),
        "kept": places_as_json({name: place for name, place in export.kept.items() if place}),
    }


def _run(passes: Iterable[Pass], export: GraphExport) -> None:
    for run_pass in passes:
        run_pass(export)
