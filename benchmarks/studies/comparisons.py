"""What a study compares: its rows, the values of its arms, and their paired differences."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.studies.intervals import Interval, Values, interval, mean_over, paired

Rows = Sequence[Mapping[str, str]]
MEAN = "mean of the tasks"
MIN_SEEDS = 3
"""Conclusions from fewer would be chance."""


class Comparison(NamedTuple):
    """Two arms. `what`: how their parameters compare. `is_drawn`: in the picture, which has one scale for all."""

    arm: str
    other: str
    what: str
    is_drawn: bool = True


class Study(NamedTuple):
    """What a report is made of.

    Attributes:
        name: the name of the CSV file.
        title: the title of the report.
        tasks: task → what is measured, in the order of the tables; the mean of several tasks comes last.
        arms: in the order of the tables.
        comparisons: the comparisons that the study is about.
        choice: the task of the rows that served to choose learning rates.
        rule: sentences on how the learning rates were chosen from those that were tried.
        near: how far an arm may be below its best value at the rate that the rule chooses; 0 if the rule chooses the
            best rate.
        seeds: the planned number of seeds per arm.
        baseline: the arm that learns nothing and runs once, and a phrase for it in a sentence.
        beside: sentences on the arms, on what is trained with an adapter, and on what is scored.
        unit: the unit of a difference.
        scale: an explanation of the unit, in brackets; may be empty.
        factor: values are multiplied by it before they are shown.
        digits: the number of decimals.
        higher_is_better: whether higher values are better.
        differs: how the study differs from the paper's.
    """

    name: str
    title: str
    tasks: Mapping[str, str]
    arms: Sequence[str]
    comparisons: Sequence[Comparison]
    choice: str
    rule: str
    near: float
    seeds: int
    baseline: tuple[str, str]
    beside: str
    unit: str
    scale: str
    factor: float
    digits: int
    higher_is_better: bool
    differs: Sequence[str]


def main_rows(study: Study, rows: Rows) -> Rows:
    """Returns the rows of the study itself, without trials.

    These have the most common settings and, for each arm, its most common learning rate; of equally common ones the
    newest counts.
    """
    main = [row for row in rows if row["task"] in study.tasks]
    found = [row for row in main if row["settings"] == commonest(main, "settings")]
    by_arm = {arm: [row for row in found if row["arm"] == arm] for arm in study.arms}
    rates = {arm: commonest(of, "learning_rate") for arm, of in by_arm.items() if of}
    return [row for row in found if row["arm"] in rates and row["learning_rate"] == rates[row["arm"]]]


def commonest(rows: Rows, column: str) -> str:
    """Returns the most common value of a column, the newest of equally common ones; empty if there are no rows."""
    counts = Counter(row[column] for row in rows)
    newest = {row[column]: row["time"] for row in sorted(rows, key=lambda row: row["time"])}
    return max(counts, key=lambda value: (counts[value], newest[value]), default="")


def progress(study: Study, rows: Rows) -> tuple[int, int]:
    """Returns the number of finished trainings and of planned ones."""
    arms = [arm for arm in study.arms if arm != study.baseline[0]]
    planned = {(task, arm, str(seed)) for task in study.tasks for arm in arms for seed in range(study.seeds)}
    return len(planned & {(row["task"], row["arm"], row["seed"]) for row in main_rows(study, rows)}), len(planned)


def values_of(study: Study, rows: Rows) -> dict[str, dict[str, Values]]:
    """Returns the values as shown, by task, arm and seed, for the seeds that every arm of the task has."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in main_rows(study, rows):
        seeds = found.setdefault(row["task"], {}).setdefault(row["arm"], {})
        seeds[int(row["seed"])] = float(row["value"]) * study.factor
    return {task: kept for task in study.tasks if (kept := _of_common_seeds(study, found.get(task, {})))}


def _of_common_seeds(study: Study, arms: Mapping[str, Mapping[int, float]]) -> dict[str, Values]:
    trained = {arm: seeds for arm, seeds in arms.items() if arm != study.baseline[0]}
    common = sorted(set.intersection(*map(set, trained.values()))) if trained else []
    kept: dict[str, Values] = {arm: {seed: seeds[seed] for seed in common} for arm, seeds in trained.items()}
    return {**kept, **{arm: arms[arm] for arm in arms if arm not in trained}} if common else {}


def mean_of(values: Mapping[str, Mapping[str, Values]], arm: str, study: Study) -> Interval | None:
    """Returns the mean over all tasks with its interval; None if a task is missing."""
    over = by_seed(values, arm, study.tasks)
    return interval(list(over.values())) if over else None


def by_seed(values: Mapping[str, Mapping[str, Values]], arm: str, tasks: Iterable[str]) -> Values:
    """Returns the mean over the tasks by seed; empty if a task is missing."""
    found = [values.get(task, {}).get(arm, {}) for task in tasks]
    return mean_over(found) if all(found) else {}


def mean_name(study: Study, learnt: Sequence[str]) -> str:
    """Returns the name of the mean over these tasks."""
    return f"mean without {' and '.join(task for task in study.tasks if task not in learnt)}"


def differences(study: Study, rows: Rows) -> dict[Comparison, dict[str, Interval]]:
    """Returns the paired differences by comparison and task.

    Of several tasks it adds the differences of their mean, and of the mean of the tasks on which something is learnt.
    """
    values = values_of(study, rows)
    learnt = learnt_tasks(study, rows)
    found: dict[Comparison, dict[str, Interval]] = {}
    for each in study.comparisons:
        of = {task: paired(arms.get(each.arm, {}), arms.get(each.other, {})) for task, arms in values.items()}
        if len(study.tasks) > 1:
            of[MEAN] = paired(by_seed(values, each.arm, study.tasks), by_seed(values, each.other, study.tasks))
        if 1 < len(learnt) < len(study.tasks):
            of[mean_name(study, learnt)] = paired(
                by_seed(values, each.arm, learnt), by_seed(values, each.other, learnt)
            )
        found[each] = {task: difference for task, difference in of.items() if difference}
    return {each: of for each, of in found.items() if of}


def unlearnt(study: Study, rows: Rows) -> list[str]:
    """Returns the tasks on which no arm is better than the baseline."""
    name, better = study.baseline[0], 1 if study.higher_is_better else -1
    found = []
    for task, arms in values_of(study, rows).items():
        least = next(iter(arms.get(name, {}).values()), None)
        trained = [list(of.values()) for arm, of in arms.items() if arm != name]
        if least is not None and all(len(of) >= MIN_SEEDS for of in trained):
            sides = [interval([value - least for value in of]).side for of in trained]
            if better not in sides:
                found.append(task)
    return found


def learnt_tasks(study: Study, rows: Rows) -> list[str]:
    """Returns the other tasks: only on them do differences between adapters count."""
    left_out = unlearnt(study, rows)
    return [task for task in study.tasks if task not in left_out]


def seeds_of(study: Study, rows: Rows) -> str:
    """Returns a phrase such as "5 seeds", or "3 to 5 seeds" if the tasks differ."""
    arms = [of for found in values_of(study, rows).values() for arm, of in found.items() if arm != study.baseline[0]]
    counts = sorted({len(seeds) for seeds in arms})
    text = " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]]))) if counts else "0"
    return f"{text} seed{'s' * (text != '1')}"
