"""The state of an export during its passes, and the types of the entries of the tables in `exporters/targets.py`.

The command line lists these entries, so the module imports neither torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import onnx_ir
    import torch
    from torch import nn

    from exporters.onnx_files.metadata import GraphFacts
    from exporters.onnx_files.weight_place import WeightPlace
    from exporters.onnx_runtime import Arrays
    from melora_fx import AdapterSite, MELoRAConfig
    from melora_fx.whole_capture.conditions import Condition
    from melora_fx.whole_capture.dynamic_axes import DynamicAxes

    from .ranges import AxisRange

CACHED_ATTENTION = "GroupQueryAttention"
"""ONNX Runtime's attention operator that reads the cache and extends it."""

Sites = Mapping[str, "AdapterSite"]
Pass = Callable[["Export"], None]


class Target(NamedTuple):
    """A runtime that graphs are written for.

    Attributes:
        name: the name that `export_onnx` accepts.
        about: a description of its graphs, for help texts.
        fusions: the provider whose fused operators its graphs get; None for only standard operators.
        precision: the precision that "auto" means.
        provider: the ONNX Runtime provider that runs its graphs: "cpu", "cuda" or "tensorrt".
        takes_swap: whether its graphs can have optional inputs.
        check: raises MELoRAError if the target cannot run a graph; called with the result of `read_graph` and the
            file's name. None for no check.
        explain: returns what the command line prints about a written file; called with the path and the axes' `shapes`.
            None for nothing.
    """

    name: str
    about: str
    fusions: str | None = None
    precision: str = "fp32"
    provider: str = "cpu"
    takes_swap: bool = True
    check: Callable[[Any, str], None] | None = None
    explain: Callable[..., object] | None = None


class Precision(NamedTuple):
    """A precision that graphs compute in.

    Attributes:
        name, about: as in `Target`.
        epsilon: the distance from 1 to the next number.
        tolerance: the largest accepted relative error against torch in float32, except for ill-conditioned inputs.
        tolerance_of_more: the tolerance for inputs with more entries than the example's, because their sums are rounded
            more often, and for the steps of a decoder.
        convert: the pass that converts a float32 graph to it; None for float32 itself.
        needs_runtime: whether that pass calls ONNX Runtime.
    """

    name: str
    about: str
    epsilon: float
    tolerance: float
    tolerance_of_more: float
    convert: Pass | None = None
    needs_runtime: bool = False


class UpdateForm(NamedTuple):
    """A form in which unmerged updates are written.

    Attributes:
        name, about: as in `Target`.
        is_dense: returns whether to write dense products, for a site's configuration and a number of tokens.
        is_gated: whether swappable updates are skipped while there is no adapter, in float32 graphs for a CPU without
            a cache.
    """

    name: str
    about: str
    is_dense: Callable[[MELoRAConfig, int], bool]
    is_gated: bool = False


class AdapterTrial(NamedTuple):
    """An adapter with which a graph is compared with torch: its `name`, the `context` in which torch computes with it,
    and a function that returns the graph's `inputs` for it, to be called inside that context.
    """

    name: str
    context: AbstractContextManager[None]
    inputs: Callable[[], Arrays]


def _as_it_is(model: nn.Module, sites: Sites) -> AbstractContextManager[None]:
    return nullcontext()


def _only_as_it_is(model: nn.Module, sites: Sites, facts: GraphFacts) -> Iterator[AdapterTrial]:
    yield AdapterTrial("", nullcontext(), dict)


class AdapterForm(NamedTuple):
    """The form of a model's adapters in a graph.

    Attributes:
        name, about: as in `Target`.
        values: the context in which the model has the values to export. It lasts until a pass closes `Export.values`,
            or until the file has been verified.
        passes: its passes over the graph, which run after the weights have been named.
        stays: whether products with A and B stay in the graph.
        is_swappable: whether A and B are inputs, so that the graph itself contains no adapter.
        refuse: raises MELoRAError if the model has no adapters that the graph can contain in this form. None: a graph
            without adapters is exported then.
        trials: yields the adapters with which the graph is compared with torch.
    """

    name: str
    about: str
    values: Callable[[nn.Module, Sites], AbstractContextManager[None]] = _as_it_is
    passes: tuple[Pass, ...] = ()
    stays: bool = False
    is_swappable: bool = False
    refuse: Callable[[nn.Module, Sites], None] | None = None
    trials: Callable[[nn.Module, Sites, GraphFacts], Iterator[AdapterTrial]] = _only_as_it_is


