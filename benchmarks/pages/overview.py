"""The README's three numbers and its picture: a training step, a served graph, and quality."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import glue_study
from benchmarks.deployment.end_to_end_cells import OUR_SIDE, PEFT_SIDE
from benchmarks.deployment.peers_graphs import MERGED
from benchmarks.studies.comparisons import MEAN, Comparison, differences
from benchmarks.studies.intervals import Interval
from exporters.measuring.plots import import_pyplot
from exporters.measuring.tables import markdown_table

from .block import RESULTS, Rows, sound_rows
from .training import CENTRE, OURS, PEFT, PEFT_EQUAL_PARAMETERS, STEPS
from .words import by_case, listed, machine, number, paragraph

PICTURE = "docs/overview.png"
_GUIDE = "docs/FROM_PEFT.md#from-the-base-model-to-a-served-graph"
_STEPS = {
    "MiniLM-L6": "MiniLM-L6, 16 × 64 tokens, every dense layer, eager",
    "MiniLM-L6,\nq, v": "… query and value only",
    "MiniLM-L6,\nbfloat16": "… bfloat16",
    "MiniLM-L6,\ncompiled": "… compiled",
    "SmolLM2,\nq, k, v, o": "SmolLM2-135M, 2 × 128 tokens, q,k,v,o, eager",
}
"""Label in the picture → row of the table of steps."""
_QUALITY = {
    ("MELoRA 8×1", "LoRA 8"): ("8 times the parameters", "#c0792a"),
    ("MELoRA 8×1", "LoRA 1"): ("as many parameters", "#2a7fc0"),
    ("MELoRA 8×8", "LoRA 8"): ("as many parameters", "#3c9d6b"),
}
"""Arm and the arm to compare it with → the parameters of that one, and a colour."""
_OURS_COLOR, _THEIRS_COLOR, _THEIR_OTHER_COLOR = "#2a7fc0", "#c9ced1", "#8d9499"


def numbers(_: Rows) -> list[str]:
    """Returns the table of three numbers, from the rows of three benchmarks, and a sentence from those of a fourth."""
    cases = by_case(_rows("train_step"))
    steps, fewer_sites = cases[CENTRE], cases[STEPS["… query and value only"]]
    table = [
        [
            "time of a training step of MiniLM-L6, relative to the frozen model; adapters in every dense layer (only "
            "in query and value)",
            f"{number(steps[OURS], 'ratio'):.2f} ({number(fewer_sites[OURS], 'ratio'):.2f})",
            f"PEFT {number(steps[PEFT], 'ratio'):.2f} ({number(fewer_sites[PEFT], 'ratio'):.2f}) at equal rank, "
            f"{number(steps[PEFT_EQUAL_PARAMETERS], 'ratio'):.2f} at equal parameters",
        ],
        [
            "time of a merged graph on ONNX Runtime's CPU, relative to the fastest of optimum-onnx, ONNX Runtime's "
            "optimizer, Olive and transformers",
            listed([f"{ratio:.2f} ({model})" for model, ratio in _merged().items()]),
            "the fastest: 1",
        ],
        [
            "quality: mean difference on four GLUE tasks, in points (95 % interval)",
            "<br>".join(
                f"{arm.removeprefix('MELoRA ')}: {_points(_glue(arm, other)[MEAN])}" for arm, other in _QUALITY
            ),
            "<br>".join(f"{other}, {parameters}" for (_, other), (parameters, _) in _QUALITY.items()),
        ],
    ]
    return [
        *markdown_table(["", "here", "compared with"], table, text_columns=3),
        "",
        *paragraph(
            f"n×r is n blocks of rank r; 8×8 unless stated otherwise. On {machine(_rows('peers'))}, one thread. "
            f"{_from_base_to_graph()}"
        ),
    ]


def draw(path: Path) -> None:
    """Draws the same numbers, with more cells."""
    pyplot = import_pyplot()
    figure, (steps, served, quality) = pyplot.subplots(1, 3, figsize=(11, 4.2), layout="constrained")
    _draw_steps(steps)
    _draw_served(served)
    _draw_quality(quality)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_steps(axes: Any) -> None:
    cases = by_case(_rows("train_step"))
    axes.set_title("Training: a step's time over the\nfrozen model's (the axis starts at 1)", fontsize=10, loc="left")
    for shift, side, color, label in (
        (-0.26, OURS, _OURS_COLOR, "here, 8×8"),
        (0, PEFT_EQUAL_PARAMETERS, _THEIR_OTHER_COLOR, "PEFT, rank 8: as many parameters"),
        (0.26, PEFT, _THEIRS_COLOR, "PEFT, rank 64: 8 times the parameters"),
    ):
        found = [(place, cases[STEPS[row]].get(side)) for place, row in enumerate(_STEPS.values())]
        values = {place + shift: number(row, "ratio") for place, row in found if row}
        bars = axes.barh([*values], [value - 1 for value in values.values()], 0.25, left=1, color=color, label=label)
        axes.bar_label(bars, [f"{value:.2f}" for value in values.values()], padding=3, fontsize=7)
    _label(axes, list(_STEPS))
    axes.set_xlim(1, max(axes.get_xlim()[1] * 1.05, 1.1))
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=1)


def _draw_served(axes: Any) -> None:
    merged = _merged()
    axes.set_title("Serving: a merged graph's time\nover the fastest other exporter's", fontsize=10, loc="left")
    bars = axes.barh(range(len(merged)), list(merged.values()), 0.5, color=_OURS_COLOR)
    axes.bar_label(bars, [f"{value:.2f}" for value in merged.values()], label_type="center", color="white", fontsize=9)
    axes.axvline(1, color="#777777", linewidth=0.8)
    _label(axes, list(merged))
    axes.set_xlim(0, 1.1)


def _draw_quality(axes: Any) -> None:
    axes.set_title("Quality: GLUE, points,\nwith 95 % intervals", fontsize=10, loc="left")
    tasks = [*glue_study.STUDY.tasks, MEAN]
    for shift, ((arm, other), (parameters, color)) in zip((-0.2, 0, 0.2), _QUALITY.items(), strict=True):
        found = [_glue(arm, other)[task] for task in tasks]
        axes.errorbar(
            [each.mean for each in found],
            [place + shift for place in range(len(tasks))],
            xerr=[[each.mean - each.low for each in found], [each.high - each.mean for each in found]],
            fmt="o",
            color=color,
            markersize=4,
            capsize=2,
            linewidth=1,
            label=f"{arm} − {other}, {parameters}",
        )
    axes.axvline(0, color="#777777", linewidth=0.8)
    _label(axes, [*glue_study.STUDY.tasks, "mean"])
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=1)


def _label(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _merged() -> dict[str, float]:
    """Returns model → geometric mean of our merged graph's time over the fastest other graph's."""
    found: dict[str, list[float]] = {}
    for row in _rows("peers"):
        if row["side"] == MERGED:
            found.setdefault(row["model"], []).append(number(row, "ratio"))
    return {model: statistics.geometric_mean(ratios) for model, ratios in found.items()}


def _glue(arm: str, other: str) -> dict[str, Interval]:
    """Returns task → the difference between two arms."""
    of: dict[Comparison, dict[str, Interval]] = differences(glue_study.STUDY, _rows("glue_study"))
    return next(found for each, found in of.items() if (each.arm, each.other) == (arm, other))


def _points(interval: Interval) -> str:
    return f"{interval.mean:+.1f} ({interval.low:+.1f} to {interval.high:+.1f})"


def _from_base_to_graph() -> str:
    """Returns a sentence from end_to_end.csv."""
    cases = by_case(_rows("end_to_end"))
    columns = {"training": "training_ratio", "export": "export_ratio", "a batch of 8 × 64": "ratio_8x64"}
    times = [
        f"{name} {listed([f'{number(sides[OUR_SIDE], column):.2f}' for sides in cases.values()])}"
        for name, column in columns.items()
    ]
    models = listed([case.partition(", ")[2] for case in cases])
    return f"[End to end]({_GUIDE}) ({models}), relative to {PEFT_SIDE} at equal parameters: {', '.join(times)}."


def _rows(name: str) -> Rows:
    return sound_rows(RESULTS / f"{name}.csv")
