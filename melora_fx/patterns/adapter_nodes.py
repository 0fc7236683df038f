"""Inserts an adapter's nodes behind a linear node: plain ATen, differentiable, readable by any exporter.

    y = x Wᵀ + b  ⟶  y = x Wᵀ + b + concat_i( x_i A_iᵀ (s_i B_i)ᵀ )

x_i is the i-th of N equal slices of the input, A_i is (R, I/N), and B_i is (O/N, R). One batched product computes all
blocks: x as (N, T, I/N), A as (N, R, I/N), B as (N, O/N, R). With `split` into P parts, A is (N, P·R, I/N), and each
part uses its own R rows of each block. In each block of B, the rows of the parts follow one another.

If the linear multiplies by a part of the weight, x is padded with zeros, and only that part's rows of the update are
used. If the features of an `einsum` are not last, input and output are reordered. Both cost a copy.

I in_features, O out_features, N num_blocks, R the largest rank of a block, T tokens, P parts.
"""

from typing import Any

import torch
from torch import Tensor, fx

from melora_fx.adapter.site import SITE_TAG, SiteRecord
from melora_fx.adapter.tensors import DROPOUT, FACTORS, SCALING, features_of

from .einsum_terms import Orders
from .node import LinearNode

aten = torch.ops.aten


