"""Runs the passes over a graph in their order."""

from collections.abc import Mapping
from typing import Any

import torch

from exporters.onnx_files.cache_names import MASK
from exporters.onnx_files.metadata import places_as_json
from exporters.spelling.attention import drop_returns, drop_zeros, shorten_attentions
from exporters.spelling.chosen_rows import choose_rows
from exporters.spelling.gates import gate_updates
from exporters.spelling.gemm import write_gemms
from exporters.spelling.rows import flatten_rows
from exporters.spelling.values import Shapes
from melora_fx.adapter.tensors import factor_names
from melora_fx.shared_memory import sharing_parameters

from .cached_attention import drop_needless_views, read_lengths_off_mask
from .clean import drop_inferred, drop_traces
from .export import Export, Pass
from .fuse import fuse
from .swap_inputs import attach_defaults
from .weights import find_kept_tensors, fold_adapter_constants, name_weights


def write_adapter(export: Export) -> None:
    """Runs the passes of the adapter form."""
    for run in export.adapter.passes:
        run(export)


def spell(export: Export) -> None:
    """Rewrites a graph for a CPU in the operators that ONNX Runtime's CPU computes fastest."""
    if not export.is_spelt:
        return
    is_float32 = export.options.precision.convert is None
    shorten_attentions(export.graph_model)
    if export.options.target.fusions is not None and is_float32 and not _is_padded_before(export.inputs):
        drop_zeros(export.graph_model)
    shapes = Shapes(export.graph)
    flatten_rows(export.graph_model, shapes)
    write_gemms(export.graph_model)
    choose_rows(export.graph_model, shapes)
    if export.adapter.is_swappable and export.options.form.is_gated and is_float32:
        gate_updates(export.graph_model, [factor_names(site) for site in export.sites])
    export.has_stale_types = True


def _is_padded_before(inputs: Mapping[str, Any]) -> bool:
    """Returns whether a text of the example is padded at its beginning: padded tokens may have nothing to attend to."""
    masks = [value for name, value in inputs.items() if name.endswith(MASK) and isinstance(value, torch.Tensor)]
    return any(bool((mask[:, 0] == 0).any()) for mask in masks if mask.dim() == 2)


def tidy_fusions(export: Export) -> None:
    """Removes the reshapes that fusions have left around attentions."""
    if export.is_spelt and export.options.target.fusions is not None:
        drop_returns(export.graph_model)


def convert(export: Export) -> None:
    """Runs the pass of the precision, if it has one."""
    if export.options.precision.convert is not None:
        export.options.precision.convert(export)


PASSES: tuple[Pass, ...] = (
    fold_adapter_constants,
    name_weights,  # compares values, so before the model's own are restored; reads traces, so before they are dropped
    find_kept_tensors,
    drop_traces,
    write_adapter,
    spell,
    fuse,
    tidy_fusions,
    read_lengths_off_mask,
    drop_needless_views,
    convert,
    drop_inferred,
    attach_defaults,
)
"""Each pass is a no-op for an export that does not need it."""


def run_passes(export: Export) -> None:
    """Turns the translated graph into the finished one."""
    for run in PASSES:
        run(export)


def graph_facts(export: Export) -> dict[str, Any]:
    """Returns the part of a graph's description that `describe` does not: the forms of its updates, the places of its
    weights, and the inputs for which it is correct.
    """
    shared = sharing_parameters(export.model)  # folding into one would change the others
    return {
        "forms": export.forms,
        "weights": places_as_json({name: place for name, place in export.weights.items() if name not in shared}),
        "kept": places_as_json({name: place for name, place in export.kept.items() if place}),
        "assumed": [condition.text for condition in export.conditions],
        "ranges": {axis: (found.smallest, found.largest) for axis, found in export.ranges().items()},
        "constants": export.constants(),
    }
