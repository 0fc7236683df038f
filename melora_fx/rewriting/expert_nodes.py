"""The nodes that are inserted behind a product with a stack of matrices, one adapter for each expert.

    y_s = W_e x_s  ⟶  y_s = W_e x_s + concat_i( s_i B_ei A_ei x_si )      e: the expert of row s

Where the base gathers W_e for each row, A and s B are gathered by the same numbers: R/O of the base's memory. Where it
multiplies rows that are sorted by expert, two calls of `grouped_blocks` multiply by A and by s B.

E experts, I in_features, O out_features, N num_blocks, R the largest rank of a block, S rows, P parts of `split`.
"""

import torch
from torch import fx

from melora_fx.lowering.grouped_blocks import grouped_blocks
from melora_fx.patterns.experts import ExpertNode

from .adapter_nodes import AdapterNodes

aten = torch.ops.aten


class ExpertNodes(AdapterNodes):
    """Inserts the adapters of a stack behind one product with it."""

    linear: ExpertNode

    def _blockwise(self, lora_a: fx.Node, scaled_b: fx.Node, base: fx.Node) -> fx.Node:
        if self.linear.is_grouped:
            return self._grouped(lora_a, scaled_b)
        return self._call("delta", aten.reshape_as.default, self._gathered(lora_a, scaled_b), base)

    def _gathered(self, lora_a: fx.Node, scaled_b: fx.Node) -> fx.Node:
        """The update of each row (S, O) from the blocks of its own expert."""
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
        return self._joined(outputs)

    def _grouped(self, lora_a: fx.Node, scaled_b: fx.Node) -> fx.Node:
        """The update of each row (S, O), of rows sorted by expert."""
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

    def _by_expert(self, name: str, tensor: fx.Node) -> fx.Node:
        """(E·N, …, …) as (E, N, …, …)."""
        return self._call(f"{name}_by_expert", aten.unflatten.int, tensor, 0, [-1, self.config.num_blocks])

    def _joined(self, outputs: list[fx.Node]) -> fx.Node:
        """The parts of `split` (S, N, O_p/N, …) side by side in each row."""
        if len(outputs) == 1:
            return outputs[0]
        flat = [self._call("part", aten.flatten.using_ints, output, 1) for output in outputs]
        return self._call("parts", aten.cat.default, flat, 1)
