"""Which runner is faster."""

import csv
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from exporters.runtime.torch_runner import Runner


@dataclass(frozen=True)
class Latency:
    """One runner's row: milliseconds a run, and the ratio of its median to the first runner's."""

    name: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float
    rounds: int
    threads: int | None


@dataclass(frozen=True)
class LatencyTable:
    """What `measure_latency` found, the first runner being the reference. `str()` is a table."""

    rows: tuple[Latency, ...]

    def __getitem__(self, name: str) -> Latency:
        return next(row for row in self.rows if row.name == name)

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'':{width}}  median ms    p20    p80  ratio"]
        lines += [
            f"{row.name:{width}}  {row.median_ms:9.2f}  {row.p20_ms:5.2f}  {row.p80_ms:5.2f}  {row.ratio:5.2f}"
            for row in self.rows
        ]
        return "\n".join(lines)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the table, one row a runner."""
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, [item.name for item in fields(Latency)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)


def measure_latency(
    runners: Mapping[str, Runner],
    inputs: Mapping[str, Any],
    *,
    rounds: int = 30,
    warmup: int = 3,
    on_round: Callable[[], object] = lambda: None,
) -> LatencyTable:
    """Times the runners against each other: each once a round, in an order that is drawn anew for every round, so that
    all see the same machine and none always follows the same other.

    Args:
        runners: by name; the first is what the ratios refer to. All must have the same `threads`.
        inputs: as for `Runner.run`.
        rounds: number of timed runs of each.
        warmup: number of runs of each before the first timed one.
        on_round: called after every round, for a progress bar.

    Raises:
        ValueError: for no runners, no rounds, or runners with different numbers of threads.
    """
    seconds = time_rounds(runners, inputs, rounds=rounds, warmup=warmup, on_round=on_round)
    return summarize(seconds, next(iter(runners.values())).threads)


def time_rounds(
    runners: Mapping[str, Runner],
    inputs: Mapping[str, Any],
    *,
    rounds: int,
    warmup: int,
    max_seconds: float = float("inf"),
    seed: int = 0,
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """The seconds of every run, by runner: what `measure_latency` summarises.

    Args:
        runners, inputs, rounds, warmup, on_round: as for `measure_latency`, and what it raises.
        max_seconds: no further round begins after this time.
        seed: of the order.
    """
    if not runners or rounds < 1:
        raise ValueError("`measure_latency` needs at least one runner and one round")
    threads = {name: runner.threads for name, runner in runners.items()}
    if len(set(threads.values())) > 1:
        raise ValueError(f"the runners have different numbers of threads, so their times cannot be compared: {threads}")
    for runner in runners.values():
        for _ in range(warmup):
            runner.run(inputs)
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    order = list(runners)
    generator = random.Random(seed)
    begin = time.perf_counter()
    for index in range(rounds):
        if index and time.perf_counter() - begin > max_seconds:
            break
        generator.shuffle(order)
        for name in order:
            start = time.perf_counter()
            runners[name].run(inputs)
            seconds[name].append(time.perf_counter() - start)
        on_round()
    return seconds


def summarize(seconds: Mapping[str, list[float]], threads: int | None) -> LatencyTable:
    """The table of timed runs, the first name being the reference."""
    reference = statistics.median(next(iter(seconds.values())))
    return LatencyTable(tuple(_row(name, times, reference, threads) for name, times in seconds.items()))


def _row(name: str, seconds: list[float], reference: float, threads: int | None) -> Latency:
    p20, median, p80 = (1000 * float(value) for value in np.percentile(seconds, (20, 50, 80)))
    return Latency(name, median, p20, p80, median / (1000 * reference), len(seconds), threads)
