"""Plots latencies: what each form costs compared with the first one."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from melora_fx import MELoRAError

from .latency import Latency, LatencyTable

_COLORS = ("#5f6b6d", "#2a7fc0", "#c0792a", "#3d9970", "#8e5ea2", "#b5383c", "#7f8c1d", "#20848c")
_MAX_COLUMNS = 3
_LONG_NAME = 20


def import_pyplot() -> Any:
    """Returns matplotlib's `pyplot`, which needs no display here.

    Raises:
        MELoRAError: if matplotlib is not installed; names the extra.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise MELoRAError('matplotlib is not installed: pip install "melora_fx[train]"') from error
    return pyplot


def format_ms(value: float) -> str:
    """Formats milliseconds with three digits or more, because neighbours differ by a few per cent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 1e-3))))}f}"


def plot_latency(
    panels: Mapping[str, LatencyTable], title: str, path: str | os.PathLike[str], *, reference: str | None = None
) -> None:
    """Draws one panel per table, side by side on one scale: a dot for each row's ratio, a bar from p20 to p80.

    Args:
        panels: the tables by panel title; a row has the same line and colour in every panel.
        title: says what was measured: model, threads, machine.
        path: the file to write, with a suffix that matplotlib knows, such as .png.
        reference: name of what the ratios refer to, for the axis label; None: the first row, the same in every panel.

    Raises:
        MELoRAError: if matplotlib is not installed.
    """
    pyplot = import_pyplot()
    names = list(dict.fromkeys(row.name for table in panels.values() for row in table.rows))
    divided_by = reference or (names[0] if len(names[0]) <= _LONG_NAME else "the first")
    figure, grid = _make_grid(pyplot, len(panels), names)
    for axes, (panel, table) in zip(grid.flat, panels.items(), strict=False):
        axes.set_title(panel, fontsize=10, loc="left")
        _draw(axes, table, names)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for column in grid.T:  # the lowest panel of each column shows the scale
        lowest = [axes for axes in column if axes.get_visible()][-1]
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel(f"time ÷ time of {divided_by}")
    grid[0, 0].set(xlim=_range(panels), ylim=(len(names) - 0.4, -0.6))
    grid[0, 0].set_yticks(range(len(names)), names)
    legend = "left is faster; dot: median, bar: p20 to p80"
    if any(table.is_within_noise(row) for table in panels.values() for row in table.rows):
        legend += "\nhollow dot and ≈: within noise, p20 to p80 is wider than the difference"
    figure.suptitle(f"{title}\n{legend}", fontsize=11)
    figure.savefig(Path(path), dpi=150)
    pyplot.close(figure)


def _make_grid(pyplot: Any, num_panels: int, names: Sequence[str]) -> tuple[Any, Any]:
    """Returns (figure, panels (rows, columns)), as large as the lines need; all panels share their axes."""
    num_columns = min(num_panels, _MAX_COLUMNS)
    num_rows = -(-num_panels // num_columns)
    width = 7.5 if num_columns == 1 else 1.8 + 3.4 * num_columns
    width += 0.09 * max(0, max(map(len, names)) - _LONG_NAME)
    height = 1.1 + num_rows * (0.65 + 0.3 * len(names))
    return pyplot.subplots(
        num_rows,
        num_columns,
        figsize=(width, height),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )


def _draw(axes: Any, table: LatencyTable, names: list[str]) -> None:
    reference = table.rows[0].median_ms / table.rows[0].ratio
    axes.axvline(1.0, color=_COLORS[0], linewidth=1, linestyle="--", zorder=1)
    for row in table.rows:
        line = names.index(row.name)
        color = _COLORS[line % len(_COLORS)]
        axes.hlines(line, row.p20_ms / reference, row.p80_ms / reference, color=color, linewidth=5, alpha=0.35)
        is_noise = table.is_within_noise(row)
        face = "white" if is_noise else color
        axes.plot(row.ratio, line, "o", color=color, markerfacecolor=face, markersize=6, zorder=3)
        axes.annotate(
            f"{'≈' if is_noise else ''}{row.ratio:.2f} ×  {format_ms(row.median_ms)} ms",
            (1.02, line),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
            color=color,
            annotation_clip=False,
        )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e3e6e7", linewidth=0.8)
    axes.set_axisbelow(True)


def _range(panels: Mapping[str, LatencyTable]) -> tuple[float, float]:
    """Returns the ends of the scale, with every bar and 1.00 inside."""

    def ratios(row: Latency) -> tuple[float, float]:
        reference = row.median_ms / row.ratio
        return min(row.ratio, row.p20_ms / reference), max(row.ratio, row.p80_ms / reference)

    ends = [ratios(row) for table in panels.values() for row in table.rows]
    low = min(0.95, *(end[0] for end in ends))
    high = max(1.1, *(end[1] for end in ends))
    margin = 0.03 * (high - low)
    return low - margin, high + margin
