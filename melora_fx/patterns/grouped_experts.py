"""Experts in the form "grouped_mm", with rows sorted by expert: their products, and the adapters behind them.

    grouped_mm(x, stackᵀ, offs)        offs (E,): where the rows of each expert end
    y_s = W_e x_s  ⟶  y_s = W_e x_s + concat_i( s_i B_ei A_ei x_si )        e: the expert of row s

Calls of `grouped_blocks` multiply by A, and by the s B of each part.

E experts, I in_features, O out_features, N num_blocks, R the largest rank of a block, S rows, P parts of `split`.
"""

from torch import Tensor, fx, nn

from melora_fx.adapter.site import SiteRecord

from .adapter_nodes import AdapterNodes, aten
from .grouped_blocks import grouped_blocks
from .node import LinearNode, argument, pattern_name
from .stacks import stack_of


def match_grouped(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    """Matches `grouped_mm(x (S, I), stack (E, I, O), offs (E,))`; the stack may be transposed."""
    x = argument(node, 0, "self", "mat_a", "input")
    stack = stack_of(argument(node, 1, "mat2", "mat_b", "weight"), owner)
    group_ends = argument(node, 2, "offs")
    bias = argument(node, 3, "bias")
    out_dtype = argument(node, 4, "out_dtype")
    if stack is None or stack.gather is not None or bias is not None or out_dtype is not None:
        return None
    if not isinstance(x, fx.Node) or not isinstance(group_ends, fx.Node):
        return None
    return LinearNode(
        node=node,
        input=x,
        parameter=stack.parameter,
        pattern=pattern_name(node),
        weight_is_transposed=not stack.is_transposed,
        weight_is_cast=stack.is_cast,
        choice=group_ends,
    )


def insert_grouped(graph: fx.Graph, linear: LinearNode, record: SiteRecord, weight: Tensor) -> None:
    """Inserts the adapters of a stack (E, O, I) or (E, I, O) behind one grouped product."""
    _GroupedNodes(graph, linear, record, weight).insert()


class _GroupedNodes(AdapterNodes):
    def _blockwise(self, lora_a: fx.Node, scaled_b: fx.Node, base: fx.Node) -> fx.Node:
        """Returns the update of each row (S, O); the rows are sorted by expert."""
        hidden = self._call("hidden", grouped_blocks, self._input(lora_a), lora_a, self.linear.choice)  # (S, N·P·R)
        hiddens = [hidden]
        if len(self.row_sizes) > 1:
            blocks = self._call("blocks", aten.unflatten.int, hidden, 1, [self.config.num_blocks, -1])
            parts = self._parts(blocks, 2, self.rank_sizes)
            hiddens = [self._call("hidden_part", aten.flatten.using_ints, part, 1) for part in parts]
        b_parts = self._parts(scaled_b, 1, self.row_sizes)
        outputs = [
            self._call("delta_part", grouped_blocks, part_hidden, part_b, self.linear.choice)
            for part_hidden, part_b in zip(hiddens, b_parts, strict=True)
        ]
        return self._joined(outputs)
