"""What every capture gives: a graph, and the module it stands for."""

import copy
from dataclasses import dataclass

from torch import fx, nn

from melora_fx.torch_private import empty_graph_like


@dataclass(frozen=True)
class Capture:
    """A graph and the module it stands for. `path` is the module's dotted name in the model; the root's is ""."""

    path: str
    module: nn.Module
    graph: fx.Graph


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph of its own with the same nodes, names, node metadata and code generation."""
    copied = empty_graph_like(graph)
    output = copied.graph_copy(graph, {}, return_output_node=True)
    assert isinstance(output, tuple), "a captured graph has an output node"
    value, original = output
    copied.output(value, type_expr=original.type).meta = copy.copy(original.meta)
    return copied
