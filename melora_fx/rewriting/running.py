"""What a rewritten module runs: the plain graph, the lowered one, or the base's."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from melora_fx.adapter.site import SITE_TAG
from melora_fx.capture.graphs import copy_graph
from melora_fx.errors import MELoRAError
from melora_fx.torch_private import in_forward_mode, in_functorch, in_fx_trace


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


def forward_of(module: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    """The function that runs `graph` on `module`, which it does not keep alive."""
    made = fx.GraphModule(module, graph)
    graph.owning_module = None
    return type(made).forward


def uses(graph: fx.Graph, operator: Any) -> bool:
    return bool(graph.find_nodes(op="call_function", target=operator))


def choosing_forward(
    plain: Callable[..., Any], lowered: Callable[..., Any], *, has_forward_mode: bool
) -> Callable[..., Any]:
    """A forward that runs `lowered`, but `plain` where its nodes are needed, and the base after `run_base`."""

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.melora_adapted_graph is not None:
            return type(self).base_function(self, *args, **kwargs)
        if not has_forward_mode and in_forward_mode():
            raise MELoRAError(
                "experts in the grouped form have no forward-mode derivatives: call "
                '`model.set_experts_implementation("batched_mm")` before `rewrite`'
            )
        return (plain if _needs_plain_nodes() else lowered)(self, *args, **kwargs)

    own: Any = forward  # Dynamo counts recompiles by code object: each class gets one
    own.__code__ = own.__code__.replace()
    own.__signature__ = inspect.signature(plain)
    del own.__wrapped__  # whoever unwraps a forward, as accelerate does, must not unwrap this one
    return own


def _needs_plain_nodes() -> bool:
    """Whether nodes are what is asked for, as by exporters, or have a rule that the one call lacks, as `vmap` needs."""
    if in_functorch() or in_forward_mode():
        return True
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch.jit.is_tracing() or in_fx_trace()
