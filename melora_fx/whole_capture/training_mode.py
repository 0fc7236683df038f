"""Makes exported graphs follow `.train()` and `.eval()` again."""

import copy
from typing import Any

import torch
from torch import fx, nn

from melora_fx.capture.graphs import copy_graph

aten = torch.ops.aten


def follow_training_mode(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Makes an exported module trainable in place and returns it: operators whose mode the export froze follow
    `.train()` and `.eval()` again, and checks of dtypes, which would fail after `.to(dtype)`, are removed.
    """
    for module in [each for each in graph_module.modules() if isinstance(each, fx.GraphModule)]:
        module.graph = _following_graph(module)
    for name in ("train", "eval"):  # an exported module has its own, which raise
        graph_module.__dict__.pop(name, None)
    return graph_module


def _following_graph(graph_module: fx.GraphModule) -> fx.Graph:
    """Returns the graph with dropout, attention dropout and batch norm as calls of modules, and adds these modules."""
    graph = copy_graph(graph_module.graph)
    followers = {node: _follower(node) for node in graph.nodes}
    for node, follower in followers.items():
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif follower:
            name = f"{node.name}_by_mode"
            graph_module.add_submodule(name, follower)
            with graph.inserting_before(node):
                call = graph.call_module(name, node.args, node.kwargs)
            call.meta = copy.copy(node.meta)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
    return graph


def _follower(node: fx.Node) -> "FollowsMode | None":
    """Returns the module that replaces the node, or None if the node does the same in both modes."""
    argument = _mode_argument(node)
    if argument is None:
        return None
    index, eval_value = argument
    if len(node.args) <= index or node.args[index] == eval_value:
        return None
    train_value: Any = node.args[index]
    return FollowsMode(str(node.target), index, train_value, eval_value)


def _mode_argument(node: fx.Node) -> tuple[int, float] | None:
    """Returns the position of the argument that depends on the mode, and its value in evaluation."""
    if _counts_batches(node):
        return 1, 0
    return _MODE_ARGUMENTS.get(node.target)


def _counts_batches(node: fx.Node) -> bool:
    """Returns whether a batch norm counts its batches here, which it does only in training. A batch norm that is used
    twice adds to the sum of its first use.
    """
    count = node
    while count.target is aten.add_.Tensor and isinstance(count.args[0], fx.Node):
        count = count.args[0]
    return count is not node and str(count.target).endswith("num_batches_tracked")


class FollowsMode(nn.Module):
    """A call of an ATen operator whose argument `index` follows the training flag: `train_value` or `eval_value`."""

    def __init__(self, operator: str, index: int, train_value: float, eval_value: float) -> None:
        super().__init__()
        self.operator = operator
        self.index = index
        self.train_value = train_value
        self.eval_value = eval_value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        _, packet, overload = self.operator.split(".")
        value = self.train_value if self.training else self.eval_value
        call = getattr(getattr(aten, packet), overload)
        return call(*args[: self.index], value, *args[self.index + 1 :], **kwargs)

    def extra_repr(self) -> str:
        return f"{self.operator}, argument {self.index}: {self.train_value} in training, else {self.eval_value}"


_MODE_ARGUMENTS: dict[Any, tuple[int, float]] = {
    aten.dropout.default: (2, False),
    aten.feature_dropout.default: (2, False),
    aten.alpha_dropout.default: (2, False),
    aten.feature_alpha_dropout.default: (2, False),
    aten.rrelu.default: (3, False),
    aten.scaled_dot_product_attention.default: (4, 0.0),
    aten.batch_norm.default: (5, False),
}
"""Operator → position of the argument that depends on the mode, and its value in evaluation."""
