"""Compresses adapters to smaller ranks: the nearest update of each block, from singular values (Eckart and Young).

    s_i B_i A_i = Q_B (R_B R_Aᵀ) Q_Aᵀ      B_i s_i = Q_B R_B   A_iᵀ = Q_A R_A
    R_B R_Aᵀ = U S Vᵀ                      B'_i = Q_B U √S     A'_i = √S (Q_A V)ᵀ

Only the core R_B R_Aᵀ (R, R) is decomposed, in float64. B' and A' have the same norm and a scaling of 1.

N num_blocks, I in_features, O out_features, R the largest rank of a block, P parts of `split`, E matrices of a stack.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from melora_fx import MELoRAConfig
from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.config import one_or_each
from melora_fx.files import output_path
from melora_fx.saving.adapter_file import read_adapter
from melora_fx.tables import table

from .derived import write_derived
from .summary import in_short

_WIDTH = 120


@dataclass(frozen=True)
class SiteCompression:
    """The result for one site.

    Attributes:
        name: the name of the site.
        ranks_before, ranks_after: the rank of each block, N long.
        relative_error: ‖Δ − Δ'‖ / ‖Δ‖ in the Frobenius norm; 0 if the update is zero.
    """

    name: str
    ranks_before: tuple[int, ...]
    ranks_after: tuple[int, ...]
    relative_error: float


@dataclass(frozen=True)
class CompressReport:
    """The loss caused by compressing an adapter.

    Attributes:
        directory: the folder that was written.
        sites: the result for each site.
        largest_error: the largest `relative_error` of a site.
    """

    directory: str
    sites: tuple[SiteCompression, ...]
    largest_error: float

    def __str__(self) -> str:
        rows = [("site", "blocks", "rank", "now", "‖Δ − Δ'‖ / ‖Δ‖")]
        rows += [
            (
                site.name,
                str(len(site.ranks_before)),
                in_short(site.ranks_before),
                in_short(site.ranks_after),
                f"{site.relative_error:.2g}",
            )
            for site in self.sites
        ]
        lines = table(rows, right=(1, 2, 3, 4), max_width=_WIDTH)
        return "\n".join([*lines, "", f"{self.directory}: the largest relative error is {self.largest_error:.2g}"])


def compress_adapter(
    adapter_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str], *, rank: int
) -> CompressReport:
    """Writes a copy of an adapter whose blocks have smaller ranks, with the nearest possible update.

    Each block of each part of `split` and of each expert is approximated separately. Blocks with this rank or less
    keep their values, unless their rank exceeds what a block of their size can have. The other blocks get a scaling of
    1, and their site is written in float32 (float64 stays). A trained head is kept unchanged.

    Args:
        adapter_dir: a folder written by `save_adapter`.
        out_dir: the folder to write; an adapter that is already there is replaced.
        rank: the largest rank of a block; smaller ranks are never raised.

    Returns:
        The loss of each site, without the rounding to float32.

    Raises:
        ValueError, TypeError: if `rank` is not a positive int or is above the limit of `MELoRAConfig`, or `out_dir` is
            "".
        MELoRAError: if a folder cannot be read or written, `out_dir` is `adapter_dir` or inside it, or the adapter does
            not say which base it was trained on; nothing is written then.
    """
    if isinstance(rank, Sequence):
        raise TypeError(f"`rank` must be an int, got {rank!r}")
    MELoRAConfig(rank=rank)  # refuses invalid ranks
    adapter = read_adapter(adapter_dir)
    made = {name: _compressed(adapter.tensors_of(name), rank) for name in adapter.configs}
    updates = {name: own for name, (own, _) in made.items()}
    write_derived(output_path(out_dir), [adapter], updates, adapter.kept, adapter.kept_tensors())
    sites = tuple(
        SiteCompression(name, adapter.configs[name].ranks, own.config.ranks, error)
        for name, (own, error) in made.items()
    )
    return CompressReport(str(out_dir), sites, max(site.relative_error for site in sites))


def _compressed(own: AdapterTensors, rank: int) -> tuple[AdapterTensors, float]:
    """Returns the update with smaller ranks, and its relative error."""
    config = own.config
    smaller = [_smaller(before, rank, own) for before in config.ranks]
    is_kept = [after == before for after, before in zip(smaller, config.ranks, strict=True)]
    if all(is_kept):
        return own, 0.0
    dtype = torch.promote_types(torch.promote_types(own.lora_a.dtype, own.lora_b.dtype), torch.float32)
    ranks = torch.tensor(smaller).repeat(own.num_experts)  # (E·N,)
    most = max(smaller)
    new_a, new_b = [], []
    lost, whole = 0.0, 0.0
    for part_a, part_b in own.parts(torch.float64):
        lora_a, lora_b, values = _nearest(part_a, part_b)
        has_rank = torch.arange(values.size(1)) < ranks[:, None]  # (E·N, R)
        is_lost = ~(has_rank | torch.tensor(is_kept).repeat(own.num_experts)[:, None])
        lost = math.hypot(lost, float(torch.linalg.vector_norm(values * is_lost)))
        whole = math.hypot(whole, float(torch.linalg.vector_norm(values)))
        new_a.append(_sized(lora_a * has_rank[:, :, None], most, 1))
        new_b.append(_sized(lora_b * has_rank[:, None, :], most, 2))
    config = _config_of(config, smaller, is_kept)
    made = AdapterTensors(config, torch.cat(new_a, 1).to(dtype), torch.cat(new_b, 1).to(dtype))
    _keep_blocks(made, own, is_kept)
    return made, lost / whole if whole else 0.0


def _smaller(before: int, rank: int, own: AdapterTensors) -> int:
    """Returns the new rank of a block: ranks above the sizes of its matrices, (O_p/N, I/N), would be useless."""
    height = max(own.part_sizes) // own.config.num_blocks
    return min(before, rank, max(height, 1), own.lora_a.size(2))


def _nearest(lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns √S Vᵀ (E·N, K, I/N), U √S (E·N, O_p/N, K) and the descending singular values S (E·N, K) of each B A."""
    q_b, r_b = torch.linalg.qr(lora_b)
    q_a, r_a = torch.linalg.qr(lora_a.mT)
    u, values, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    roots = values.sqrt()
    return roots[:, :, None] * (vh @ q_a.mT), q_b @ u * roots[:, None, :], values


