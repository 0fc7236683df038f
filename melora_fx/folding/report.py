"""The report of what a fold loses to rounding, site by site.

The share of an update that is lost to the weight's dtype is ‖round(W+Δ) − (W+Δ)‖ / ‖Δ‖, over the blocks it changes.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from melora_fx.tables import table

LARGE_SHARE = 0.25
"""The share above which a report warns."""
_NUM_SHOWN = 20
"""The number of sites that a table shows."""


@dataclass(frozen=True)
class SiteFold:
    """What a fold does to one weight.

    Attributes:
        name: the site's name.
        dtype: the weight's dtype, to which the sum is rounded.
        rounding_share: the share of the update that is lost to rounding, as a fraction; 0 for an update of zeros.
        max_abs_change: the largest absolute change of a value of the weight.
        ranks: the numerical rank of each block's update, for each part of `split` and each matrix of a stack.
        total_rank: the largest possible sum of `ranks`.
    """

    name: str
    dtype: str
    rounding_share: float
    max_abs_change: float
    ranks: tuple[int, ...]
    total_rank: int


@dataclass(frozen=True)
class FoldReport:
    """The sites of a fold, the one that loses most first. `str()` is a table, with a remedy if much is lost.

    Attributes:
        sites: what the fold does to each weight.
        adapter_sha256: the SHA-256 that identifies the merged adapter.
        notes: further facts for the user.
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
        """Returns what to do about the sites that lose much; empty if there are none."""
        losing = [site for site in self.sites if site.rounding_share > LARGE_SHARE]
        if not losing:
            return ""
        dtypes = ", ".join(sorted({site.dtype for site in losing}))
        return (
            f"{len(losing)} of {len(self.sites)} sites lose more than {LARGE_SHARE:.0%} of their adapter to the "
            f"rounding to {dtypes}, worst `{losing[0].name}` ({losing[0].rounding_share:.0%}): keep the adapter "
            "unmerged, or fold into float32: `fold(copy.deepcopy(model).float())` in memory, or a float32 base on disk"
        )


def make_report(measured: Iterable[SiteFold], adapter_sha256: str, notes: Iterable[str] = ()) -> FoldReport:
    """Returns the report of these sites, and warns if a remedy is needed."""
    sites = tuple(sorted(measured, key=lambda site: -site.rounding_share))
    report = FoldReport(sites, adapter_sha256, tuple(notes))
    if remedy := report.remedy():
        warnings.warn(remedy, stacklevel=3)
    return report


def _cells(site: SiteFold) -> tuple[str, ...]:
    """Returns the row of a site in the table."""
    return (
        site.name,
        site.dtype,
        _percent(site.rounding_share),
        f"{site.max_abs_change:.1e}",
        f"{sum(site.ranks)} of {site.total_rank}",
    )


def _percent(share: float) -> str:
    return "<0.01%" if 0 < share < 5e-5 else f"{share:.2%}"
