"""Folds weights and measures what the rounding takes; or only measures it.

N num_blocks, R the largest rank of a block, I in_features, O out_features, E matrices of a stack, t rows of a tile.
"""

import math

import torch

from melora_fx.adapter.tensors import by_matrix, num_matrices
from melora_fx.adapter.update import Scratch, beyond_range, scaled_parts, update_tiles
from melora_fx.config import MELoRAConfig
from melora_fx.errors import MELoRAError
from melora_fx.saving.adapter_file import Adapter

from .report import SiteFold


def measure_fold(
    name: str,
    config: MELoRAConfig,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scratch: Scratch,
) -> SiteFold:
    """What `update.add_update` would do to a weight (O, I) or (E, O, I), bit for bit; nothing is changed.

    Args: as of `update.add_update`.

    Raises:
        MELoRAError: where the sum is not finite.
    """
    return _measure(name, config, weight, lora_a, lora_b, scratch, write=False)


def fold_and_measure(site: str, adapter: Adapter, weight: torch.Tensor, scratch: Scratch) -> SiteFold:
    """Merges an adapter's site into its base weight in place; the weight is given as it is stored: (O, I), (I, O), or
    a stack of such.

    Raises:
        MELoRAError: where the sum is not finite, part of it has been written then; and as `Adapter.oriented`.
    """
    lora_a = adapter.tensors[f"{site}.lora_a"]
    lora_b = adapter.tensors[f"{site}.lora_b"]
    oriented = adapter.oriented(site, weight)
    return _measure(site, adapter.configs[site], oriented, lora_a, lora_b, scratch, write=True)


def _measure(
    name: str,
    config: MELoRAConfig,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scratch: Scratch,
    *,
    write: bool,
) -> SiteFold:
    rounding = 0.0
    change = 0.0
    for block, delta in update_tiles(config, weight, lora_a, lora_b, scratch):
        before, exact, rounded = _add_tile(block, delta, scratch)
        if write:
            block.copy_(rounded)
        tile_change, tile_rounding = _compare_tile(name, before, exact, rounded, scratch)
        change = max(change, tile_change)
        rounding = math.hypot(rounding, tile_rounding)
    norm = 0.0
    ranks: list[int] = []
    for _, a, b in by_matrix(weight, lora_a, lora_b):
        matrix_norm, matrix_ranks = _norm_and_ranks(config, a, b)
        norm = math.hypot(norm, matrix_norm)
        ranks += matrix_ranks
    return SiteFold(
        name=name,
        dtype=str(weight.dtype).removeprefix("torch."),
        rounding_share=rounding / norm if norm else 0.0,
        max_abs_change=change,
        ranks=tuple(ranks),
        total_rank=num_matrices(weight) * config.total_rank * len(config.parts(weight.size(-2))),
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


def _norm_and_ranks(config: MELoRAConfig, lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[float, list[int]]:
    """‖Δ‖, and the numerical rank of each s_i B_i A_i, from the R × R matrices BᵀB and AAᵀ alone.

    ‖Δ‖² is the trace of their product, and its eigenvalues are the squares of the singular values: of those float64
    holds enough digits to tell float32's rank.
    """
    square = 0.0
    ranks: list[int] = []
    eps = torch.finfo(torch.promote_types(lora_b.dtype, torch.float32)).eps
    for part_a, part_b in scaled_parts(config, lora_a.cpu(), lora_b.cpu(), torch.float64):
        gram_a = part_a @ part_a.mT
        gram_b = part_b.mT @ part_b
        square += float((gram_a * gram_b).sum())
        squares, vectors = torch.linalg.eigh(gram_b)
        half = vectors * squares.clamp(min=0).sqrt()[:, None]  # BᵀB = half halfᵀ
        values = torch.linalg.eigvalsh(half.mT @ gram_a @ half).clamp(min=0).sqrt()
        limit = values.amax(dim=1, keepdim=True) * max(part_b.size(1), part_a.size(2)) * eps
        ranks += (values > limit).sum(dim=1).tolist()
    return math.sqrt(max(square, 0.0)), ranks