def insert_adapter(graph: fx.Graph, linear: LinearNode, record: SiteRecord, weight: Tensor) -> None:
    """Inserts the adapter of `weight` behind one linear node; every inserted node carries the site's tag."""
    AdapterNodes(graph, linear, record, weight).insert()


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """Returns float32, or float64 for a float64 weight."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class AdapterNodes:
    """The nodes of one adapter behind one linear node."""

    def __init__(self, graph: fx.Graph, linear: LinearNode, record: SiteRecord, weight: Tensor) -> None:
        self.graph = graph
        self.linear = linear
        self.record = record
        self.config = record.config
        matrices = record.matrices_of(weight)
        self.in_features, self.out_features = features_of(matrices, is_transposed=record.weight_is_transposed)
        parts = self.config.parts(self.out_features)
        self.row_sizes = [size // self.config.num_blocks for size in parts]  # of each part, in one block of B
        self.rank_sizes = [max(self.config.ranks)] * len(parts)  # of each part, in one block of A
        self.casts = linear.weight_is_cast or weight.dtype != adapter_dtype(weight)

    def insert(self) -> None:
        base = self.linear.node
        with self.graph.inserting_after(base):
            anchor = self._call("anchor", aten.alias.default, base)  # used by the base's users until the sum exists
        base.replace_all_uses_with(anchor, delete_user_cb=lambda user: user is not anchor)
        with self.graph.inserting_before(anchor):
            total = self._call("adapted", aten.add.Tensor, base, self._delta(base))
        anchor.replace_all_uses_with(total)
        self.graph.erase_node(anchor)
        total.meta = {**base.meta, **total.meta}

    def _delta(self, base: fx.Node) -> fx.Node:
        """Returns the adapter's output, in the shape and dtype of the base's output."""
        lora_a, lora_b, scaling = [self._get(kind) for kind in (*FACTORS, SCALING)]
        scaled_b = self._call("scaled_b", aten.mul.Tensor, lora_b, scaling)
        if self.linear.input_is_transposed:
            delta = self._left(lora_a, scaled_b)
        else:
            delta = self._blockwise(lora_a, scaled_b, base)
        if self.linear.scale != 1:
            delta = self._call("delta_scaled", aten.mul.Tensor, delta, self.linear.scale)
        return self._call("delta", aten.type_as.default, delta, base) if self.casts else delta

    def _blockwise(self, lora_a: fx.Node, scaled_b: fx.Node, base: fx.Node) -> fx.Node:
        """Returns x Δᵀ, computed by blocks and without building Δ."""
        orders = self.linear.orders or Orders(None, None, None)
        value = self._whole_rows(self._ordered(self._input(lora_a), orders.of_input))
        shape = [-1, self.config.num_blocks, self.in_features // self.config.num_blocks]
        blocks = self._swapped(self._call("input_blocks", aten.reshape.default, value, shape), 0, 1)
        hidden = self._call("hidden", aten.bmm.default, blocks, self._swapped(lora_a, 1, 2))
        hiddens = self._parts(hidden, 2, self.rank_sizes)
        b_parts = self._parts(scaled_b, 1, self.row_sizes)
        outputs = []
        for part_hidden, part_b in zip(hiddens, b_parts, strict=True):
            output = self._call("delta_blocks", aten.bmm.default, part_hidden, self._swapped(part_b, 1, 2))
            outputs.append(self._swapped(output, 0, 1))
        delta = self._joined(outputs)
        if self.linear.rows is not None:
            start, stop = self.linear.rows
            flat = self._call("delta_flat", aten.reshape.default, delta, [-1, self.out_features])
            delta = self._call("delta_rows", aten.narrow.default, flat, 1, start, stop - start)
        delta = self._call("delta", aten.reshape_as.default, delta, self._ordered(base, orders.to_output))
        return self._ordered(delta, orders.from_output)

    def _whole_rows(self, value: fx.Node) -> fx.Node:
        """Returns rows of all in_features: pads the inputs with zeros if the node multiplies by some columns only."""
        if self.linear.columns is None:
            return value
        start, stop = self.linear.columns
        return self._call("input_padded", aten.constant_pad_nd.default, value, [start, self.in_features - stop])

    def _ordered(self, value: fx.Node, equation: str | None) -> fx.Node:
        return self._call(f"{value.name}_ordered", aten.einsum.default, equation, [value]) if equation else value

    def _joined(self, outputs: list[fx.Node]) -> fx.Node:
        """Joins the parts of `split` (T, N, O_p/N, …) side by side in each row."""
        if len(outputs) == 1:
            return outputs[0]
        flat = [self._call("part", aten.flatten.using_ints, output, 1) for output in outputs]
        return self._call("parts", aten.cat.default, flat, 1)

    def _left(self, lora_a: fx.Node, scaled_b: fx.Node) -> fx.Node:
        """Returns Δ x, for W x. In this rare form x may have any number of dimensions, so Δ is built as a whole."""
        rows = []
        a_parts = self._parts(lora_a, 1, self.rank_sizes)
        b_parts = self._parts(scaled_b, 1, self.row_sizes)
        for part_a, part_b in zip(a_parts, b_parts, strict=True):
            blocks = self._call("delta_blocks", aten.bmm.default, part_b, part_a)
            each = [self._call("block", aten.select.int, blocks, 0, index) for index in range(self.config.num_blocks)]
            rows.append(self._call("block_diagonal", aten.block_diag.default, each))
        matrix = rows[0] if len(rows) == 1 else self._call("rows", aten.cat.default, rows)
        if self.linear.rows is not None:
            start, stop = self.linear.rows
            matrix = self._call("delta_rows", aten.narrow.default, matrix, 0, start, stop - start)
        if self.linear.columns is not None:
            start, stop = self.linear.columns
            matrix = self._call("delta_columns", aten.narrow.default, matrix, 1, start, stop - start)
        return self._call("delta", aten.matmul.default, matrix, self._input(lora_a))

    def _input(self, lora_a: fx.Node) -> fx.Node:
        """Returns the linear's input after dropout, in the adapter's dtype."""
        value = self.linear.input
        if self.config.dropout:
            value = self._tagged(self.graph.call_module(self.record.path(DROPOUT), (value,)))
        return self._call("wide_input", aten.type_as.default, value, lora_a) if self.casts else value

    def _parts(self, value: fx.Node, dim: int, sizes: list[int]) -> list[fx.Node]:
        """Returns the slices along `dim` that belong to the parts of `split`; the value itself without `split`."""
        if len(sizes) == 1:
            return [value]
        name = f"{value.name}_part"
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        return [
            self._call(name, aten.narrow.default, value, dim, start, size)
            for start, size in zip(starts, sizes, strict=True)
        ]

    def _swapped(self, value: fx.Node, first: int, second: int) -> fx.Node:
        return self._call(f"{value.name}_t", aten.transpose.int, value, first, second)

    def _call(self, name: str, operator: Any, *args: Any) -> fx.Node:
        return self._tagged(self.graph.call_function(operator, args, name=name))

    def _get(self, kind: str) -> fx.Node:
        return self._tagged(self.graph.get_attr(self.record.path(kind)))

    def _tagged(self, node: fx.Node) -> fx.Node:
        node.meta[SITE_TAG] = self.record.parameter
        return node
