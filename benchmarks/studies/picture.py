"""Draws the picture of a study."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies.comparisons import Rows, Study, differences, seeds_of, unlearnt, values_of
from benchmarks.studies.intervals import Interval, Values, interval
from exporters.measuring.plots import import_pyplot

_COLORS = ("#c0792a", "#2a7fc0", "#e3b98a", "#20848c", "#8e5ea2", "#5f6b6d")
_FAR = 1.5
"""An arm whose mean is more than this many widths outside the range of the compared arms is written at the edge."""


def plot(study: Study, rows: Rows, path: Path) -> None:
    """Draws the arms of each task, with a small dot for every seed, and below them the paired differences."""
    pyplot = import_pyplot()
    values = values_of(study, rows)
    found = {each: of for each, of in differences(study, rows).items() if each.is_drawn}
    compared = {arm for each in found for arm in (each.arm, each.other)}
    arms = [arm for arm in study.arms if any(arm in of for of in values.values())]
    number = max(len(values), len(found))
    height = 1.4 + 0.32 * len(arms)
    below = 1.2 + 0.3 * max((len(of) for of in found.values()), default=1)
    figure = pyplot.figure(figsize=(3.1 * max(number, 2), height + below), layout="constrained")
    scale = f"; {study.scale}" if study.scale else ""
    figure.suptitle(
        f"{study.title}, {seeds_of(study, rows)}: mean, 95 % interval, and each seed (small dot){scale}", fontsize=10
    )
    upper, lower = figure.subfigures(2, 1, height_ratios=(height, below))
    nothing_learnt = unlearnt(study, rows)
    for axes, (task, of) in zip(
        upper.subplots(1, len(values), sharey=True, squeeze=False)[0], values.items(), strict=True
    ):
        axes.set_title(
            f"{task}, {study.tasks[task]}{' (not learnt)' * (task in nothing_learnt)}", fontsize=9, loc="left"
        )
        _draw_arms(axes, study, arms, of, compared)
    if found:
        grid = lower.subplots(1, len(found), sharey=True, sharex=True, squeeze=False)[0]
        for axes, (each, of) in zip(grid, found.items(), strict=True):
            axes.set_title(f"{each.arm} − {each.other}\n{each.what}", fontsize=9, loc="left")
            axes.axvline(0, color="#999999", linewidth=0.8)
            for place, (task, difference) in enumerate(of.items()):
                color = "#bbbbbb" if task in nothing_learnt else "#333333"
                _draw(axes, difference, place, color, is_filled=bool(difference.side))
            _label(axes, list(of))
            side = "right" if study.higher_is_better else "left"
            axes.set_xlabel(f"{study.unit}; {side} of 0: {each.arm} is better", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_arms(axes: Any, study: Study, arms: Sequence[str], of: Mapping[str, Values], compared: set[str]) -> None:
    """Draws one line per arm. The axis spans the arms that are compared, and others if they are near."""
    spans = {arm: _span(list(seeds.values())) for arm, seeds in of.items()}
    low = min(spans[arm][0] for arm in of if arm in compared or not compared)
    high = max(spans[arm][1] for arm in of if arm in compared or not compared)
    width = high - low or 1.0
    shown = [arm for arm in of if low - _FAR * width < interval(list(of[arm].values())).mean < high + _FAR * width]
    low, high = min(spans[arm][0] for arm in shown), max(spans[arm][1] for arm in shown)
    axes.set_xlim(low - 0.08 * (high - low or 1.0), high + 0.08 * (high - low or 1.0))
    for place, arm in enumerate(arms):
        if arm not in of:
            continue
        seeds = list(of[arm].values())
        color = _COLORS[study.arms.index(arm) % len(_COLORS)]
        if arm in shown:
            if len(seeds) > 1:
                axes.plot(seeds, [place + 0.28] * len(seeds), ".", color=color, alpha=0.6, markersize=4)
            _draw(axes, interval(seeds), place, color)
        else:
            mean = interval(seeds).mean
            is_left = mean < low
            text = f"◂ {mean:.{study.digits}f}" if is_left else f"{mean:.{study.digits}f} ▸"
            at = {"x": 0.01 if is_left else 0.99, "ha": "left" if is_left else "right"}
            axes.text(y=place, s=text, va="center", fontsize=8, color=color, transform=axes.get_yaxis_transform(), **at)
    _label(axes, arms)


def _span(seeds: Sequence[float]) -> tuple[float, float]:
    """Returns the range of a line: of its interval and its dots."""
    found = interval(seeds)
    ends = [end for end in (found.low, found.high) if end is not None]
    return min(*seeds, found.mean, *ends), max(*seeds, found.mean, *ends)


def _draw(axes: Any, found: Interval, place: int, color: str, *, is_filled: bool = True) -> None:
    """Draws an interval. `is_filled`: whether its dot is; an interval that contains zero gets a hollow one."""
    if found.low is not None:
        axes.plot([found.low, found.high], [place, place], color=color, linewidth=1.5)
    axes.plot([found.mean], [place], "o", color=color, markerfacecolor=color if is_filled else "white", markersize=5)


def _label(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
