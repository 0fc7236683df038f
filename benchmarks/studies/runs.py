"""Trains the runs of a study and writes its CSV file; a stopped study continues when it is started again."""

import importlib
import json
import math
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.cases import run_apart
from benchmarks.common.checkout import DONE, FAILED, source_digest
from exporters.measuring.machine import origin_columns
from exporters.measuring.tables import read_csv, write_csv
from melora_fx import MELoRAError

COLUMNS = (
    *("task", "arm", "seed", "metric", "value", "epochs", "learning_rate", "parameters", "seconds"),
    *("settings", "device", "versions", "source", "commit", "time"),
)
"""`parameters`: those of the adapter, without the head. `seconds`: the training's, which runs next to others."""
SAME = ("task", "arm", "seed", "epochs", "learning_rate", "settings")
"""A run is done if a row has its values in these columns. Changed code trains nothing again, except with --again;
`source` says which code it was."""

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

Row = dict[str, Any]


class Arm(NamedTuple):
    """An adapter that is compared. `rank`: that of each block.

    `kind`: "LoRA" is PEFT's; "MELoRA" is ours; "none" is no adapter, so that only the head is trained, if there is one;
    "constant" trains nothing and always gives one answer.
    """

    name: str
    kind: str
    rank: int = 0
    num_blocks: int = 1


class Run(NamedTuple):
    """One training. `epochs`: passes over the training data. `given`: further values for the process."""

    task: str
    arm: Arm
    seed: int
    epochs: float
    learning_rate: float
    settings: str
    given: Mapping[str, Any]

    @property
    def job(self) -> dict[str, Any]:
        """The argument of the process."""
        facts = {"task": self.task, "arm": list(self.arm), "seed": self.seed, "epochs": self.epochs}
        return {**facts, "learning_rate": self.learning_rate, **self.given}

    @property
    def key(self) -> tuple[str, ...]:
        values = (self.task, self.arm.name, self.seed, self.epochs, self.learning_rate, self.settings)
        return tuple(map(str, values))


def key_of(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in SAME)


def train_all(options: Namespace, script: str, runs: Sequence[Run]) -> int:
    """Trains the runs that have no row yet, `options.processes` at a time, and writes each row as soon as it is known.

    Args:
        options: those of the command line; with --quick, trains in this process, one run after another.
        script: the module of `benchmarks` that trains one run.
        runs: in the order in which they begin.

    Returns:
        An exit status.
    """
    path = options.out / f"{options.benchmark}.csv"
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [run for run in runs if options.only in name_of(run.task, run.arm)]
    done = {key_of(row) for row in read_csv(path)}
    left = [run for run in chosen if options.again or run.key not in done]
    print(f"{options.benchmark}: {len(chosen) - len(left)} of {len(chosen)} runs have a row in {path}", flush=True)
    start = time.perf_counter()
    num_failed = 0
    train = _train_here if options.quick else _train_apart
    with ThreadPoolExecutor(1 if options.quick else options.processes) as pool:
        futures = {pool.submit(train, script, run): run for run in left}
        try:
            for index, future in enumerate(as_completed(futures), start=1):
                run, seconds = futures[future], time.perf_counter() - start
                told = f"[{index}/{len(left)}, {seconds:.0f} s] {run.task}, {run.arm.name}, {run.seed}"
                try:
                    row = _row(run, future.result())
                    if not math.isfinite(float(row["value"])):
                        raise MELoRAError(f"{row['metric']} is {row['value']}")
                except MELoRAError as error:  # must not stop the other runs
                    num_failed += 1
                    print(f"{told}: failed: {error}", flush=True)
                    continue
                _add(row, path)
                print(f"{told}, {run.learning_rate}: {row['metric']} {row['value']:.4f}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # waiting runs would train, and be lost
            raise
    return FAILED if num_failed else DONE


def name_of(task: str, arm: Arm) -> str:
    """Returns the name in which `--only` is searched."""
    return f"{task} {arm.name}"


def is_misused(options: Namespace, tasks: Iterable[str], arms: Sequence[Arm]) -> bool:
    """Returns whether `--only` matches no run, and says so, before learning rates are chosen for nothing."""
    if any(options.only in name_of(task, arm) for task in tasks for arm in arms):
        return False
    print(f"`--only {options.only}` matches no run; runs have names such as `{name_of(next(iter(tasks)), arms[0])}`")
    return True


def for_choice(options: Namespace) -> Namespace:
    """Returns the options for the runs that serve to choose learning rates: all are needed, regardless of `--only`."""
    return Namespace(**vars(options) | {"only": "", "again": options.again and not options.only})


def _train_apart(script: str, run: Run) -> Row:
    return run_apart(script, json.dumps(run.job), environment=ONE_THREAD)


def _train_here(script: str, run: Run) -> Row:
    return importlib.import_module(f"benchmarks.{script}").run(run.job)


def _row(run: Run, found: Row) -> Row:
    same = dict(zip(SAME, (run.task, run.arm.name, run.seed, run.epochs, run.learning_rate, run.settings), strict=True))
    return same | found | {"source": source_digest()} | origin_columns("cpu", "peft")


def _add(row: Row, path: Path) -> None:
    key = tuple(str(row[name]) for name in SAME)
    write_csv([old for old in read_csv(path) if key_of(old) != key] + [row], COLUMNS, path)


def values_by_rate(rows: Sequence[Mapping[str, str]], runs: Sequence[Run]) -> dict[str, dict[float, float]]:
    """Returns the value of each arm at each learning rate, to choose one.

    Args:
        rows: those of the CSV file.
        runs: those that serve to choose learning rates; rows of others do not count.

    Returns:
        The mean over the seeds, by the arm's name and the learning rate.

    Raises:
        MELoRAError: if a run has no row: the others could choose another rate.
    """
    values = {key_of(row): float(row["value"]) for row in rows}
    if missing := [f"{run.arm.name} at {run.learning_rate:g}" for run in runs if run.key not in values]:
        raise MELoRAError(f"no learning rates can be chosen without {', '.join(missing)}: start the study again")
    found: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        found.setdefault(run.arm.name, {}).setdefault(run.learning_rate, []).append(values[run.key])
    return {arm: {rate: sum(each) / len(each) for rate, each in rates.items()} for arm, rates in found.items()}
