"""Experts in the form "batched_mm", with a gathered matrix for each row: their products and adapters.

    bmm(stack[ids], x.unsqueeze(-1))        ids (S,): the expert of each row
    y_s = W_e x_s  ⟶  y_s = W_e x_s + concat_i( s_i B_ei A_ei x_si )        e: the expert of row s

A and s B are gathered with the same indices as W. They add P·R/O + R/I of the memory of the gathered W.

E experts, I in_features, O out_features, N num_blocks, R the largest rank of a block, S rows, P parts of `split`.
"""

from typing import Any

from torch import Tensor, fx, nn

from melora_fx.adapter.site import SiteRecord

from .adapter_nodes import AdapterNodes, aten
from .node import KNOWN_SHAPE, LinearNode, argument, operator_name, pattern_name
from .stacks import choice_of, stack_of


def match_gathered(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    """Matches `bmm(stack[ids], x (S, I, 1))` or `bmm(x (S, 1, I), stack[ids])`; the stack may be transposed."""
    left = argument(node, 0, "self", "input")
    right = argument(node, 1, "mat2")
    for stack_side, x, dims, is_left in ((left, right, (-1, 2), True), (right, left, (1, -2), False)):
        stack = stack_of(stack_side, owner)
        if stack is None or stack.gather is None or not _is_row(x, dims):
            continue
        return LinearNode(
            node=node,
            input=x,
            parameter=stack.parameter,
            pattern=pattern_name(node),
            weight_is_transposed=stack.is_transposed if is_left else not stack.is_transposed,
            weight_is_cast=stack.is_cast,
            choice=choice_of(stack.gather),
            gather=stack.gather,
        )
    return None


def insert_gathered(graph: fx.Graph, linear: LinearNode, record: SiteRecord, weight: Tensor) -> None:
    """Inserts the adapters of a stack (E, O, I) or (E, I, O) behind one product with gathered matrices."""
    _GatheredNodes(graph, linear, record, weight).insert()


def _is_row(x: Any, dims: tuple[int, int]) -> bool:
    """Returns whether `x` has one row for each matrix: it is an `unsqueeze` at one of the dimensions `dims`, or its
    known shape says so.
    """
    if not isinstance(x, fx.Node):
        return False
    if KNOWN_SHAPE in x.meta:
        return x.meta[KNOWN_SHAPE][dims[0]] == 1
    return operator_name(x) == "unsqueeze" and argument(x, 1, "dim") in dims


class _GatheredNodes(AdapterNodes):
    def _blockwise(self, lora_a: fx.Node, scaled_b: fx.Node, base: fx.Node) -> fx.Node:
        """Returns the update of each row from the blocks of its expert, in the shape of `base`."""
        a = self._by_expert("a", lora_a)  # (E, N, P·R, I/N)
        b = self._by_expert("b", scaled_b)  # (E, N, O/N, R)
        row_a = self._call("row_a", aten.index.Tensor, a, [self.linear.choice])
        row_b = self._call("row_b", aten.index.Tensor, b, [self.linear.choice])
        shape = [-1, self.config.num_blocks, self.in_features // self.config.num_blocks, 1]
        blocks = self._call("input_blocks", aten.reshape.default, self._input(lora_a), shape)
        hidden = self._call("hidden", aten.matmul.default, row_a, blocks)  # (S, N, P·R, 1)
        hiddens = self._parts(hidden, 2, self.rank_sizes)
        b_parts = self._parts(row_b, 2, self.row_sizes)
        outputs = [
            self._call("delta_blocks", aten.matmul.default, part_b, part_hidden)
            for part_hidden, part_b in zip(hiddens, b_parts, strict=True)
        ]
        return self._call("delta", aten.reshape_as.default, self._joined(outputs), base)

    def _by_expert(self, name: str, tensor: fx.Node) -> fx.Node:
        """Reshapes (E·N, …, …) to (E, N, …, …)."""
        return self._call(f"{name}_by_expert", aten.unflatten.int, tensor, 0, [-1, self.config.num_blocks])
