"""Measures what folds lose to rounding, from the tiles of a fold.

R the largest rank of a block, E matrices of a stack.
"""

import math

import torch

from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.adapter.update import Scratch, Tile, add_update, beyond_range, update_tiles
from melora_fx.errors import MELoRAError
from melora_fx.saving.adapter import Adapter

from .report import SiteFold


def measure_fold(name: str, adapter: AdapterTensors, weight: torch.Tensor, scratch: Scratch) -> SiteFold:
    """Returns what `add_update` would do to a weight (O, I) or (E, O, I), bit for bit; changes nothing.

    Raises:
        MELoRAError: if the sum is not finite.
    """
    losses = _Losses(name)
    for tile in update_tiles(adapter, weight, scratch):
        losses.observe(tile)
    return losses.report(adapter, weight.dtype)


def fold_and_measure(site: str, adapter: Adapter, weight: torch.Tensor, scratch: Scratch) -> SiteFold:
    """Merges a site of an adapter into its base weight in place, and returns what that did. The weight is passed in its
    stored orientation: (O, I), (I, O), or a stack of such matrices.

    Raises:
        MELoRAError: if the sum is not finite (a part of it has been written then), and as in `Adapter.oriented`.
    """
    losses = _Losses(site)
    own = adapter.tensors_of(site)
    add_update(own, adapter.oriented(site, weight), scratch, losses.observe)
    return losses.report(own, weight.dtype)


class _Losses:
    """Sums what the tiles of one weight lose."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rounding = 0.0  # ‖round(W+Δ) − (W+Δ)‖
        self.max_abs_change = 0.0

    def observe(self, tile: Tile) -> None:
        """Adds the losses of one tile. Values that were not finite before the fold count as unchanged."""
        exact = tile.exact
        after = tile.take("after", exact.dtype).copy_(tile.rounded)
        change = tile.before.sub_(after).abs_()  # in place: the tile no longer needs its copy of W
        error = after.sub_(exact)
        largest = float(change.amax())
        if not math.isfinite(largest):
            of_the_base = ~torch.isfinite(tile.block)
            if not (torch.isfinite(change) | of_the_base).all():
                raise MELoRAError(f"`{self.name}`: {beyond_range(tile.block.dtype)}")
            error[of_the_base] = 0
            change[of_the_base] = 0
            largest = float(change.amax())
        self.max_abs_change = max(self.max_abs_change, largest)
        self.rounding = math.hypot(self.rounding, float(torch.linalg.vector_norm(error)))

    def report(self, adapter: AdapterTensors, dtype: torch.dtype) -> SiteFold:
        """Returns what all tiles of a weight of `dtype` have lost together."""
        norm, ranks = norm_and_ranks(adapter)
        return SiteFold(
            name=self.name,
            dtype=str(dtype).removeprefix("torch."),
            rounding_share=self.rounding / norm if norm else 0.0,
            max_abs_change=self.max_abs_change,
            ranks=tuple(ranks),
            total_rank=adapter.total_rank,
        )


def norm_and_ranks(adapter: AdapterTensors) -> tuple[float, list[int]]:
    """Returns ‖Δ‖ over all matrices of a stack, or over the one, and the numerical rank of each s_i B_i A_i."""
    norm = 0.0
    ranks: list[int] = []
    for own in adapter.by_matrix():
        matrix_norm, matrix_ranks = _of_matrix(own)
        norm = math.hypot(norm, matrix_norm)
        ranks += matrix_ranks
    return norm, ranks


def _of_matrix(adapter: AdapterTensors) -> tuple[float, list[int]]:
    """Returns ‖Δ‖, and the numerical rank of each s_i B_i A_i, computed only from the R × R matrices BᵀB and AAᵀ.

    ‖Δ‖² is the trace of their product, whose eigenvalues are the squares of the singular values. float64 has enough
    digits for these squares to determine the rank in float32.
    """
    square = 0.0
    ranks: list[int] = []
    eps = torch.finfo(torch.promote_types(adapter.lora_b.dtype, torch.float32)).eps
    on_cpu = AdapterTensors(adapter.config, adapter.lora_a.cpu(), adapter.lora_b.cpu())
    for part_a, part_b in on_cpu.parts(torch.float64):
        gram_a = part_a @ part_a.mT
        gram_b = part_b.mT @ part_b
        square += float((gram_a * gram_b).sum())
        squares, vectors = torch.linalg.eigh(gram_b)
        half = vectors * squares.clamp(min=0).sqrt()[:, None]  # BᵀB = half halfᵀ
        values = torch.linalg.eigvalsh(half.mT @ gram_a @ half).clamp(min=0).sqrt()
        limit = values.amax(dim=1, keepdim=True) * max(part_b.size(1), part_a.size(2)) * eps
        ranks += (values > limit).sum(dim=1).tolist()
    return math.sqrt(max(square, 0.0)), ranks
