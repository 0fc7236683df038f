"""The update of one weight, and how it is added: the one place where either is computed.

    W' = W + Δ      Δ = blockdiag(s_1 B_1 A_1, …, s_N B_N A_N)

Δ and the sum are computed in float32 or wider and rounded once to the weight's dtype. Folds in memory, on disk and in
ONNX files all run this code, so they give the same bits. It goes tile by tile, a few rows of every block at a time: a
tile stays in the processor's cache, and a weight is never copied whole.

N num_blocks, I in_features, O out_features, E matrices of a stack, t rows of a tile.
"""

import math
from collections.abc import Iterator

import torch

from .tensors import AdapterTensors, diagonal_blocks, matrices

_TILE_ELEMENTS = {"cpu": 1 << 19}
"""Elements of Δ in a tile by device type: 2 MiB of float32 on the CPU, measured (benchmarks/results/NOTES.md)."""
_TILE_ELEMENTS_ELSEWHERE = 1 << 24


class Scratch:
    """Memory for the tiles of many updates; fresh memory for each would cost more in page faults than the sums do."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Uninitialised memory, which the next call with the same name hands out again."""
        key = (name, dtype, device)
        size = shape.numel()
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(max(size, _tile_elements(device)), dtype=dtype, device=device)
        return buffer[:size].view(shape)


def _tile_elements(device: torch.device) -> int:
    return _TILE_ELEMENTS.get(device.type, _TILE_ELEMENTS_ELSEWHERE)


def add_update(adapter: AdapterTensors, weight: torch.Tensor, scratch: Scratch | None = None) -> None:
    """Adds the update to `weight` in place; only its N diagonal blocks, 1/N of it, are read and written.

    Args:
        adapter: whose update it is.
        weight: (O, I), of any strides and floating dtype, or a stack of such (E, O, I).
        scratch: memory to work in, best one for many updates.
    """
    scratch = scratch or Scratch()
    for block, delta in update_tiles(adapter, weight, scratch):
        if block.dtype == delta.dtype:
            block.add_(delta)
        else:
            block.copy_(add_widened(delta, block, scratch))


def add_widened(delta: torch.Tensor, block: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """W + Δ of a tile, in place in `delta` and in its dtype: not yet rounded to that of `block`."""
    # Copied before it is converted: a conversion that reads short rows from memory takes twice the time of both.
    copied = scratch.take("copied", block.shape, block.dtype, block.device).copy_(block)
    return delta.add_(scratch.take("widened", block.shape, delta.dtype, block.device).copy_(copied))


def update_tiles(
    adapter: AdapterTensors, weight: torch.Tensor, scratch: Scratch
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (view of rows of `weight` in its blocks, their update in float32 or wider), both (N, t, I/N).

    The update lives in `scratch`: the next tile overwrites it.

    Args: as of `add_update`.
    """
    for matrix, own in zip(matrices(weight), adapter.by_matrix(), strict=True):
        yield from _tiles_of_matrix(own, matrix, scratch)


def _tiles_of_matrix(
    adapter: AdapterTensors, weight: torch.Tensor, scratch: Scratch
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`update_tiles` of one matrix (O, I)."""
    wide = torch.promote_types(torch.promote_types(adapter.lora_b.dtype, torch.float32), weight.dtype)
    rows = max(1, _tile_elements(weight.device) // weight.size(1))
    views = diagonal_blocks(weight, adapter.config.num_blocks, adapter.part_sizes)
    for blocks, (part_a, part_b) in zip(views, adapter.parts(wide), strict=True):
        for block, tile_b in zip(blocks.split(rows, dim=1), part_b.split(rows, dim=1), strict=True):
            yield block, torch.bmm(tile_b, part_a, out=scratch.take("delta", block.shape, wide, weight.device))


def non_finite(adapter: AdapterTensors, weight: torch.Tensor) -> str | None:
    """Why the update of a weight (O, I) or (E, O, I) is not finite, or takes it out of its dtype's range; or None.

    The weight is read only if the norms of A and B leave a doubt (no value of Δ is above s ‖A‖ ‖B‖), or in float16.
    """
    factors = (adapter.lora_a.detach(), adapter.lora_b.detach())
    norms = [float(torch.linalg.vector_norm(tensor)) for tensor in factors]
    if not all(map(math.isfinite, norms)) and not all(tensor.isfinite().all() for tensor in factors):
        return "its adapter holds NaN or infinity"
    reach = math.prod(norms) * max(adapter.config.scalings)
    if reach < torch.finfo(weight.dtype).max / 2 and weight.dtype != torch.float16:
        return None
    scratch = Scratch()
    for block, delta in update_tiles(adapter, weight.detach(), scratch):
        rounded = add_widened(delta, block, scratch).to(block.dtype)
        if not (torch.isfinite(rounded) | ~torch.isfinite(block)).all():
            return beyond_range(weight.dtype)
    return None


def beyond_range(dtype: torch.dtype) -> str:
    """The error text for a sum that is not finite in `dtype`."""
    return f"the sum of weight and update is beyond the range of {str(dtype).removeprefix('torch.')}"
