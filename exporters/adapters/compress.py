"""Adapters of smaller ranks: in each block the nearest update of a rank, by its singular values (Eckart and Young).

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
    """What became of one site.

    Attributes:
        ranks_before, ranks_after: of each block, N long.
        relative_error: ‖Δ − Δ'‖ / ‖Δ‖ in the Frobenius norm; 0 for an update that is zero.
    """

    name: str
    ranks_before: tuple[int, ...]
    ranks_after: tuple[int, ...]
    relative_error: float


@dataclass(frozen=True)
class CompressReport:
    """What compressing an adapter has taken of it.

    Attributes:
        directory: the folder that was written.
        sites: its sites.
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
    """Writes an adapter with blocks of a smaller rank, whose update is the nearest to that of another one.

    Each block of each part of `split` and of each expert is approximated by itself. Blocks that have this rank or less
    keep their values, unless their rank is above what a block of their size can have; the others have a scaling of 1,
    and their site is written in float32 (float64 stays). A trained head is kept as it is.

    Args:
        adapter_dir: a folder written by `save_adapter`.
        out_dir: the folder to write; an adapter that is there is replaced.
        rank: of each block at most; it is never raised.

    Returns:
        What is lost of each site. Rounding to float32 is not counted.

    Raises:
        ValueError, TypeError: for a rank that is no positive int.
        MELoRAError: for a folder that cannot be read or written, or the same folder twice; nothing is written then.
    """
    if isinstance(rank, Sequence):
        raise TypeError(f"`rank` must be an int, got {rank!r}")
    MELoRAConfig(rank=rank)  # which refuses what is no rank
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
    """The update with smaller ranks, and the relative error of that."""
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
    """The new rank of a block: what is above the sizes of its matrices, (O_p/N, I/N), can hold nothing."""
    height = max(own.part_sizes) // own.config.num_blocks
    return min(before, rank, max(height, 1), own.lora_a.size(2))


def _nearest(lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """√S Vᵀ (E·N, K, I/N), U √S (E·N, O_p/N, K) and the singular values S (E·N, K), largest first, of each B A."""
    q_b, r_b = torch.linalg.qr(lora_b)
    q_a, r_a = torch.linalg.qr(lora_a.mT)
    u, values, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    roots = values.sqrt()
    return roots[:, :, None] * (vh @ q_a.mT), q_b @ u * roots[:, None, :], values


def _sized(tensor: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    """Cut to, or padded with zeros up to, `rank` entries of a dimension."""
    tensor = tensor.narrow(dim, 0, min(rank, tensor.size(dim)))
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, rank - tensor.size(dim)])


def _config_of(config: MELoRAConfig, ranks: Sequence[int], is_kept: Sequence[bool]) -> MELoRAConfig:
    """With the new ranks: a scaling of 1 where a block is new, its own alpha where it is kept."""
    own = config.alpha if isinstance(config.alpha, tuple) else (config.alpha,) * config.num_blocks
    alphas = [
        alpha if kept else (math.sqrt(rank) if config.use_rslora else float(rank))
        for alpha, rank, kept in zip(own, ranks, is_kept, strict=True)
    ]
    return dataclasses.replace(config, rank=one_or_each(ranks), alpha=one_or_each(alphas))


def _keep_blocks(made: AdapterTensors, own: AdapterTensors, is_kept: Sequence[bool]) -> None:
    """Puts the blocks that keep their rank back as they were."""
    parts = len(own.part_sizes)
    to_a, from_a = (each.lora_a.view(len(each.lora_a), parts, -1, each.lora_a.size(2)) for each in (made, own))
    for block, rank in enumerate(made.config.ranks):
        if is_kept[block]:
            blocks = slice(block, None, len(is_kept))
            to_a[blocks, :, :rank] = from_a[blocks, :, :rank].to(to_a.dtype)
            to_a[blocks, :, rank:] = 0
            made.lora_b[blocks, :, :rank] = own.lora_b[blocks, :, :rank].to(made.lora_b.dtype)
            made.lora_b[blocks, :, rank:] = 0
