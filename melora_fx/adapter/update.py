"""Computes the update of one weight and adds it to the weight; no other place does either.

    W' = W + Δ      Δ = blockdiag(s_1 B_1 A_1, …, s_N B_N A_N)

Δ and the sum are computed in float32 or wider and rounded once to the weight's dtype. Folds in memory, on disk and in
ONNX files, and the reports on them, all take their sums from here, so they agree bit for bit. (A fold in memory on a
CUDA device may differ from one on the CPU in the last bit of Δ.) The computation goes tile by tile, a few rows of every
block at a time: a tile stays in the processor's cache, and a weight is never copied whole.

N num_blocks, I in_features, O out_features, t rows of a tile.
"""

import math
from collections.abc import Callable, Iterator
from functools import cached_property

import torch

from .tensors import AdapterTensors, diagonal_blocks, matrices

_TILE_ELEMENTS = {"cpu": 1 << 19}
"""Elements of Δ in a tile, by device type: 2 MiB of float32 on the CPU, as measured (benchmarks/results/NOTES.md)."""
_TILE_ELEMENTS_ELSEWHERE = 1 << 24


class Scratch:
    """Memory that the tiles of many updates reuse. Page faults of fresh memory would cost more time than the sums."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Returns uninitialised memory. The next call with the same name, dtype and device returns it again."""
        key = (name, dtype, device)
        size = shape.numel()
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(max(size, _tile_elements(device)), dtype=dtype, device=device)
        return buffer[:size].view(shape)


def _tile_elements(device: torch.device) -> int:
    return _TILE_ELEMENTS.get(device.type, _TILE_ELEMENTS_ELSEWHERE)


class Tile:
    """A few rows of every block of a weight, and their sum with the update; all tensors are (N, t, I/N).

    The results are stored in `scratch`, and the next tile overwrites them.
    """

    def __init__(self, block: torch.Tensor, delta: torch.Tensor, scratch: Scratch) -> None:
        """`block`: a view of the weight. `delta`: its update, in float32 or wider; the tile may overwrite it."""
        self.block = block
        self.delta = delta
        self.scratch = scratch
        self.is_narrow = block.dtype != delta.dtype
        self.wide = delta.dtype if self.is_narrow else torch.float64

    @cached_property
    def before(self) -> torch.Tensor:
        """A copy of W, in the dtype of `exact`."""
        # Copies before it converts: a conversion that reads short rows from memory takes twice as long as both steps.
        copied = self.take("rounded", self.block.dtype).copy_(self.block)
        return self.take("before", self.wide).copy_(copied)

    @cached_property
    def exact(self) -> torch.Tensor:
        """W + Δ before rounding: in the dtype of Δ if it is wider than that of W, else in float64."""
        update = self.delta if self.is_narrow else self.take("exact", self.wide).copy_(self.delta)
        return update.add_(self.before)

    @cached_property
    def rounded(self) -> torch.Tensor:
        """W + Δ rounded once to W's dtype."""
        return self.take("rounded", self.block.dtype).copy_(self.exact)

    def write(self) -> None:
        """Overwrites W with the rounded sum."""
        if self.is_narrow:
            self.block.copy_(self.exact)
        else:  # faster, with the bits of `rounded`: float64 has 53 ≥ 2·24 + 2 digits, so rounding twice changes nothing
            self.block.add_(self.delta)

    def take(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Returns uninitialised memory of the tile's shape."""
        return self.scratch.take(name, self.block.shape, dtype, self.block.device)


def add_update(
    adapter: AdapterTensors,
    weight: torch.Tensor,
    scratch: Scratch | None = None,
    observe: Callable[[Tile], object] | None = None,
) -> None:
    """Adds the update to `weight` in place; reads and writes only its N diagonal blocks, 1/N of the weight.

    Args:
        adapter: the adapter with the update.
        weight: (O, I) or a stack (E, O, I), of any strides and floating dtype.
        scratch: memory to work in; pass the same one for many updates.
        observe: called with each tile before it is written.
    """
    for tile in update_tiles(adapter, weight, scratch or Scratch()):
        if observe is not None:
            observe(tile)
        tile.write()


def update_tiles(adapter: AdapterTensors, weight: torch.Tensor, scratch: Scratch) -> Iterator[Tile]:
    """Yields the tiles of `weight` (O, I) or (E, O, I), which together cover its diagonal blocks; changes nothing.

    A matrix whose B is zero has no tiles: the sum would only turn -0 into 0.
    """
    for matrix, own in zip(matrices(weight), adapter.by_matrix(), strict=True):
        yield from _tiles_of_matrix(own, matrix, scratch)


def _tiles_of_matrix(adapter: AdapterTensors, weight: torch.Tensor, scratch: Scratch) -> Iterator[Tile]:
    """Yields the tiles of one matrix (O, I), as `update_tiles` does."""
    if not adapter.lora_b.any():
        return
    wide = torch.promote_types(torch.promote_types(adapter.lora_b.dtype, torch.float32), weight.dtype)
    rows = max(1, _tile_elements(weight.device) // weight.size(1))
    views = diagonal_blocks(weight, adapter.config.num_blocks, adapter.part_sizes)
    for blocks, (part_a, part_b) in zip(views, adapter.parts(wide), strict=True):
        for block, tile_b in zip(blocks.split(rows, dim=1), part_b.split(rows, dim=1), strict=True):
            delta = scratch.take("delta", block.shape, wide, weight.device)
            yield Tile(block, _product(tile_b, part_a, delta, scratch), scratch)


def _product(tile_b: torch.Tensor, part_a: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Multiplies s B (N, t, R) by A (N, R, I/N) into `out` (N, t, I/N), and returns it.

    Computes in float64 on CUDA: in float32 only 11 of 24 bits would remain once a training script has allowed TF32.
    """
    if not out.is_cuda:
        return torch.bmm(tile_b, part_a, out=out)
    exact = scratch.take("product", out.shape, torch.float64, out.device)
    return out.copy_(torch.bmm(tile_b.double(), part_a.double(), out=exact))


def non_finite(adapter: AdapterTensors, dtype: torch.dtype, read: Callable[[], torch.Tensor]) -> str | None:
    """Returns why the update of a weight is not finite, or takes the weight out of the range of its `dtype`; or None.

    Calls `read` for the weight, (O, I) or (E, O, I), only in float16, or if the norms of A and B leave a doubt: no
    value of Δ is above s ‖A‖ ‖B‖.
    """
    factors = (adapter.lora_a.detach(), adapter.lora_b.detach())
    norms = [float(torch.linalg.vector_norm(tensor)) for tensor in factors]
    if not all(map(math.isfinite, norms)) and not all(tensor.isfinite().all() for tensor in factors):
        return "its adapter holds NaN or infinity"
    reach = math.prod(norms) * max(adapter.config.scalings)
    if reach < torch.finfo(dtype).max / 2 and dtype != torch.float16:
        return None
    for tile in update_tiles(adapter, read().detach(), Scratch()):
        if not (torch.isfinite(tile.rounded) | ~torch.isfinite(tile.block)).all():
            return beyond_range(dtype)
    return None


def beyond_range(dtype: torch.dtype) -> str:
    """Returns the error text for a sum that is not finite in `dtype`."""
    return f"the sum of weight and update is beyond the range of {str(dtype).removeprefix('torch.')}"
