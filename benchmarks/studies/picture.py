"""A study as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies.comparisons import Rows, Study, differences, values_of
from benchmarks.studies.intervals import Interval, interval
from exporters.measuring.plots import import_pyplot


def plot(study: Study, rows: Rows, path: Path) -> None:
    """Above, the arms of each task, every seed a small dot; below, the paired differences."""
    pyplot = import_pyplot()
    values = values_of(study, rows)
    found = {each: of for each, of in differences(study, rows).items() if each.is_drawn}
    arms = [arm for arm in study.arms if any(arm in of for of in values.values())]
    number = max(len(values), len(found))
    height = 1.2 + 0.3 * len(arms)
    below = 1.2 + 0.3 * max((len(of) for of in found.values()), default=1)
    figure = pyplot.figure(figsize=(3.1 * max(number, 2), height + below), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(height, below))
    for axes, (task, of) in zip(
        upper.subplots(1, len(values), sharey=True, squeeze=False)[0], values.items(), strict=True
    ):
        axes.set_title(f"{task}, {study.tasks[task]}", fontsize=9, loc="left")
        for place, arm in enumerate(arms):
            if arm in of:
                seeds = list(of[arm].values())
                _draw(axes, interval(seeds), place, _COLORS[study.arms.index(arm) % len(_COLORS)], seeds)
        _label(axes, arms)
    if found:
        grid = lower.subplots(1, len(found), sharey=True, sharex=True, squeeze=False)[0]
        for axes, (each, of) in zip(grid, found.items(), strict=True):
            axes.set_title(f"{each.arm} − {each.other}\n{each.what}", fontsize=9, loc="left")
            axes.axvline(0, color="#999999", linewidth=0.8)
            for place, difference in enumerate(of.values()):
                _draw(axes, difference, place, "#333333", [])
            _label(axes, list(of))
            axes.set_xlabel(f"{study.unit}, {'right' if study.higher_is_better else 'left'} is better", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


_COLORS = ("#c0792a", "#2a7fc0", "#e3b98a", "#20848c", "#8e5ea2", "#5f6b6d")


def _draw(axes: Any, found: Interval, place: int, color: str, dots: Sequence[float]) -> None:
    axes.plot(dots, [place] * len(dots), ".", color=color, alpha=0.4, markersize=4)
    if found.low is not None:
        axes.plot([found.low, found.high], [place, place], color=color, linewidth=1.5)
    axes.plot([found.mean], [place], "o", color=color, markersize=5)


def _label(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
