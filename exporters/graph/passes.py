"""The passes over a graph, in their order."""

from typing import Any

from exporters.onnx_files.metadata import places_as_json
from melora_fx.shared_memory import sharing_parameters

from .cached_attention import drop_needless_views, read_lengths_off_mask
from .clean import drop_inferred, drop_traces
from .export import Export, Pass
from .fuse import fuse
from .swap_inputs import attach_defaults
from .weights import find_kept_tensors, fold_adapter_constants, name_weights


def write_adapter(export: Export) -> None:
    """The passes of what the graph holds of the adapters."""
    for run in export.adapter.passes:
        run(export)


def convert(export: Export) -> None:
    """The pass of the precision."""
    if export.options.precision.convert is not None:
        export.options.precision.convert(export)


PASSES: tuple[Pass, ...] = (
    fold_adapter_constants,
    name_weights,  # by their values, while the model has those that were exported, and by the exporter's traces
    find_kept_tensors,
    drop_traces,
    write_adapter,
    fuse,
    read_lengths_off_mask,
    drop_needless_views,
    convert,
    drop_inferred,
    attach_defaults,
)
"""Each does nothing for an export that it is not for."""


def run_passes(export: Export) -> None:
    """Makes the translated graph the finished one."""
    for run in PASSES:
        run(export)


def graph_facts(export: Export) -> dict[str, Any]:
    """What a graph's description says of it beside `describe`: the forms of its updates, where weights live, and which
    inputs it is for.
    """
    shared = sharing_parameters(export.model)  # a fold into one would change the others
    return {
        "forms": export.forms,
        "weights": places_as_json({name: place for name, place in export.weights.items() if name not in shared}),
        "kept": places_as_json({name: place for name, place in export.kept.items() if place}),
        "assumed": [condition.text for condition in export.conditions],
        "ranges": {axis: (found.smallest, found.largest) for axis, found in export.ranges().items()},
        "constants": export.constants(),
    }
