"""Folds weights and measures what the rounding takes; or only measures it.

N num_blocks, R the largest rank of a block, I in_features, O out_features, E matrices of a stack, t rows of a tile.
"""

import math

import torch

from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.adapter.update import Scratch, beyond_range, update_tiles
from melora_fx.errors import MELoRAError
from melora_fx.saving.adapter_file import Adapter

from .report import SiteFold


def measure_fold(name: str, adapter: AdapterTensors, weight: torch.Tensor, scratch: Scratch) -> SiteFold:
    """What `update.add_update` would do to a weight (O, I) or (E, O, I), bit for bit; nothing is changed.

    Raises:
        MELoRAError: where the sum is not finite.
    """
    return _measure(name, adapter, weight, scratch, write=False)


def fold_and_measure(site: str, adapter: Adapter, weight: torch.Tensor, scratch: Scratch) -> SiteFold:
    """Merges an adapter's site into its base weight in place; the weight is given as it is stored: (O, I), (I, O), or
    a stack of such.

    Raises:
        MELoRAError: where the sum is not finite, part of it has been written then; and as `Adapter.oriented`.
    """
    return _measure(site, adapter.tensors_of(site), adapter.oriented(site, weight), scratch, write=True)


def _measure(name: str, adapter: AdapterTensors, weight: torch.Tensor, scratch: Scratch, *, write: bool) -> SiteFold:
    rounding = 0.0
    change = 0.0
    for block, delta in update_tiles(adapter, weight, scratch):
        before, exact, rounded = _add_tile(block, delta, scratch)
        if write:
            block.copy_(rounded)
        tile_change, tile_rounding = _compare_tile(name, before, exact, rounded, scratch)
        change = max(change, tile_change)
        rounding = math.hypot(rounding, tile_rounding)
    norm = 0.0
    ranks: list[int] = []
    for own in adapter.by_matrix():
        matrix_norm, matrix_ranks = _norm_and_ranks(own)
        norm = math.hypot(norm, matrix_norm)
        ranks += matrix_ranks
    return SiteFold(
        name=name,
        dtype=str(weight.dtype).removeprefix("torch."),
        rounding_share=rounding / norm if norm else 0.0,
        max_abs_change=change,
        ranks=tuple(ranks),
        total_rank=adapter.num_experts * adapter.config.total_rank * len(adapter.part_sizes),
    )


def _add_tile(
    block: torch.Tensor, delta: torch.Tensor, scratch: Scratch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(W, W + Δ, the sum rounded to the weight's dtype) of a tile, all (N, t, I/N); `delta` is used up.

    The first two are of the dtype in which the rounding is measured: that of Δ where it is wider than W, else float64.
    """
    is_narrow = block.dtype != delta.dtype
    precise = delta.dtype if is_narrow else torch.float64
    rounded = scratch.take("rounded", block.shape, block.dtype, block.device).copy_(block)
    before = scratch.take("before", block.shape, precise, block.device).copy_(rounded)
    if is_narrow:
        exact = delta.add_(before)
        rounded.copy_(exact)
    else:
        exact = scratch.take("exact", block.shape, precise, block.device).copy_(delta).add_(before)
        rounded.copy_(delta.add_(rounded))
    return before, exact, rounded


def _compare_tile(
    name: str, before: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor, scratch: Scratch
) -> tuple[float, float]:
    """The largest change of a value, and the norm of the rounding. Values that were not finite before count as
    unchanged. `before` and `exact` are used up.
    """
    after = scratch.take("after", before.shape, before.dtype, before.device).copy_(rounded)
    error = exact.sub_(after)
    change = after.sub_(before).abs_()
    largest = float(change.amax())
    if not math.isfinite(largest):
        of_the_base = ~torch.isfinite(before)
        if not (torch.isfinite(change) | of_the_base).all():
            raise MELoRAError(f"`{name}`: {beyond_range(rounded.dtype)}")
        error[of_the_base] = 0
        change[of_the_base] = 0
        largest = float(change.amax())
    return largest, float(torch.linalg.vector_norm(error))


def _norm_and_ranks(adapter: AdapterTensors) -> tuple[float, list[int]]:
    """‖Δ‖, and the numerical rank of each s_i B_i A_i, from the R × R matrices BᵀB and AAᵀ alone.

    ‖Δ‖² is the trace of their product, and its eigenvalues are the squares of the singular values: of those float64
    holds enough digits to tell float32's rank.
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
