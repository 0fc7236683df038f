"""Triton kernels for the updates of slices and their gradients; importing this file imports triton.

    accumulate    out[n, t, :] += second[n] (first[n] in[n, t, :])        hidden[n, t, :] = first[n] in[n, t, :]
    reduce        sums[n] = Σ_t hidden[n, t, :] slices[n, t, :]ᵀ

Each program computes one tile of a block's tokens (`accumulate`) or columns (`reduce`) and loops over the other axis.
Sums are in float32 and in a fixed order, so every run returns the same bits. Operands may have any strides, 0 included;
offsets have 64 bits. Another number of tokens does not recompile a kernel.

N num_blocks, T tokens, R rank, K columns of the operand that is read, M columns of the operand that is added to.
"""

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_RANK = 256
"""The largest rank for which (tokens, rank) and (columns, rank) fit into registers; larger ranks need more launches."""

PROGRAMS = 1024
"""The number of programs for which `reduce` splits its tokens: about eight per multiprocessor of a large GPU."""


class Tiles(NamedTuple):
    """A program's tile in tokens, columns and ranks, its number of warps, and its stages of prefetched loads.

    The three sizes are powers of two and at least 16, as `tl.dot` needs.
    """

    tokens: int
    columns: int
    rank: int
    warps: int
    stages: int


def tiles_for(rank: int, dtype: torch.dtype) -> Tiles:
    """Returns the tiles for a rank of at most `MAX_RANK`.

    Compiled for sm_80, sm_86 and sm_90, kernels with these tiles use at most 84 KiB of shared memory and spill at most
    32 bytes per thread.
    """
    rank = max(16, triton.next_power_of_2(rank))
    if dtype == torch.float32:  # without tensor cores a thread holds whole rows of both operands of a product
        return Tiles(64 if rank <= 64 else 32, 32, rank, 4 if rank <= 32 else 8, 2)
    return Tiles(64, 64 if rank <= 128 else 32, rank, 4 if rank <= 64 else 8, 3)


