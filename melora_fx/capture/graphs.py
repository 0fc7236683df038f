"""What every capture gives: a graph, and the module it stands for."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from melora_fx.torch_private import empty_graph_like


@dataclass(frozen=True)
class Capture:
    """A graph and the module that it stands for.

    Attributes:
        path: the module's dotted name in the model; the root's is "".
        graph: what the module computes; of a module that runs its own forward, what a trace has shown of that.
        other_graphs: what other traces of that have shown.
        runs_own_forward: whether the module goes on to run its own forward, and not the graph.
        failure: why what was traced is not all; None where it is.
    """

    path: str
    module: nn.Module
    graph: fx.Graph
    other_graphs: tuple[fx.Graph, ...] = ()
    runs_own_forward: bool = False
    failure: str | None = None

    @property
    def graphs(self) -> tuple[fx.Graph, ...]:
        return self.graph, *self.other_graphs


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph of its own with the same nodes, names, node metadata and code generation."""
    copied = empty_graph_like(graph)
    output = copied.graph_copy(graph, {}, return_output_node=True)
    assert isinstance(output, tuple), "a captured graph has an output node"
    value, original = output
    copied.output(value, type_expr=original.type).meta = copy.copy(original.meta)
    return copied


def function_of(module: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    """The function that runs `graph` on `module`, which it does not keep alive."""
    made = fx.GraphModule(module, graph)
    graph.owning_module = None
    return type(made).forward
