"""Summarises an adapter folder, site by site, for `melora-fx adapter inspect`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.folding.measured_fold import norm_and_ranks
from melora_fx.saving.adapter import Adapter
from melora_fx.saving.adapter_file import read_adapter
from melora_fx.tables import table

_WIDTH = 120


@dataclass(frozen=True)
class SiteSummary:
    """One site: the features of its linear, how its adapter is cut, and how large its update is.

    Attributes:
        rank, alpha: of a block, as one number or the range over the blocks.
        total_rank, used_rank: the rank that the update can have, and the rank that it has.
        update_norm: the Frobenius norm of Δ.
    """

    name: str
    in_features: int
    out_features: int
    num_experts: int
    num_blocks: int
    rank: str
    alpha: str
    dtype: str
    total_rank: int
    used_rank: int
    update_norm: float


@dataclass(frozen=True)
class AdapterSummary:
    """An adapter that has been read and checked.

    Attributes:
        directory: its folder.
        format_version: the version of its file format.
        sha256: the SHA-256 of header and tensors that its file states, checked; None in format 1, which has none.
        adapter_sha256: the identity of the adapter, as folded models and graphs state it.
        model: class, labels and padding token of the model that it was trained in, if known.
        versions: package → the version that saved the adapter.
        sites: the summary of each site.
        kept: name of a module or parameter that was kept trainable → its number of values.
        num_parameters: the number of adapter parameters, without padding.
    """

    directory: str
    format_version: int
    sha256: str | None
    adapter_sha256: str
    model: dict[str, Any]
    versions: dict[str, str]
    sites: tuple[SiteSummary, ...]
    kept: dict[str, int]
    num_parameters: int

    def __str__(self) -> str:
        checked = f"SHA-256 {self.sha256[:12]}…, checked" if self.sha256 else "no SHA-256: save it again to add one"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"{self.directory}: format {self.format_version}, {checked}",
            f"  adapter  {self.adapter_sha256[:12]}…, {len(self.sites)} sites, {self.num_parameters:,} parameters",
            f"  model    {self.model.get('class') or 'of an unknown class'}{_labels(self.model)}",
            f"  saved by {versions or 'unknown versions'}",
        ]
        if self.kept:
            kept = ", ".join(f"{name} ({number:,} values)" for name, number in self.kept.items())
            lines.append(f"  trained in full: {kept}")
        return "\n".join([*lines, "", *self._table()])

    def _table(self) -> list[str]:
        rows = [("site", "in", "out", "blocks × rank", "alpha", "dtype", "rank of Δ", "‖Δ‖")]
        for site in self.sites:
            experts = f"{site.num_experts} × " if site.num_experts > 1 else ""
            rows.append(
                (
                    site.name,
                    str(site.in_features),
                    str(site.out_features),
                    f"{experts}{site.num_blocks} × {site.rank}",
                    site.alpha,
                    site.dtype,
                    f"{site.used_rank} of {site.total_rank}",
                    f"{site.update_norm:.3g}",
                )
            )
        return table(rows, right=(1, 2, 6, 7), max_width=_WIDTH)


def summarise_adapter(directory: str | os.PathLike[str]) -> AdapterSummary:
    """Reads, checks and summarises an adapter folder.

    Raises:
        MELoRAError: as for `read_adapter`.
    """
    adapter = read_adapter(directory)
    sites = tuple(_summarise(name, adapter.tensors_of(name)) for name in adapter.configs)
    kept = adapter.kept_tensors()
    return AdapterSummary(
        directory=str(directory),
        format_version=adapter.header["format_version"],
        sha256=adapter.header.get("sha256"),
        adapter_sha256=adapter.sha256,
        model=adapter.model,
        versions=adapter.header.get("versions", {}),
        sites=sites,
        kept={name: sum(kept[tensor].numel() for tensor in adapter.tensors_kept_by(name)) for name in adapter.kept},
        num_parameters=_num_parameters(adapter, sites),
    )


def _summarise(name: str, own: AdapterTensors) -> SiteSummary:
    config = own.config
    norm, ranks = norm_and_ranks(own)
    return SiteSummary(
        name=name,
        in_features=own.in_features,
        out_features=config.num_blocks * own.lora_b.size(1),
        num_experts=own.num_experts,
        num_blocks=config.num_blocks,
        rank=in_short(config.rank),
        alpha=in_short(config.alpha),
        dtype=str(own.lora_b.dtype).removeprefix("torch."),
        total_rank=own.total_rank,
        used_rank=sum(ranks),
        update_norm=norm,
    )


def _num_parameters(adapter: Adapter, sites: tuple[SiteSummary, ...]) -> int:
    return sum(
        site.num_experts * adapter.configs[site.name].num_parameters(site.in_features, site.out_features)
        for site in sites
    )


def in_short(value: float | tuple[float, ...]) -> str:
    """Formats a rank or an alpha: one number, or the range of several."""
    if isinstance(value, tuple):
        low, high = min(value), max(value)
        return f"{low:g}" if low == high else f"{low:g}–{high:g}"
    return f"{value:g}"


def _labels(model: dict[str, Any]) -> str:
    number = model.get("num_labels")
    if not number:
        return ""
    names = model.get("labels") or []
    return f", {number} labels" + (f": {', '.join(names[:8])}{', …' if len(names) > 8 else ''}" if names else "")