@triton.jit(do_not_specialize=["num_tokens"])
def _accumulate(
    inputs,
    input_strides,
    first,
    first_strides,
    second,
    second_strides,
    out,
    out_strides,
    mask,
    mask_strides,
    hidden,
    num_blocks,
    num_tokens,
    rank,
    num_inputs,
    num_outputs,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Runs one program for each tile of tokens and block; neighbouring blocks of a row run in neighbouring programs."""
    program = tl.program_id(0)
    block = (program % num_blocks).to(tl.int64)
    tokens = (program // num_blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    ranks = tl.arange(0, RANK).to(tl.int64)
    columns = tl.arange(0, COLUMNS).to(tl.int64)
    is_token = (tokens < num_tokens)[:, None]
    is_rank = ranks < rank

    at_input = inputs + block * input_strides[0] + tokens[:, None] * input_strides[1]
    at_first = first + block * first_strides[0] + ranks[None, :] * first_strides[1]
    sums = tl.zeros((TOKENS, RANK), tl.float32)
    for start in range(0, num_inputs, COLUMNS):
        column = start + columns
        is_column = column < num_inputs
        x = tl.load(at_input + column[None, :] * input_strides[2], is_token & is_column[None, :], 0.0)
        a = tl.load(at_first + column[:, None] * first_strides[2], is_column[:, None] & is_rank[None, :], 0.0)
        sums = tl.dot(x, a, sums, input_precision=PRECISION)

    h = tl.where(is_rank[None, :], sums, 0.0).to(inputs.dtype.element_ty)  # inf times 0 is NaN beyond the rank
    if hidden is not None:
        at_hidden = hidden + (block * num_tokens + tokens[:, None]) * rank + ranks[None, :]
        tl.store(at_hidden, h, is_token & is_rank[None, :])
    if out is not None:
        at_second = second + block * second_strides[0] + ranks[:, None] * second_strides[2]
        at_out = out + block * out_strides[0] + tokens[:, None] * out_strides[1]
        for start in range(0, num_outputs, COLUMNS):
            column = start + columns
            is_column = column < num_outputs
            inside = is_token & is_column[None, :]
            b = tl.load(at_second + column[None, :] * second_strides[1], is_rank[:, None] & is_column[None, :], 0.0)
            added = tl.dot(h, b, input_precision=PRECISION)
            if mask is not None:
                at_mask = mask + block * mask_strides[0] + tokens[:, None] * mask_strides[1]
                added *= tl.load(at_mask + column[None, :] * mask_strides[2], inside, 0.0)
            at = at_out + column[None, :] * out_strides[2]
            tl.store(at, tl.load(at, inside, 0.0) + added, inside)


@triton.jit(do_not_specialize=["num_tokens", "tokens_of_split"])
def _reduce(
    slices,
    slice_strides,
    hidden,
    sums,
    num_blocks,
    num_tokens,
    rank,
    num_columns,
    tokens_of_split,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Runs one program for each tile of columns, block and split of the tokens; splits are multiples of TOKENS."""
    program = tl.program_id(0)
    num_tiles = tl.cdiv(num_columns, COLUMNS)
    part = program // num_tiles  # split · N + block
    block = (part % num_blocks).to(tl.int64)
    tokens = (part // num_blocks).to(tl.int64) * tokens_of_split + tl.arange(0, TOKENS)
    columns = (program % num_tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK).to(tl.int64)
    is_column = columns < num_columns
    is_rank = ranks < rank

    at_slice = slices + block * slice_strides[0] + columns[None, :] * slice_strides[2]
    at_hidden = hidden + block * num_tokens * rank + ranks[None, :]
    total = tl.zeros((COLUMNS, RANK), tl.float32)
    for start in range(0, tokens_of_split, TOKENS):
        token = start + tokens
        is_token = (token < num_tokens)[:, None]
        x = tl.load(at_slice + token[:, None] * slice_strides[1], is_token & is_column[None, :], 0.0)
        h = tl.load(at_hidden + token[:, None] * rank, is_token & is_rank[None, :], 0.0)
        total = tl.dot(tl.trans(x), h, total, input_precision=PRECISION)

    at = sums + (part.to(tl.int64) * num_columns + columns[:, None]) * rank + ranks[None, :]
    tl.store(at, total, is_column[:, None] & is_rank[None, :])


IS_INTERPRETED = not isinstance(_accumulate, triton.JITFunction)
"""Whether Triton runs the kernels as Python, on any device, instead of compiling them for GPUs."""


def accumulate(
    slices: Tensor,
    first: Tensor,
    second: Tensor | None = None,
    out: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    keep_hidden: bool = False,
) -> Tensor | None:
    """Adds to `out` in place, if it is passed, and returns the hidden values (N, T, R), contiguous, if `keep_hidden`.

    Args:
        slices: (N, T, K).
        first: (N, R, K).
        second: (N, M, R), of the same dtype as the others.
        out: (N, T, M); no two elements share memory.
        mask: (N, T, M), multiplied with the values that are added.
    """
    (num_blocks, num_tokens, num_inputs), rank = slices.shape, first.size(1)
    hidden = slices.new_empty(num_blocks, num_tokens, rank) if keep_hidden else None
    if rank > MAX_RANK:
        return _accumulate_in_pieces(slices, first, second, out, mask, hidden)
    if num_tokens == 0:
        return hidden
    tiles = tiles_for(rank, slices.dtype)
    with _on_device(slices):
        _accumulate[num_blocks * triton.cdiv(num_tokens, tiles.tokens),](
            *_with_strides(slices),
            *_with_strides(first),
            *_with_strides(second),
            *_with_strides(out),
            *_with_strides(mask),
            hidden,
            num_blocks,
            num_tokens,
            rank,
            num_inputs,
            0 if out is None else out.size(2),
            **_options(tiles),
        )
    if out is not None:  # selective checkpointing, which keeps `out`, must see the change
        torch.autograd.graph.increment_version(out)
    return hidden


def _accumulate_in_pieces(
    slices: Tensor, first: Tensor, second: Tensor | None, out: Tensor | None, mask: Tensor | None, hidden: Tensor | None
) -> Tensor | None:
    """Runs `accumulate` with at most `MAX_RANK` ranks at a time."""
    for start in range(0, first.size(1), MAX_RANK):
        ranks = slice(start, start + MAX_RANK)
        piece = accumulate(
            slices,
            first[:, ranks],
            None if second is None else second[:, :, ranks],
            out,
            mask,
            keep_hidden=hidden is not None,
        )
        if hidden is not None and piece is not None:
            hidden[:, :, ranks] = piece
    return hidden


def reduce(hidden: Tensor, slices: Tensor) -> Tensor:
    """Returns the sums (N, R, K) in float32 from hidden (N, T, R) and slices (N, T, K) of the same dtype."""
    (num_blocks, num_tokens, num_columns), rank = slices.shape, hidden.size(2)
    if rank > MAX_RANK:
        return torch.cat([reduce(piece, slices) for piece in hidden.split(MAX_RANK, dim=2)], dim=1)
    tiles = tiles_for(rank, slices.dtype)
    programs = num_blocks * triton.cdiv(num_columns, tiles.columns)
    num_splits = min(triton.cdiv(PROGRAMS, programs), triton.cdiv(num_tokens, tiles.tokens))
    if num_splits == 0:
        return slices.new_zeros(num_blocks, rank, num_columns, dtype=torch.float32)
    tiles_of_split = triton.cdiv(triton.cdiv(num_tokens, tiles.tokens), num_splits)
    sums = slices.new_empty(num_splits, num_blocks, num_columns, rank, dtype=torch.float32)
    with _on_device(slices):
        _reduce[num_splits * programs,](
            *_with_strides(slices),
            hidden.contiguous(),
            sums,
            num_blocks,
            num_tokens,
            rank,
            num_columns,
            tiles_of_split * tiles.tokens,
            **_options(tiles),
        )
    return sums.sum(0).mT


def _with_strides(tensor: Tensor | None) -> tuple[Tensor | None, tuple[int, ...] | None]:
    return tensor, None if tensor is None else tensor.stride()


def _options(tiles: Tiles) -> dict[str, Any]:
    """Returns a launch's options in addition to its operands; products of float32 are rounded as torch's are."""
    return {
        "TOKENS": tiles.tokens,
        "COLUMNS": tiles.columns,
        "RANK": tiles.rank,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": True,  # Triton 3.9 warns if this is unset: its default will change
    }


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which the GPU of `tensor` is the current one, on which kernels run."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()
