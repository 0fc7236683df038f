"""A study's rows as tables, and as sentences that say no more than the intervals allow."""

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
    """Writes NAME.md and NAME.png into the folder, of what is there of the study."""
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
    """Where, when and how it was trained, and how much of the study is there."""
    main = main_rows(study, rows)
    hours = sum(float(row["seconds"]) for row in main) / 3600
    lines = [
        f"{written_by(study.name, main)}. {len(main)} trainings, {hours:.1f} hours of one core. "
        f"{seeds_of(study, rows)} of each adapter; {main[0]['settings']}.",
    ]
    done, planned = progress(study, rows)
    if done < planned:
        told = (
            f"**Under way: {done} of {planned} trainings are there.** A task counts with the seeds that all arms have."
        )
        lines += ["", told]
    return [*lines, "", study.beside] if study.beside else lines


def rates_table(study: Study, rows: Rows) -> list[str]:
    """What each learning rate gave where it was chosen, that of the study in bold."""
    taken = {row["arm"]: float(row["learning_rate"]) for row in main_rows(study, rows)}
    choice = [row for row in rows if row["task"] == study.choice]
    settings = commonest(choice, "settings")
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
    parameters = {row["arm"]: int(row["parameters"]) for row in main_rows(study, rows)}
    arms = [arm for arm in study.arms if any(arm in found for found in values.values())]
    columns = [f"{task}, {study.tasks[task]}" for task in values]
    lines = []
    for arm in arms:
        cells = [_cell(interval(list(found[arm].values())), study) if arm in found else "" for found in values.values()]
        if len(study.tasks) > 1:
            cells.append(_cell(mean, study) if (mean := mean_of(values, arm, study)) else "")
        lines.append([arm, f"{parameters[arm]:,}", *cells])
    headings = ["arm", "parameters of the adapter", *columns, *([MEAN] if len(study.tasks) > 1 else [])]
    return [*markdown_table(headings, lines), "", *differences_table(study, rows)]


def differences_table(study: Study, rows: Rows) -> list[str]:
    """Of every comparison on every task: the mean difference and the ends of its interval."""
    names = [*values_of(study, rows), *([MEAN] if len(study.tasks) > 1 else [])]
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
    """A mean and the ends of its interval."""
    text = f"{found.mean:{sign}.{study.digits}f}"
    if found.low is None:
        return text
    return f"{text} ({found.low:{sign}.{study.digits}f} to {found.high:{sign}.{study.digits}f})"


def conclusions(study: Study, rows: Rows) -> list[str]:
    """One line a comparison: where it is better, where it is worse, and where the intervals do not say."""
    found = {
        each: {task: difference for task, difference in of.items() if difference.count >= MIN_SEEDS}
        for each, of in differences(study, rows).items()
    }
    lines = [_sentence(study, each, of) for each, of in found.items() if of]
    return [*lines, "", *caveats(study, rows)] if lines else caveats(study, rows)


def caveats(study: Study, rows: Rows) -> list[str]:
    """What the intervals are, what they leave out, and on which tasks nothing was learnt."""
    told = [difference for of in differences(study, rows).values() for difference in of.values()]
    count = sum(difference.count >= MIN_SEEDS for difference in told)
    if not count:
        return [f"Nothing is concluded from fewer than {MIN_SEEDS} seeds."]
    texts = [
        f"Differences in {study.unit}, with 95 % intervals of Student's t over the seeds, on one validation set, whose "
        "own chance is not in them, and at one learning rate of each arm. *Not told apart* says that zero lies in the "
        f"interval, not that both are equal. Of {count} such intervals {count * 0.05:.1f} miss the true difference on "
        "average."
    ]
    if tasks := unlearnt(study, rows):
        texts.append(
            f"On {', '.join(tasks)} no arm is told apart from {study.baseline[1]}: nothing was learnt there, and "
            "nothing follows for the adapters."
        )
    return [" ".join(texts)]


def _sentence(study: Study, each: Comparison, of: Mapping[str, Interval]) -> str:
    better = 1 if study.higher_is_better else -1
    groups: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for task, difference in of.items():
        groups[difference.side * better].append(f"{task} ({_cell(difference, study, sign='+')})")
    names = ((1, "better"), (-1, "worse"), (0, "not told apart"))
    texts = [f"{text} on {', '.join(groups[side])}" for side, text in names if groups[side]]
    return f"* {each.arm} against {each.other} ({each.what}): {'; '.join(texts)}."
