"""Which graph a rewritten module runs: the plain one, the lowered one, or its base's.

The plain graph has the adapters as nodes; it is what is printed, copied, saved and exported. The lowered one has one
call for each adapter and trains faster. The base's graph has no adapters and runs inside `disabled` and `folded`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from melora_fx.adapter.site import MODULE_MARK, SITE_TAG, SiteRecord
from melora_fx.capture.graphs import copy_graph
from melora_fx.errors import MELoRAError
from melora_fx.lowering.lowerings import PLAIN, lower
from melora_fx.torch_private import in_forward_mode, in_functorch, in_fx_trace, is_exporting, put_graph

from .marks import ModuleMark


def without_adapters(graph: fx.Graph) -> fx.Graph:
    """A copy of `graph` in which every adapter's output is its base output again, and no adapter node is left."""
    graph = copy_graph(graph)
    for node in reversed(list(graph.nodes)):
        if SITE_TAG not in node.meta:
            continue
        if node.users:  # the sum of base and adapter is the one inserted node that other nodes use
            node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    return graph


def adapted_graph(module: fx.GraphModule) -> fx.Graph:
    """The graph of a rewritten module with its adapters, also while the base runs in its place."""
    return _mark(module).adapted_graph or module.graph


def run_base(module: fx.GraphModule) -> None:
    """The rewritten `module` runs its base until `run_adapted`: its forward, and its graph, which `torch.export`
    interprets.

    Function and graph belong to the class and are the same each time, so that compiled code stays valid.
    """
    cls: Any = type(module)
    if cls.base_code != module.code:
        cls.base_graph = without_adapters(adapted_graph(module))
        cls.base_code = module.code
        cls.base_function = _forward_of(module, cls.base_graph)
    _mark(module).adapted_graph = module.graph
    put_graph(module, cls.base_graph)


def run_adapted(module: fx.GraphModule) -> None:
    """Undoes `run_base`."""
    mark: ModuleMark | None = vars(module).get(MODULE_MARK)
    if mark and mark.adapted_graph:  # else it has been folded meanwhile
        put_graph(module, mark.adapted_graph)
        mark.adapted_graph = None


def choosing_forward(
    module: fx.GraphModule, plain: Callable[..., Any], records: list[SiteRecord]
) -> Callable[..., Any]:
    """A forward for `module` and all of its class, which chooses among the three graphs in each call.

    Args:
        plain: the function of the plain graph.
        records: the sites of the module, which say how it is lowered.
    """
    lowered = plain
    if any(record.lowering != PLAIN.name for record in records):
        lowered = _forward_of(module, lower(module.graph, module, records))
    has_forward_mode = all(record.is_aten for record in records)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.melora_mark.adapted_graph is not None:
            return type(self).base_function(self, *args, **kwargs)
        if not has_forward_mode and in_forward_mode():
            raise MELoRAError(
                "experts in the grouped form have no forward-mode derivatives: call "
                '`model.set_experts_implementation("batched_mm")` before `rewrite`'
            )
        return (plain if _needs_plain_nodes() else lowered)(self, *args, **kwargs)

    return forward


def _needs_plain_nodes() -> bool:
    """Whether nodes are what is asked for, as by exporters, or have a rule that the one call lacks, as `vmap` needs."""
    if in_functorch() or in_forward_mode():
        return True
    if torch.compiler.is_compiling():
        return is_exporting()
    return torch.jit.is_tracing() or in_fx_trace()


def _mark(module: fx.GraphModule) -> ModuleMark:
    return vars(module)[MODULE_MARK]


def _forward_of(module: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    """The function that runs `graph` on `module`, which it does not keep alive."""
    made = fx.GraphModule(module, graph)
    graph.owning_module = None
    return type(made).forward
