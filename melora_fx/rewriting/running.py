"""Decides which graph a rewritten module runs: the plain one, the lowered one, or its base's.

The plain graph has the adapters as nodes; it is printed, copied, saved and exported. The lowered graph has one call for
each adapter and trains faster. The base's graph has no adapters; it runs inside `disabled` and `folded`.
"""

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from melora_fx.adapter.site import MODULE_MARK, SITE_TAG, SiteRecord
from melora_fx.capture.expert_layers import NO_FORWARD_MODE
from melora_fx.capture.graphs import copy_graph, function_of
from melora_fx.capture.packed import is_packed_linear
from melora_fx.errors import MELoRAError
from melora_fx.live.weight_property import name_of_base
from melora_fx.lowering.lowerings import lower, needs_plain_nodes
from melora_fx.torch_private import in_forward_mode, put_graph

from .adapted_module import AdaptedModule
from .marks import ModuleMark


def without_adapters(graph: fx.Graph) -> fx.Graph:
    """Returns a copy of `graph` without adapter nodes; every adapter's output is replaced by its base output."""
    graph = copy_graph(graph)
    for node in reversed(list(graph.nodes)):
        if SITE_TAG not in node.meta:
            continue
        if node.users:  # only the sum of base and adapter has users that were not inserted
            node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    return graph


def adapted_graph(module: fx.GraphModule) -> fx.Graph:
    """Returns the graph of a rewritten module with its adapters, even while the module runs its base."""
    return _mark(module).adapted_graph or module.graph


def run_base(module: AdaptedModule) -> None:
    """Makes the rewritten `module` run its base until `run_adapted`: switches its forward, and its graph, which
    `torch.export` interprets.

    The function and the graph belong to the class and are the same each time, so compiled code stays valid.
    """
    mark = module.melora_mark
    if isinstance(module, fx.GraphModule):
        cls: Any = type(module)
        if cls.base_code != module.code:
            cls.base_graph = without_adapters(adapted_graph(module))
            cls.base_code = module.code
            cls.base_function = _function_on_base(module, cls.base_graph)
        mark.adapted_graph = module.graph
        put_graph(module, cls.base_graph)
    mark.runs_base = True


def run_adapted(module: AdaptedModule) -> None:
    """Undoes `run_base`."""
    mark: ModuleMark | None = vars(module).get(MODULE_MARK)
    if mark is None:  # folded since
        return
    if isinstance(module, fx.GraphModule) and mark.adapted_graph:
        put_graph(module, mark.adapted_graph)
        mark.adapted_graph = None
    mark.runs_base = False


def choosing_forward(module: fx.GraphModule, records: list[SiteRecord]) -> Callable[..., Any]:
    """Returns a forward for `module` and all modules of its class, which chooses among the three graphs in each call.

    `records`: the sites of the module, which name their lowerings.
    """
    plain = _function_on_base(module, module.graph)
    lowered = _function_on_base(module, lower(module.graph, module, records))
    has_forward_mode = all(record.is_aten for record in records)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.melora_mark.runs_base:
            return type(self).base_function(self, *args, **kwargs)
        if not has_forward_mode and in_forward_mode():
            raise MELoRAError(NO_FORWARD_MODE)
        return (plain if needs_plain_nodes() else lowered)(self, *args, **kwargs)

    return forward


def weights_behind_properties(module: nn.Module) -> list[str]:
    """Returns the names of the adapted weights of `module` that its class replaces with a `live.weight_property`.

    There are none if the module is the graph of a whole model, which is the only reader of its weights, or if the
    weight is packed, so that nobody else can read it.
    """
    if isinstance(module, AdaptedModule) and module.melora_class is fx.GraphModule:
        return []
    return [] if is_packed_linear(module) else [record.parameter for record in _mark(module).records]


def _function_on_base(module: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    """Returns the function that runs `graph` on `module`, and reads the adapted weights past their properties."""
    parameters = weights_behind_properties(module)
    if parameters:
        graph = copy_graph(graph)
    for node in graph.find_nodes(op="get_attr"):
        if node.target in parameters:
            node.target = name_of_base(node.target)
    return function_of(module, graph)


def _mark(module: nn.Module) -> ModuleMark:
    return vars(module)[MODULE_MARK]
