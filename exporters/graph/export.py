"""One export on its way through the passes, and the table entries (`exporters/targets.py`) that it was asked for.

The command line lists the entries: they import neither torch nor onnx.
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
"""ONNX Runtime's operator that attends to the cache and adds to it."""

Sites = Mapping[str, "AdapterSite"]
Pass = Callable[["Export"], None]


class Target(NamedTuple):
    """What graphs are written for.

    Attributes:
        name: as `export_onnx` takes it.
        about: what its graphs are, in words.
        fusions: the provider whose fused operators its graphs get; None for standard operators alone.
        precision: what "auto" means for it.
        provider: ONNX Runtime's that computes its graphs: "cpu", "cuda" or "tensorrt".
        takes_swap: whether it takes optional inputs.
        check: raises a MELoRAError for a graph, as `read_graph` gives it, that it cannot run; takes its name too.
        explain: what to say of a written file on the command line; takes the path and the axes' `shapes`.
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
    """What a graph computes in.

    Attributes:
        name, about: as those of a target.
        epsilon: distance from 1 to the next number.
        tolerance: largest relative error against torch in float32, but for ill-conditioned inputs.
        tolerance_of_more: the same for inputs with more entries than the example's: their sums round more often.
        convert: the pass that brings a float32 graph to it; None for float32 itself.
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
    """How kept updates are written.

    Attributes:
        name, about: as those of a target.
        is_dense: whether as dense products, for a site of this configuration and a number of tokens.
        is_gated: whether swappable ones are left out while there is no adapter, in float32 graphs for a CPU.
    """

    name: str
    about: str
    is_dense: Callable[[MELoRAConfig, int], bool]
    is_gated: bool = False


class AdapterTrial(NamedTuple):
    """One way to compare a graph with torch: the adapter's `name`, the `context` in which torch computes with it, and
    the graph's inputs for it, asked for inside of that context.
    """

    name: str
    context: AbstractContextManager[None]
    inputs: Callable[[], Arrays]


def _as_it_is(model: nn.Module, sites: Sites) -> AbstractContextManager[None]:
    return nullcontext()


def _only_as_it_is(model: nn.Module, sites: Sites, facts: GraphFacts) -> Iterator[AdapterTrial]:
    yield AdapterTrial("", nullcontext(), dict)


class AdapterForm(NamedTuple):
    """What a graph holds of a model's adapters.

    Attributes:
        name, about: as those of a target.
        values: the context in which the model has the values that it is exported with; it lasts until a pass ends it
            (`Export.values`), or until the file has been verified.
        passes: what it does to the graph, whose weights have been named.
        stays: whether products with A and B stay in the graph.
        is_swappable: whether these are inputs, so that the graph has no adapter of its own.
        refuse: raises for a model whose graph cannot hold its adapters in this way; None: such a graph holds none.
        trials: the adapters that the graph is compared with torch for.
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
    """The arguments of `export_onnx` beside the model and its inputs: `path` is the .onnx file, also where a folder was
    given, and names have become entries of the tables.
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
    """One export: each pass takes it and changes it.

    Attributes:
        graph_model: the graph so far; a pass changes it in place, or puts another in its place.
        model: the module that it was made of.
        inputs: the example inputs by name.
        forward: the context in which the module computes what the graph does.
        options: what was asked for.
        adapter: what the graph holds of the adapters: as asked for, or nothing where the model computes its base.
        sites: those of the model, whatever the graph holds.
        values: the adapter form's context; closed once the model is to have its own values again.
        conditions: what holds of the inputs' sizes wherever the graph is right, as far as is known.
        weights: parameter → where it lives in the graph; without those that cannot be told from others.
        kept: tensor of a module kept trainable → where it lives, None where the exporter has folded it into others.
        forms: site → "block" or "dense", in a graph that keeps the adapters.
        defaults: optional input → its default, in a graph with swappable adapters.
        has_stale_types: whether a pass has left types and shapes that are no longer right.
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
        """Whether its operators are chosen for a CPU (`exporters/spelling/`). A step of a decoder with a cache has few
        rows, for which `MatMul` is as fast.
        """
        return self.options.target.provider == "cpu" and not self.has_cache

    def ranges(self) -> dict[str, AxisRange]:
        """The sizes of each dynamic axis for which the graph is right, one token a step where it needs that."""
        from exporters.decoders.step_conditions import ONE_TOKEN_OR_TEXT

        from .axes import axes_of
        from .ranges import axis_ranges

        axes = {value.name or "": axes_of(value) for value in self.graph.inputs if not value.is_initializer()}
        tensors = {name: value for name, value in self.inputs.items() if name in axes}
        conditions = [condition for condition in self.conditions if condition != ONE_TOKEN_OR_TEXT]
        return axis_ranges(conditions, axes, {name: value.shape for name, value in tensors.items()}, self.sums())

    def sums(self) -> dict[str, tuple[str, ...]]:
        """The dynamic axes that are as long as others together."""
        from exporters.onnx_files.cache_names import PAST_AXIS, TOTAL_AXIS

        return {TOTAL_AXIS: (PAST_AXIS, "sequence")} if self.has_own_mask else {}

    @property
    def has_one_token_steps(self) -> bool:
        """Whether a step after a past takes one token, or one text: ONNX Runtime's attention over a cache does."""
        return self.has_cache and any(node.op_type == CACHED_ATTENTION for node in self.graph)

    @property
    def has_own_mask(self) -> bool:
        """Whether the graph takes a cache, and a mask of all tokens so far: a decoder beside an encoder takes none."""
        from exporters.onnx_files.cache_names import MASK

        return self.has_cache and MASK in self.inputs

    @property
    def has_cache(self) -> bool:
        """Whether the graph takes and gives a key-value cache."""
        from exporters.onnx_files.cache_names import has_cache

        return has_cache(self.inputs)

    def constants(self) -> dict[str, Any]:
        """The example inputs that are no tensors: constants of the graph."""
        import torch

        return {name: value for name, value in self.inputs.items() if not isinstance(value, torch.Tensor)}
