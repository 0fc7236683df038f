"""Times runners against each other."""

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from exporters.runtime.torch_runner import Runner
from melora_fx.tables import table

from .tables import write_csv
from .timing import summarize, time_in_turn


@dataclass(frozen=True)
class Latency:
    """The row of one runner.

    Attributes:
        name: the name of the runner.
        median_ms: median of the timed runs, in milliseconds.
        p20_ms: 20th percentile, in milliseconds.
        p80_ms: 80th percentile, in milliseconds.
        ratio: the median divided by that of the first runner.
        rounds: number of timed runs.
        threads: intra-operator threads; None for the default.
    """

    name: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float
    rounds: int
    threads: int | None


@dataclass(frozen=True)
class LatencyTable:
    """The result of `measure_latency`; the first runner is the reference. `str()` renders a table.

    Attributes:
        rows: one row per runner, in the order of `runners`.
    """

    rows: tuple[Latency, ...]

    def __getitem__(self, name: str) -> Latency:
        return next(row for row in self.rows if row.name == name)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("", "median ms", "p20", "p80", "ratio", "")]
        for row in self.rows:
            times = (row.median_ms, row.p20_ms, row.p80_ms, row.ratio)
            mark = "within noise" if self.is_within_noise(row) else ""
            rows.append((row.name, *(f"{value:.2f}" for value in times), mark))
        lines = table(rows, right=range(1, 5))
        if any(map(self.is_within_noise, self.rows)):
            lines.append("within noise: p20 to p80 is wider than the difference from the reference's median")
        return "\n".join(lines)

    def is_within_noise(self, row: Latency) -> bool:
        """Returns whether the row shows no difference from the reference.

        That is, p20 to p80 of the row, or of the reference, is wider than the difference of their medians.
        """
        first = self.rows[0]
        if row == first and row.ratio == 1:
            return False
        compared = (row, first) if first.ratio == 1 else (row,)  # a row of results may lack its reference
        spread_ms = max(each.p80_ms - each.p20_ms for each in compared)
        return abs(row.median_ms - row.median_ms / row.ratio) < spread_ms

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as a CSV file, one row per runner; times are in milliseconds.

        Args:
            path: the file to write; an existing one is replaced.

        Raises:
            MELoRAError: if the file cannot be written.
        """
        write_csv([asdict(row) for row in self.rows], [item.name for item in fields(Latency)], path)


def measure_latency(
    runners: Mapping[str, Runner],
    inputs: Mapping[str, Any],
    *,
    rounds: int = 30,
    warmup: int = 3,
    on_round: Callable[[], object] = lambda: None,
) -> LatencyTable:
    """Times the runners against each other: each once per round, in a new random order every round.

    All runners thus see the same machine, and none always follows the same other one.

    Args:
        runners: the runners by name; the ratios refer to the first. All must have the same `threads`.
        inputs: arrays or tensors by name, as for `Runner.run`.
        rounds: number of timed runs of each runner.
        warmup: number of untimed runs of each runner before the first round.
        on_round: called after every round, for a progress bar.

    Raises:
        ValueError: if there are no runners or no rounds, or the runners have different numbers of threads.
    """
    seconds = time_runners(runners, inputs, rounds=rounds, warmup=warmup, on_round=on_round)
    threads = next(iter(runners.values())).threads
    return LatencyTable(
        tuple(Latency(name=name, **asdict(timing), threads=threads) for name, timing in summarize(seconds).items())
    )


def time_runners(
    runners: Mapping[str, Runner], inputs: Mapping[str, Any], *, rounds: int, **options: Any
) -> dict[str, list[float]]:
    """Returns the seconds of every run, by runner.

    The arguments are those of `measure_latency` and `time_in_turn`; raises as `measure_latency`.
    """
    if not runners or rounds < 1:
        raise ValueError("`measure_latency` needs at least one runner and one round")
    threads = {name: runner.threads for name, runner in runners.items()}
    if len(set(threads.values())) > 1:
        raise ValueError(f"the runners have different numbers of threads, so their times cannot be compared: {threads}")
    actions = {name: functools.partial(runner.run, inputs) for name, runner in runners.items()}
    return time_in_turn(actions, rounds=rounds, **options)