@dataclass(frozen=True)
class ExportOptions:
    """The arguments of `export_onnx` except the model, its inputs and `use_cache`: `path` is the .onnx file, even if a
    folder was passed, and names are replaced with entries of the tables.
    """

    path: Path
    adapter: AdapterForm
    target: Target
    precision: Precision
    form: UpdateForm
    dynamic_axes: DynamicAxes
    opset: int | None
    verify: bool


@dataclass
class Export:
    """The state of an export, which each pass changes.

    Attributes:
        graph_model: the graph so far; a pass changes it in place or replaces it.
        model: the module that was translated.
        inputs: the example inputs by name.
        forward: the context in which the module computes what the graph computes.
        options: the options of the export.
        adapter: the form of the adapters in the graph: the requested one, or `NO_ADAPTER` if the model has no sites or
            computes its base.
        sites: the sites that this graph's part of the model computes with, even if the graph contains no adapters.
        values: the adapter form's context; closing it restores the model's own values.
        conditions: the known conditions on the inputs' sizes under which the graph is correct.
        weights: parameter → its place in the graph, without parameters that cannot be distinguished from others.
        kept: tensor of a module kept trainable → its place; None if the exporter has folded it into others.
        forms: site → "block" or "dense", in a graph that keeps the adapters.
        defaults: optional input → its default, in a graph with swappable adapters.
        has_stale_types: whether a pass has left types and shapes that are no longer correct.
    """

    graph_model: onnx_ir.Model
    model: nn.Module
    inputs: Mapping[str, Any]
    forward: Callable[[nn.Module], AbstractContextManager[None]]
    options: ExportOptions
    adapter: AdapterForm
    sites: Sites
    values: ExitStack
    conditions: list[Condition] = field(default_factory=list)
    weights: dict[str, WeightPlace] = field(default_factory=dict)
    kept: dict[str, WeightPlace | None] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, torch.Tensor] = field(default_factory=dict)
    has_stale_types: bool = False

    @property
    def graph(self) -> onnx_ir.Graph:
        return self.graph_model.graph

    @property
    def is_spelt(self) -> bool:
        """Whether the operators are chosen for a CPU (`exporters/spelling/`). Not if there is a cache: a decoder's step
        has few rows, for which `MatMul` is as fast.
        """
        return self.options.target.provider == "cpu" and not self.has_cache

    def ranges(self) -> dict[str, AxisRange]:
        """Returns the range of sizes of each dynamic axis for which the graph is correct. If steps must have one token,
        the ranges are for such steps.
        """
        from exporters.decoders.step_conditions import ONE_TOKEN_OR_TEXT

        from .axes import axes_of
        from .ranges import axis_ranges

        axes = {value.name or "": axes_of(value) for value in self.graph.inputs if not value.is_initializer()}
        tensors = {name: value for name, value in self.inputs.items() if name in axes}
        conditions = [condition for condition in self.conditions if condition != ONE_TOKEN_OR_TEXT]
        return axis_ranges(conditions, axes, {name: value.shape for name, value in tensors.items()}, self.sums())

    def sums(self) -> dict[str, tuple[str, ...]]:
        """Maps each dynamic axis whose size is the sum of others to those others."""
        from exporters.onnx_files.cache_names import PAST_AXIS, TOTAL_AXIS

        return {TOTAL_AXIS: (PAST_AXIS, "sequence")} if self.has_own_mask else {}

    @property
    def has_one_token_steps(self) -> bool:
        """Whether a step after a past must have one token or one text, as for ONNX Runtime's attention over a cache."""
        return self.has_cache and any(node.op_type == CACHED_ATTENTION for node in self.graph)

    @property
    def has_own_mask(self) -> bool:
        """Whether the graph has a cache and a mask of all tokens so far. The decoder of an encoder-decoder model has no
        such mask.
        """
        from exporters.onnx_files.cache_names import MASK

        return self.has_cache and MASK in self.inputs

    @property
    def has_cache(self) -> bool:
        """Whether the graph accepts and returns a key-value cache."""
        from exporters.onnx_files.cache_names import has_cache

        return has_cache(self.inputs)

    def constants(self) -> dict[str, Any]:
        """Returns the example inputs that are not tensors: constants of the graph."""
        import torch

        return {name: value for name, value in self.inputs.items() if not isinstance(value, torch.Tensor)}
