"""A study's rows as tables, as a picture, and as sentences that say no more than the intervals allow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.studies.intervals import Interval, Values, interval, mean_over, paired
from exporters.measuring.plots import import_pyplot
from exporters.measuring.tables import markdown_table

Rows = Sequence[Mapping[str, str]]
MEAN = "mean of the tasks"
MIN_SEEDS = 3
"""What is said of fewer would be chance."""


class Comparison(NamedTuple):
    """Two arms, of which the first is said to be as good as the second; `what`: how their parameters compare."""

    arm: str
    other: str
    what: str


class Study(NamedTuple):
    """What a report is made of.

    Attributes:
        name: of the CSV file.
        title: of the report.
        tasks: in the order of the tables; with more than one, their mean stands behind.
        arms: in the same order.
        comparisons: what is answered.
        choice: the task of the rows that learning rates were chosen by.
        rule: which of those that were tried was chosen, a sentence.
        unit: what a difference is called.
        factor: what values are multiplied by before they are shown.
        digits: behind the point.
        higher_is_better: of values.
        differs: how the study differs from the paper's.
    """

    name: str
    title: str
    tasks: Mapping[str, str]
    arms: Sequence[str]
    comparisons: Sequence[Comparison]
    choice: str
    rule: str
    unit: str
    factor: float
    digits: int
    higher_is_better: bool
    differs: Sequence[str]


def write_report(study: Study, rows: Rows, folder: Path) -> None:
    """Writes NAME.md and NAME.png into the folder, of what is there of the study."""
    found = values_of(study, rows)
    if not found:
        return
    lines = [f"# {study.title}", "", *origin(study, rows), "", *tables(study, rows), "", *conclusions(study, rows), ""]
    lines += [*rates_table(study, rows), ""]
    lines += [
        f"![{study.title}]({study.name}.png)",
        "",
        "## How this differs from the paper",
        "",
        *(f"* {each}" for each in study.differs),
        "",
    ]
    (folder / f"{study.name}.md").write_text("\n".join(lines))
    plot(study, rows, folder / f"{study.name}.png")


def newest(study: Study, rows: Rows) -> list[Mapping[str, str]]:
    """The rows of the study itself with the settings of the newest, and of each arm with its newest learning rate."""
    main = sorted((row for row in rows if row["task"] in study.tasks), key=lambda row: row["time"])
    found = [row for row in main if row["settings"] == main[-1]["settings"]]
    rates = {row["arm"]: row["learning_rate"] for row in found}
    return [row for row in found if row["learning_rate"] == rates[row["arm"]]]


def values_of(study: Study, rows: Rows) -> dict[str, dict[str, Values]]:
    """By task, arm and seed, as they are shown."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in newest(study, rows):
        seeds = found.setdefault(row["task"], {}).setdefault(row["arm"], {})
        seeds[int(row["seed"])] = float(row["value"]) * study.factor
    return {task: dict(found[task]) for task in study.tasks if task in found}


def origin(study: Study, rows: Rows) -> list[str]:
    """Where, when and how it was trained."""
    main = newest(study, rows)
    days = sorted({row["time"][:10] for row in main})
    commits = sorted({row["commit"] for row in main})
    counts = sorted(
        {len(seeds) for arms in values_of(study, rows).values() for seeds in arms.values() if len(seeds) > 1}
    )
    seeds = " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]]))) if counts else "1"
    hours = sum(float(row["seconds"]) for row in main) / 3600
    return [
        f"Written by `python -m benchmarks {study.name}` from {len(main)} trainings of "
        f"{' to '.join(dict.fromkeys([days[0], days[-1]]))}, {hours:.1f} hours of one core: {main[0]['device']}; "
        f"{main[0]['versions']}; commit {', '.join(commits)}. {seeds} seeds of each adapter; {main[-1]['settings']}.",
    ]


def rates_table(study: Study, rows: Rows) -> list[str]:
    """What each learning rate gave where it was chosen, that of the study in bold."""
    taken = {row["arm"]: float(row["learning_rate"]) for row in newest(study, rows)}
    choice = [row for row in rows if row["task"] == study.choice]
    settings = max(choice, key=lambda row: row["time"])["settings"] if choice else ""
    tried = {(row["arm"], float(row["learning_rate"])): row for row in choice if row["settings"] == settings}
    rates = sorted({rate for _, rate in tried})
    lines = []
    for arm in (arm for arm in study.arms if any((arm, rate) in tried for rate in rates)):
        cells = [f"{float(tried[arm, rate]['value']):.4f}" if (arm, rate) in tried else "" for rate in rates]
        lines.append(
            [arm, *(f"**{cell}**" if rate == taken.get(arm) else cell for rate, cell in zip(rates, cells, strict=True))]
        )
    metric = next(iter(tried.values()))["metric"] if tried else ""
    return [study.rule, "", *markdown_table([f"{metric} at", *(f"{rate:g}" for rate in rates)], lines)] if lines else []


