"""Writes a study's rows as tables, and as sentences that say no more than the intervals support."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.common.origin import written_by
from benchmarks.studies.comparisons import (
    MEAN,
    MIN_SEEDS,
    Comparison,
    Rows,
    Study,
    commonest,
    differences,
    main_rows,
    mean_of,
    progress,
    seeds_of,
    unlearnt,
    values_of,
)
from benchmarks.studies.intervals import Interval, interval
from benchmarks.studies.picture import plot
from exporters.measuring.tables import markdown_table


def write_report(study: Study, rows: Rows, folder: Path) -> None:
    """Writes NAME.md and NAME.png into the folder from the existing rows; writes nothing if there are no values yet."""
    if not values_of(study, rows):
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


def origin(study: Study, rows: Rows) -> list[str]:
    """Returns lines on when, where and how the study was trained, and how much of it is done."""
    main, choice = main_rows(study, rows), choice_rows(study, rows)
    hours = sum(float(row["seconds"]) for row in (*main, *choice)) / 3600
    done, planned = progress(study, rows)
    lines = [
        f"{written_by(study.name, main)}. {done} trainings, and {len(choice)} to choose learning rates, took "
        f"{hours:.1f} hours of one core. {seeds_of(study, rows)} of each adapter; {main[0]['settings']}.",
    ]
    if done < planned:
        told = f"**In progress: {done} of {planned} trainings are done.** A task counts only the seeds of all its arms."
        lines += ["", told]
    return [*lines, "", study.beside]


def rates_table(study: Study, rows: Rows) -> list[str]:
    """Returns the rule, and a table of the values that the tried learning rates reached.

    The rate of the study is bold; the rate that the rule would choose for an arm on its own is in italics.
    """
    taken = {row["arm"]: float(row["learning_rate"]) for row in main_rows(study, rows)}
    tried: dict[str, dict[float, float]] = {}
    choice = choice_rows(study, rows)
    for row in choice:
        tried.setdefault(row["arm"], {})[float(row["learning_rate"])] = float(row["value"])
    if not tried:
        return []
    rates = sorted({rate for of in tried.values() for rate in of})
    lines = []
    for arm in (arm for arm in study.arms if arm in tried):
        alone = own_rate(tried[arm], study.near) if study.near else None
        marks = {rate: "**" if rate == taken.get(arm) else "*" if rate == alone else "" for rate in rates}
        of = tried[arm]
        lines.append([arm, *(f"{marks[rate]}{of[rate]:.4f}{marks[rate]}" if rate in of else "" for rate in rates)])
    seeds = ", ".join(sorted({row["seed"] for row in choice}))
    told = f"Seed {seeds}; {choice[0]['settings']}. Bold: the rate of the study."
    if study.near:
        told += " Italics, if it is another: the rate that the rule would choose for the arm on its own."
    table = markdown_table([f"{choice[0]['metric']} at", *(f"{rate:g}" for rate in rates)], lines)
    return [study.rule, "", told, "", *table]


def own_rate(values: Mapping[float, float], near: float) -> float:
    """Returns the smallest learning rate whose value is within `near` of the highest value. `values`: by rate."""
    return min(rate for rate, value in values.items() if max(values.values()) - value <= near)


def choice_rows(study: Study, rows: Rows) -> Rows:
    """Returns the rows that served to choose learning rates, with their most common settings."""
    choice = [row for row in rows if row["task"] == study.choice]
    settings = commonest(choice, "settings")
    return [row for row in choice if row["settings"] == settings]


def tables(study: Study, rows: Rows) -> list[str]:
    """Returns a table of the means of every arm, and one of the paired differences."""
    values = values_of(study, rows)
    parameters = {row["arm"]: int(row["parameters"]) for row in main_rows(study, rows)}
    arms = [arm for arm in study.arms if any(arm in found for found in values.values())]
    columns = [f"{task}, {study.tasks[task]}" for task in values]
    lines = []
    for arm in arms:
        cells = [_cell(interval(list(found[arm].values())), study) if arm in found else "" for found in values.values()]
        if len(study.tasks) > 1:
            cells.append(_cell(mean, study) if (mean := mean_of(values, arm, study)) else "")
        lines.append([arm, f"{parameters[arm]:,}", *cells])
    headings = ["arm", "adapter parameters", *columns, *([MEAN] if len(study.tasks) > 1 else [])]
    return [*markdown_table(headings, lines), "", *differences_table(study, rows)]


def differences_table(study: Study, rows: Rows) -> list[str]:
    """Returns a table of the mean difference and its interval, for every comparison on every task."""
    names = [*values_of(study, rows), *([MEAN] if len(study.tasks) > 1 else [])]
    names = list(dict.fromkeys([*names, *(name for of in differences(study, rows).values() for name in of)]))
    lines = [
        [
            f"{each.arm} − {each.other}",
            each.what,
            *(_cell(of[name], study, sign="+") if name in of else "" for name in names),
        ]
        for each, of in differences(study, rows).items()
    ]
    return markdown_table(["difference, seed by seed", "parameters", *names], lines, text_columns=2)


def _cell(found: Interval, study: Study, sign: str = "") -> str:
    """Returns a mean and the ends of its interval."""
    text = f"{found.mean:{sign}.{study.digits}f}"
    if found.low is None:
        return text
    return f"{text} ({found.low:{sign}.{study.digits}f} to {found.high:{sign}.{study.digits}f})"


def conclusions(study: Study, rows: Rows) -> list[str]:
    """Returns one line per comparison: the tasks on which the arm is better, worse, or not distinguished.

    Tasks on which nothing is learnt are left out.
    """
    left_out = unlearnt(study, rows)
    found = {
        each: {
            task: difference
            for task, difference in of.items()
            if difference.count >= MIN_SEEDS and task not in left_out
        }
        for each, of in differences(study, rows).items()
    }
    lines = [_sentence(study, each, of) for each, of in found.items() if of]
    return [*lines, "", *caveats(study, rows)] if lines else caveats(study, rows)


def caveats(study: Study, rows: Rows) -> list[str]:
    """Returns what the intervals are and what they leave out, and the tasks on which nothing was learnt."""
    told = [difference for of in differences(study, rows).values() for difference in of.values()]
    count = sum(difference.count >= MIN_SEEDS for difference in told)
    if not count:
        return [f"Nothing is concluded from fewer than {MIN_SEEDS} seeds."]
    unit = study.unit + (f" ({study.scale})" if study.scale else "")
    texts = [
        f"Differences in {unit}, with 95 % intervals of Student's t over the seeds. They cover the choice of the "
        "seeds, but not of the validation set or the learning rate. *Not distinguished* means that the interval "
        f"contains zero, not that the two are equal. There are {count} intervals; one in twenty misses the true "
        "difference by chance."
    ]
    if tasks := unlearnt(study, rows):
        told = ", ".join(tasks)
        texts.append(
            f"On {told} no arm is better than {study.baseline[1]}: nothing about the adapters follows from {told}."
        )
    return [" ".join(texts)]


def _sentence(study: Study, each: Comparison, of: Mapping[str, Interval]) -> str:
    better = 1 if study.higher_is_better else -1
    groups: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for task, difference in of.items():
        groups[difference.side * better].append(task)
    names = ((1, "better"), (-1, "worse"), (0, "not distinguished"))
    texts = [f"{text} on {', '.join(groups[side])}" for side, text in names if groups[side]]
    return f"* {each.arm} against {each.other} ({each.what}): {'; '.join(texts)}."
