"""The report of what a fold rounds away, site by site.

The share of an update that the weight's dtype rounds away is ‖round(W+Δ) − (W+Δ)‖ / ‖Δ‖, over the blocks it changes.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from melora_fx.tables import table

LARGE_SHARE = 0.25
"""Above this share a report warns."""
_NUM_SHOWN = 20
"""How many sites a table shows."""


@dataclass(frozen=True)
class SiteFold:
    """What a fold does to one weight.

    Attributes:
        dtype: the weight's, which the sum is rounded to.
        rounding_share: share of the update that rounding takes, 0 for an update of zeros.
        max_abs_change: largest change of a value of the weight.
        ranks: numerical rank of each block's update, block by block, each part of `split`, each matrix of a stack.
        total_rank: the largest that their sum can be.
    """

    name: str
    dtype: str
    rounding_share: float
    max_abs_change: float
    ranks: tuple[int, ...]
    total_rank: int


@dataclass(frozen=True)
class FoldReport:
    """The sites of a fold, the one that loses most first. `str()` is a table with a remedy where much is lost.

    Attributes:
        sites: what happens at each.
        adapter_sha256: identity of the adapter that was merged.
        notes: what else the user should know.
    """

    sites: tuple[SiteFold, ...]
    adapter_sha256: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("site", "dtype", "rounded away", "max change", "rank")]
        rows += [_cells(site) for site in self.sites[:_NUM_SHOWN]]
        lines = table(rows)
        if hidden := self.sites[_NUM_SHOWN:]:
            lines.append(f"… and {len(hidden)} sites with less, {_percent(hidden[0].rounding_share)} at most")
        remedy = self.remedy()
        return "\n".join([*lines, *([remedy] if remedy else []), *(f"note: {note}" for note in self.notes)])

    def remedy(self) -> str:
        """What to do about the sites that lose much; empty where none does."""
        losing = [site for site in self.sites if site.rounding_share > LARGE_SHARE]
        if not losing:
            return ""
        dtypes = ", ".join(sorted({site.dtype for site in losing}))
        return (
            f"{len(losing)} of {len(self.sites)} sites lose more than {LARGE_SHARE:.0%} of their adapter to the "
            f"rounding to {dtypes}, worst `{losing[0].name}` ({losing[0].rounding_share:.0%}): keep the adapter "
            "unmerged, or fold into float32: `fold(copy.deepcopy(model).float())` in memory, a float32 base on disk"
        )


def make_report(measured: Iterable[SiteFold], adapter_sha256: str, notes: Iterable[str] = ()) -> FoldReport:
    """The report of these sites, which warns where a remedy is needed."""
    sites = tuple(sorted(measured, key=lambda site: -site.rounding_share))
    report = FoldReport(sites, adapter_sha256, tuple(notes))
    if remedy := report.remedy():
        warnings.warn(remedy, stacklevel=3)
    return report


def _cells(site: SiteFold) -> tuple[str, ...]:
    """The row of a site in the table."""
    return (
        site.name,
        site.dtype,
        _percent(site.rounding_share),
        f"{site.max_abs_change:.1e}",
        f"{sum(site.ranks)} of {site.total_rank}",
    )


def _percent(share: float) -> str:
    return "<0.01%" if 0 < share < 5e-5 else f"{share:.2%}"