def tables(study: Study, rows: Rows) -> list[str]:
    """The means of every arm, and the paired differences."""
    values = values_of(study, rows)
    parameters = {row["arm"]: int(row["parameters"]) for row in newest(study, rows)}
    arms = [arm for arm in study.arms if any(arm in found for found in values.values())]
    columns = [f"{task}, {study.tasks[task]}" for task in values]
    lines = []
    for arm in arms:
        cells = [_cell(interval(list(found[arm].values())), study) if arm in found else "" for found in values.values()]
        if len(study.tasks) > 1:
            cells.append(_cell(mean, study) if (mean := _mean(values, arm, study)) else "")
        lines.append([arm, f"{parameters[arm]:,}", *cells])
    headings = ["arm", "parameters", *columns, *([MEAN] if len(study.tasks) > 1 else [])]
    text = markdown_table(headings, lines)
    found = differences(study, rows)
    headings = ["difference, seed by seed", "parameters", *values, *([MEAN] if len(study.tasks) > 1 else [])]
    names = headings[2:]
    lines = [
        [
            f"{each.arm} − {each.other}",
            each.what,
            *(_cell(of[name], study, sign="+") if name in of else "" for name in names),
        ]
        for each, of in found.items()
    ]
    return [*text, "", *markdown_table(headings, lines, text_columns=2)]


def _mean(values: Mapping[str, Mapping[str, Values]], arm: str, study: Study) -> Interval | None:
    over = _by_seed(values, arm, study)
    return interval(list(over.values())) if over else None


def _by_seed(values: Mapping[str, Mapping[str, Values]], arm: str, study: Study) -> Values:
    """The mean of all tasks; empty where one is missing."""
    tasks = [values.get(task, {}).get(arm, {}) for task in study.tasks]
    return mean_over(tasks) if all(tasks) else {}


def _cell(found: Interval, study: Study, sign: str = "") -> str:
    """A mean and the ends of its interval."""
    text = f"{found.mean:{sign}.{study.digits}f}"
    if found.low is None:
        return text
    return f"{text} ({found.low:{sign}.{study.digits}f} to {found.high:{sign}.{study.digits}f})"


def differences(study: Study, rows: Rows) -> dict[Comparison, dict[str, Interval]]:
    """By comparison and task, and of the mean of the tasks."""
    values = values_of(study, rows)
    found: dict[Comparison, dict[str, Interval]] = {}
    for each in study.comparisons:
        of = {task: paired(arms.get(each.arm, {}), arms.get(each.other, {})) for task, arms in values.items()}
        if len(study.tasks) > 1:
            of[MEAN] = paired(_by_seed(values, each.arm, study), _by_seed(values, each.other, study))
        found[each] = {task: difference for task, difference in of.items() if difference}
    return {each: of for each, of in found.items() if of}


def conclusions(study: Study, rows: Rows) -> list[str]:
    """One line a comparison: where it is better, where it is worse, and where the intervals do not say."""
    found = {
        each: {task: difference for task, difference in of.items() if difference.count >= MIN_SEEDS}
        for each, of in differences(study, rows).items()
    }
    lines = [_sentence(study, each, of) for each, of in found.items() if of]
    if not lines:
        return [f"Nothing is concluded from fewer than {MIN_SEEDS} seeds."]
    count = sum(len(of) for of in found.values())
    return [
        *lines,
        "",
        f"Differences in {study.unit}, with 95 % intervals of Student's t over the seeds that both arms have, on "
        "one validation set, whose own chance is not in them. *Not told apart* says that zero lies in the interval, "
        f"not that both are equal. Of {count} such intervals {count * 0.05:.1f} miss the true difference on average.",
    ]


def _sentence(study: Study, each: Comparison, of: Mapping[str, Interval]) -> str:
    better = 1 if study.higher_is_better else -1
    groups: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for task, difference in of.items():
        told = f"{task} ({_cell(difference, study, sign='+')})" if difference.side else task
        groups[difference.side * better].append(told)
    names = ((1, "better"), (-1, "worse"), (0, "not told apart"))
    texts = [f"{text} on {', '.join(groups[side])}" for side, text in names if groups[side]]
    return f"* {each.arm} against {each.other} ({each.what}): {'; '.join(texts)}."


def plot(study: Study, rows: Rows, path: Path) -> None:
    """Above, the arms of each task, every seed a small dot; below, the paired differences."""
    pyplot = import_pyplot()
    values, found = values_of(study, rows), differences(study, rows)
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
                _draw(
                    axes, interval(list(of[arm].values())), place, _COLORS[place % len(_COLORS)], list(of[arm].values())
                )
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
