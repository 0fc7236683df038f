"""What a study trains, and its CSV file: a run that is stopped goes on where it was when it is started again."""

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
"""`parameters`: of the adapter alone, without the head. `seconds`: of the training, beside others: no timing."""
SAME = ("task", "arm", "seed", "epochs", "learning_rate", "settings")
"""A run is done if a row has these. Code that changed trains nothing anew: `source` says which code it was, --again."""

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

Row = dict[str, Any]


class Arm(NamedTuple):
    """An adapter that is compared. `rank`: of each block.

    `kind`: "LoRA", which is PEFT's; "MELoRA", ours; "none", no adapter: a head is trained alone; "constant": nothing
    is trained, and one answer given.
    """

    name: str
    kind: str
    rank: int = 0
    num_blocks: int = 1


class Run(NamedTuple):
    """One training. `epochs`: passes over what is trained on. `given`: what the process takes beside these."""

    task: str
    arm: Arm
    seed: int
    epochs: float
    learning_rate: float
    settings: str
    given: Mapping[str, Any]

    @property
    def job(self) -> dict[str, Any]:
        """What the process is given."""
        facts = {"task": self.task, "arm": list(self.arm), "seed": self.seed, "epochs": self.epochs}
        return {**facts, "learning_rate": self.learning_rate, **self.given}

    @property
    def key(self) -> tuple[str, ...]:
        values = (self.task, self.arm.name, self.seed, self.epochs, self.learning_rate, self.settings)
        return tuple(map(str, values))


def key_of(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in SAME)


def train_all(options: Namespace, script: str, runs: Sequence[Run]) -> int:
    """Trains what has no row yet, `options.processes` at a time; each row is on disk as soon as it is there.

    Args:
        options: of the command line.
        script: the module of `benchmarks` that trains one run.
        runs: in the order in which they begin.

    Returns:
        an exit status.
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
                except MELoRAError as error:  # must not cost the other runs
                    num_failed += 1
                    print(f"{told}: failed: {error}", flush=True)
                    continue
                _add(row, path)
                print(f"{told}, {run.learning_rate}: {row['metric']} {row['value']:.4f}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what waits would train on, and be lost
            raise
    return FAILED if num_failed else DONE


def name_of(task: str, arm: Arm) -> str:
    """What `--only` looks into."""
    return f"{task} {arm.name}"


def is_misused(options: Namespace, tasks: Iterable[str], arms: Sequence[Arm]) -> bool:
    """Whether `--only` leaves no run, which it says: before learning rates are chosen for nothing."""
    if any(options.only in name_of(task, arm) for task in tasks for arm in arms):
        return False
    print(f"`--only {options.only}` is in the name of no run, which is such as `{name_of(next(iter(tasks)), arms[0])}`")
    return True


def for_choice(options: Namespace) -> Namespace:
    """The options of the runs that learning rates are chosen by: all are needed, whatever `--only` says."""
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
    """What each learning rate gave each arm, where learning rates are chosen.

    Args:
        rows: of the CSV file.
        runs: those that learning rates are chosen by; rows of others do not count.

    Returns:
        by the arm's name and the learning rate, the mean over the seeds.

    Raises:
        MELoRAError: where a run has no row: what is left would choose another rate.
    """
    values = {key_of(row): float(row["value"]) for row in rows}
    if missing := [f"{run.arm.name} at {run.learning_rate:g}" for run in runs if run.key not in values]:
        raise MELoRAError(f"no learning rates can be chosen without {', '.join(missing)}: start again")
    found: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        found.setdefault(run.arm.name, {}).setdefault(run.learning_rate, []).append(values[run.key])
    return {arm: {rate: sum(each) / len(each) for rate, each in rates.items()} for arm, rates in found.items()}