def _sized(tensor: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    """Cuts a dimension to `rank` entries, or pads it with zeros."""
    tensor = tensor.narrow(dim, 0, min(rank, tensor.size(dim)))
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, rank - tensor.size(dim)])


def _config_of(config: MELoRAConfig, ranks: Sequence[int], is_kept: Sequence[bool]) -> MELoRAConfig:
    """Returns the configuration with the new ranks: new blocks get a scaling of 1, kept blocks keep their alpha."""
    own = config.alpha if isinstance(config.alpha, tuple) else (config.alpha,) * config.num_blocks
    alphas = [
        alpha if kept else (math.sqrt(rank) if config.use_rslora else float(rank))
        for alpha, rank, kept in zip(own, ranks, is_kept, strict=True)
    ]
    return dataclasses.replace(config, rank=one_or_each(ranks), alpha=one_or_each(alphas))


def _keep_blocks(made: AdapterTensors, own: AdapterTensors, is_kept: Sequence[bool]) -> None:
    """Copies the blocks that keep their rank back from `own`."""
    parts = len(own.part_sizes)
    to_a, from_a = (each.lora_a.view(len(each.lora_a), parts, -1, each.lora_a.size(2)) for each in (made, own))
    for block, rank in enumerate(made.config.ranks):
        if is_kept[block]:
            blocks = slice(block, None, len(is_kept))
            to_a[blocks, :, :rank] = from_a[blocks, :, :rank].to(to_a.dtype)
            to_a[blocks, :, rank:] = 0
            made.lora_b[blocks, :, :rank] = own.lora_b[blocks, :, :rank].to(made.lora_b.dtype)
            made.lora_b[blocks, :, rank:] = 0
