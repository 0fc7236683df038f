"""Block-diagonal products of rows that are sorted by expert, as one operator.

    y_s = concat_i( M_ei x_si )        e: the expert of row s

x_si is the i-th of N equal slices of row s. The operator computes one batched product of N matrices for each expert
that has rows. `aten._grouped_mm` could only compute block by block, which takes twice the time. It also needs rows
of a multiple of 16 bytes, a copy of x in another order and, under a compiler, bfloat16.

E experts, N blocks, K and L widths of a block's input and output, S rows.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from melora_fx.adapter.tensors import slices_of


def _multiply(x: Tensor, blocks: Tensor, offs: Tensor) -> Tensor:
    """Returns the products (S, N·L) in the dtype of `x`, zero for rows behind the last group.

    Args:
        x: (S, N·K), rows sorted by expert.
        blocks: (E·N, L, K), of the dtype of `x`.
        offs: (E,), integers: where the rows of each expert end.
    """
    number = len(blocks) // len(offs)
    output = x.new_zeros(len(x), number * blocks.size(1))
    for expert, rows in _groups(offs):
        if number == 1:
            torch.mm(x[rows], blocks[expert].t(), out=output[rows])  # same bits as transformers' operator
            continue
        matrices = blocks[expert * number : (expert + 1) * number]
        # The small matrices first, as in `few_rows_times`.
        torch.bmm(matrices, slices_of(x[rows], number).mT, out=slices_of(output[rows], number).mT)
    return output


def _matrix_gradient(gradient: Tensor, x: Tensor, offs: Tensor, number: int) -> Tensor:
    """Returns the gradient of `blocks` (E·N, L, K) from that of the products (S, N·L); `number` is N."""
    shape = (len(offs) * number, gradient.size(1) // number, x.size(1) // number)
    output = x.new_zeros(shape)
    for expert, rows in _groups(offs):
        matrices = output[expert * number : (expert + 1) * number]
        torch.bmm(slices_of(gradient[rows], number).mT, slices_of(x[rows], number), out=matrices)
    return output


def _groups(offs: Tensor) -> Iterator[tuple[int, slice]]:
    """Yields each expert that has rows, and the slice of its rows."""
    start = 0
    for expert, end in enumerate(offs.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = max(start, end)


_TAGS = (torch.Tag.cudagraph_unsafe,)
"""A CUDA graph can contain neither operator: both read the ends of the groups from the device."""
_operator = torch.library.custom_op("melora::grouped_blocks", _multiply, mutates_args=(), tags=_TAGS)
_gradient_operator = torch.library.custom_op(
    "melora::grouped_blocks_gradient", _matrix_gradient, mutates_args=(), tags=_TAGS
)

grouped_blocks = torch.ops.melora.grouped_blocks.default


@_operator.register_fake
def _(x: Tensor, blocks: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(x.size(0), blocks.size(0) // offs.size(0) * blocks.size(1))


@_gradient_operator.register_fake
def _(gradient: Tensor, x: Tensor, offs: Tensor, number: int) -> Tensor:
    return x.new_empty(offs.size(0) * number, gradient.size(1) // number, x.size(1) // number)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, blocks, offs = ctx.saved_tensors
    needs_x, needs_blocks, _ = ctx.needs_input_grad
    return (
        _operator(gradient, blocks.mT, offs) if needs_x else None,
        _gradient_operator(gradient, x, offs, len(blocks) // len(offs)) if needs_blocks else None,
        None,
    )


_operator.register_autograd(_backward, setup_context=_save)
