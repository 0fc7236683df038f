"""Which runner is faster."""

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
        """p20 to p80 of the row, or of the reference, is wider than their medians are apart: it shows no difference."""
        first = self.rows[0]
        if row == first and row.ratio == 1:
            return False
        compared = (row, first) if first.ratio == 1 else (row,)  # a row of results may lack its reference
        spread_ms = max(each.p80_ms - each.p20_ms for each in compared)
        return abs(row.median_ms - row.median_ms / row.ratio) < spread_ms

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the table, one row a runner."""
        write_csv([asdict(row) for row in self.rows], [item.name for item in fields(Latency)], path)


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
    seconds = time_runners(runners, inputs, rounds=rounds, warmup=warmup, on_round=on_round)
    threads = next(iter(runners.values())).threads
    return LatencyTable(
        tuple(Latency(name=name, **asdict(timing), threads=threads) for name, timing in summarize(seconds).items())
    )


def time_runners(
    runners: Mapping[str, Runner], inputs: Mapping[str, Any], *, rounds: int, **options: Any
) -> dict[str, list[float]]:
    """The seconds of every run, by runner; arguments as for `measure_latency`, which raises the same, and
    `time_in_turn`.
    """
    if not runners or rounds < 1:
        raise ValueError("`measure_latency` needs at least one runner and one round")
    threads = {name: runner.threads for name, runner in runners.items()}
    if len(set(threads.values())) > 1:
        raise ValueError(f"the runners have different numbers of threads, so their times cannot be compared: {threads}")
    actions = {name: functools.partial(runner.run, inputs) for name, runner in runners.items()}
    return time_in_turn(actions, rounds=rounds, **options)
