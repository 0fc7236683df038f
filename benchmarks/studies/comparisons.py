"""What a study compares: its rows, the values of its arms, and their paired differences."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.studies.intervals import Interval, Values, interval, mean_over, paired

Rows = Sequence[Mapping[str, str]]
MEAN = "mean of the tasks"
MIN_SEEDS = 3
"""What is said of fewer would be chance."""


class Comparison(NamedTuple):
    """Two arms; `what`: how their parameters compare. `is_drawn`: in the picture, which has one scale for all."""

    arm: str
    other: str
    what: str
    is_drawn: bool = True


class Study(NamedTuple):
    """What a report is made of.

    Attributes:
        name: of the CSV file.
        title: of the report.
        tasks: in the order of the tables; with more than one, their mean stands behind.
        arms: in the same order.
        comparisons: what is answered.
        choice: the task of the rows that learning rates were chosen by.
        rule: which of those that were tried was chosen, in sentences.
        near: what an arm may lose against its best at a rate that the rule takes for it; 0 if the rule takes the best.
        seeds: how many each arm shall have.
        baseline: the arm that learns nothing, once, and what it is called in a sentence.
        beside: what the arms are, what is trained beside an adapter, and what is scored.
        unit: what a difference is called.
        scale: what it is, in brackets; may be empty.
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
    """The rows of the study itself: with the settings that most have, and of each arm with the learning rate that most
    have; of two with as many, the newer. A trial beside the study is none of it.
    """
    main = [row for row in rows if row["task"] in study.tasks]
    found = [row for row in main if row["settings"] == commonest(main, "settings")]
    by_arm = {arm: [row for row in found if row["arm"] == arm] for arm in study.arms}
    rates = {arm: commonest(of, "learning_rate") for arm, of in by_arm.items() if of}
    return [row for row in found if row["arm"] in rates and row["learning_rate"] == rates[row["arm"]]]


def commonest(rows: Rows, column: str) -> str:
    """Empty where there are no rows."""
    counts = Counter(row[column] for row in rows)
    newest = {row[column]: row["time"] for row in sorted(rows, key=lambda row: row["time"])}
    return max(counts, key=lambda value: (counts[value], newest[value]), default="")


def progress(study: Study, rows: Rows) -> tuple[int, int]:
    """How many trainings are there, and how many shall be."""
    arms = [arm for arm in study.arms if arm != study.baseline[0]]
    planned = {(task, arm, str(seed)) for task in study.tasks for arm in arms for seed in range(study.seeds)}
    return len(planned & {(row["task"], row["arm"], row["seed"]) for row in main_rows(study, rows)}), len(planned)


def values_of(study: Study, rows: Rows) -> dict[str, dict[str, Values]]:
    """By task, arm and seed, as they are shown: of the seeds that every arm of the task has."""
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
    """Of all tasks; None where one is missing."""
    over = by_seed(values, arm, study.tasks)
    return interval(list(over.values())) if over else None


def by_seed(values: Mapping[str, Mapping[str, Values]], arm: str, tasks: Iterable[str]) -> Values:
    """The mean of the tasks; empty if one is missing."""
    found = [values.get(task, {}).get(arm, {}) for task in tasks]
    return mean_over(found) if all(found) else {}


def mean_name(study: Study, learnt: Sequence[str]) -> str:
    """Of the mean of these tasks."""
    return f"mean without {' and '.join(task for task in study.tasks if task not in learnt)}"


def differences(study: Study, rows: Rows) -> dict[Comparison, dict[str, Interval]]:
    """By comparison and task, of the mean of the tasks, and of the mean of those on which something is learnt."""
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
    """The tasks on which no arm is better than the baseline."""
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
    """The other tasks: differences between adapters count on them alone."""
    left_out = unlearnt(study, rows)
    return [task for task in study.tasks if task not in left_out]


def seeds_of(study: Study, rows: Rows) -> str:
    """Such as "5 seeds", or "3 to 5 seeds" where tasks differ."""
    arms = [of for found in values_of(study, rows).values() for arm, of in found.items() if arm != study.baseline[0]]
    counts = sorted({len(seeds) for seeds in arms})
    text = " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]]))) if counts else "0"
    return f"{text} seed{'s' * (text != '1')}"
