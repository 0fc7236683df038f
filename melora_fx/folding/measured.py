"""Merges an update into a weight tile by tile, and measures what the rounding takes."""

import math

import torch

from melora_fx.adapter.tensors import by_matrix, num_matrices
from melora_fx.adapter.update import Scratch, beyond_range, scaled_parts, update_tiles
from melora_fx.config import MELoRAConfig
from melora_fx.errors import MELoRAError
from melora_fx.saving.adapter_file import Adapter

from .report import SiteFold


def measure_update(
    name: str,
    config: MELoRAConfig,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scratch: Scratch,
    *,
    write: bool,
) -> SiteFold:
    """What the update does to a weight (O, I) or (E, O, I), measured tile by tile, and done where `write` says so.

    Args: as of `update.add_update`, which gives the same bits.

    Raises:
        MELoRAError: where the sum is not finite; tiles before it have been written then.
    """
    lost = change = 0.0
    for block, delta in update_tiles(config, weight, lora_a, lora_b, scratch):
        largest, error = _fold_tile(name, block, delta, scratch, write=write)
        change, lost = max(change, largest), math.hypot(lost, error)
    norm, ranks = 0.0, tuple[int, ...]()
    for _, a, b in by_matrix(weight, lora_a, lora_b):
        own_norm, own_ranks = _norm_and_ranks(config, a, b)
        norm, ranks = math.hypot(norm, own_norm), ranks + own_ranks
    return SiteFold(
        name=name,
        dtype=str(weight.dtype).removeprefix("torch."),
        rounding_share=lost / norm if norm else 0.0,
        max_abs_change=change,
        ranks=ranks,
        total_rank=num_matrices(weight) * config.total_rank * len(config.parts(weight.size(-2))),
    )


def fold_stored(site: str, adapter: Adapter, weight: torch.Tensor, scratch: Scratch) -> SiteFold:
    """Merges an adapter's site into its base weight in place; the weight is given as it is stored: (O, I), (I, O), or
    a stack of such.

    Raises:
        MELoRAError: as `measure_update` and `Adapter.oriented`.
    """
    lora_a, lora_b = (adapter.tensors[f"{site}.{kind}"] for kind in ("lora_a", "lora_b"))
    oriented = adapter.oriented(site, weight)
    return measure_update(site, adapter.configs[site], oriented, lora_a, lora_b, scratch, write=True)


def _fold_tile(
    name: str, block: torch.Tensor, delta: torch.Tensor, scratch: Scratch, *, write: bool
) -> tuple[float, float]:
    """Adds a tile's update, which is used up, and gives the largest change of a value and the norm of the rounding."""
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
    if write:
        block.copy_(rounded)
    after = scratch.take("after", block.shape, precise, block.device).copy_(rounded)
    error, change = exact.sub_(after), after.sub_(before).abs_()
    if not math.isfinite(largest := float(change.amax())):
        of_the_base = ~torch.isfinite(before)
        if not (torch.isfinite(change) | of_the_base).all():
            raise MELoRAError(f"`{name}`: {beyond_range(block.dtype)}")
        error[of_the_base] = change[of_the_base] = 0
        largest = float(change.amax())
    return largest, float(torch.linalg.vector_norm(error))


def _norm_and_ranks(config: MELoRAConfig, lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[float, tuple[int, ...]]:
    """‖Δ‖, and the numerical rank of each s_i B_i A_i, from the R × R matrices BᵀB and AAᵀ alone.

    ‖Δ‖² is the trace of their product, and its eigenvalues are the squares of the singular values: of those float64
    holds enough digits to tell float32's rank.
    """
    square, ranks = 0.0, list[int]()
    eps = torch.finfo(torch.promote_types(lora_b.dtype, torch.float32)).eps
    for part_a, part_b in scaled_parts(config, lora_a.cpu(), lora_b.cpu(), torch.float64):
        gram_a, gram_b = part_a @ part_a.mT, part_b.mT @ part_b
        square += float((gram_a * gram_b).sum())
        squares, vectors = torch.linalg.eigh(gram_b)
        half = vectors * squares.clamp(min=0).sqrt()[:, None]  # BᵀB = half halfᵀ
        values = torch.linalg.eigvalsh(half.mT @ gram_a @ half).clamp(min=0).sqrt()
        limit = values.amax(dim=1, keepdim=True) * max(part_b.size(1), part_a.size(2)) * eps
        ranks += (values > limit).sum(dim=1).tolist()
    return math.sqrt(max(square, 0.0)), tuple(ranks)
