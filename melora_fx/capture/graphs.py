"""Defines the result of every capture: a graph, and the module that it stands for."""

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
        path: the module's dotted name in the model; "" for the root.
        graph: the computation of the module. If the module runs its own forward: the part that one trace has shown.
        other_graphs: the parts that other traces of the forward have shown.
        runs_own_forward: whether the module continues to run its own forward, and not the graph.
        failure: why the traces do not show the whole forward; None if they do.
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
    """Returns an independent graph with the same nodes, names, node metadata and code generation."""
    copied = empty_graph_like(graph)
    output = copied.graph_copy(graph, {}, return_output_node=True)
    assert isinstance(output, tuple), "a captured graph has an output node"
    value, original = output
    copied.output(value, type_expr=original.type).meta = copy.copy(original.meta)
    return copied


def function_of(module: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    """Returns the function that runs `graph` on a module, its first argument. It does not keep `module` alive."""
    made = fx.GraphModule(module, graph)
    graph.owning_module = None
    return type(made).forward
