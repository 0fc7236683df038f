"""Common parts of the benchmarks: their columns, which cases are done, their CSV file, and separate processes."""

import json
import os
import re
import subprocess
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from exporters.measuring.machine import origin_columns
from exporters.measuring.measure import Measurement
from exporters.measuring.plots import format_ms
from exporters.measuring.tables import read_csv, write_csv
from exporters.measuring.timing import summarize
from melora_fx import MELoRAError

from .checkout import DONE, FAILED, LEFT_OUT, MISUSED, ROOT, source_digest

COLUMNS = (
    *("benchmark", "case", "side", "median_ms", "p20_ms", "p80_ms", "ratio", "reference", "rounds"),
    *("settings", "device", "versions", "source", "commit", "time"),
)
"""The first columns of every CSV file, followed by those of the benchmark. `ratio`: the median over that of the side
`reference`. `source`: a digest of the code, which also distinguishes uncommitted changes.
"""
ORIGIN = ("settings", "device", "versions", "source")
"""A case is done if a row measured now would have the same values as its rows in these columns."""

Row = dict[str, Any]
Report = Callable[[Sequence[Mapping[str, str]], Path], None]
console = Console()


class Case(NamedTuple):
    """Sides that are measured together, in turn.

    Attributes:
        name: the value of the column `case`.
        measure: returns the rows, at least one per side.
        missing: why the case cannot be measured here; empty if it can.
        provider: what computes, as `device_name` accepts it.
    """

    name: str
    measure: Callable[[], list[Row]]
    missing: str = ""
    provider: str = "cpu"


def run_cases(options: Namespace, cases: Sequence[Case], *, settings: str, write_report: Report | None = None) -> int:
    """Measures the cases one after another; writes the rows of each to disk before the next begins.

    A case that has rows of the same origin is skipped, so a stopped run continues when it is started again. Other rows
    stay until their case is measured again.

    Args:
        options: those of the command line.
        cases: in the order of their rows.
        settings: the options that the numbers depend on.
        write_report: called at the end with all rows and the folder.

    Returns:
        An exit status.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.benchmark}.csv"
    chosen = [case for case in cases if options.only in case.name and not options.report_only]
    if options.only and not chosen:
        _say(f"`--only {options.only}` matches no case: {', '.join(case.name for case in cases)}")
        return MISUSED
    settings += ", quick" if options.quick else ""
    counts = dict.fromkeys(("measured", "skipped", "failed", "left out"), 0)
    start = time.perf_counter()
    for index, case in enumerate(chosen, start=1):
        _say(f"[{index}/{len(chosen)}, {time.perf_counter() - start:.0f} s] {case.name}")
        rows = read_csv(path)
        origin = {"settings": settings, "source": source_digest(), **origin_columns(case.provider, "peft")}
        outcome = _outcome(case, [] if options.again else rows, origin)
        if outcome == "measured":
            try:
                same = {"benchmark": options.benchmark, "case": case.name} | origin
                found = [dict.fromkeys(COLUMNS, "") | row | same for row in case.measure()]
                _write([row for row in rows if row["case"] != case.name] + found, cases, path)
                print_rows(found)
            except Exception as error:  # must not stop the other cases
                outcome = "failed"
                _say(f"    failed: {error if isinstance(error, MELoRAError) else traceback.format_exc()}")
        counts[outcome] += 1
    if write_report and (rows := read_csv(path)):
        write_report(rows, options.out)
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    _say(f"{options.benchmark}: {told or 'nothing measured'}; see {options.out}")
    return FAILED if counts["failed"] else LEFT_OUT if counts["left out"] else DONE


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _outcome(case: Case, rows: Sequence[Mapping[str, str]], origin: Mapping[str, str]) -> str:
    """Returns whether the case is "skipped", "left out" or "measured", and prints why."""
    earlier = next((row for row in rows if row["case"] == case.name), None)
    other = [name for name in ORIGIN if earlier and earlier[name] != origin[name]]
    if earlier and not other:
        _say(f"    skipped: its rows of {earlier['time']} have the same origin; pass --again to measure it again")
        return "skipped"
    if case.missing:
        _say(f"    left out: {case.missing}")
        return "left out"
    if earlier:
        _say(f"    again: the rows of {earlier['time'] or 'before'} differ in {', '.join(other)}")
    return "measured"


def _write(rows: Sequence[Row], cases: Sequence[Case], path: Path) -> None:
    """Writes the rows in the order of the cases; rows of cases that no longer exist come last."""
    order = {case.name: index for index, case in enumerate(cases)}
    own = dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)
    write_csv(sorted(rows, key=lambda row: order.get(row["case"], len(order))), [*COLUMNS, *own], path)


def timed_rows(seconds: Mapping[str, Sequence[float]], reference: str, facts: Mapping[str, Row]) -> list[Row]:
    """Returns one row per side: its times, then its `facts`."""
    return [
        {"side": side, **timing.columns(), "reference": reference, **facts.get(side, {})}
        for side, timing in summarize(seconds, reference).items()
    ]


def measured_rows(measured: Sequence[Measurement], facts: Row) -> list[Row]:
    """Returns one row per contender, with the columns of a `Measurement` and those of `facts`."""
    rows = [facts | asdict(each) | {"reference": measured[0].form} for each in measured]
    return [{"side": row.pop("form"), **row} for row in rows]


def print_rows(rows: Sequence[Row]) -> None:
    """Prints a table of the rows that were timed."""
    table = Table("side", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("median ms", "p20–p80", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row["median_ms"] != "":
            spread = f"{format_ms(row['p20_ms'])}–{format_ms(row['p80_ms'])}"
            table.add_row(row["side"], format_ms(row["median_ms"]), spread, f"{row['ratio']:.3f}")
    if table.row_count:
        console.print(table)


def run_apart(
    module: str, *arguments: object, timeout_s: float | None = None, environment: Mapping[str, str] | None = None
) -> Any:
    """Runs a module of the benchmarks in its own process, and returns the JSON in the last line that it prints.

    Raises:
        MELoRAError: if the process fails, or takes longer than `timeout_s`.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    environment = os.environ | (environment or {})
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, cwd=ROOT)
    except subprocess.TimeoutExpired as error:
        raise MELoRAError(f"stopped after {timeout_s} s") from error
    if result.returncode:
        raise MELoRAError(_error_of(result.stderr) or f"exit code {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def _error_of(stderr: str) -> str:
    """Returns the last line that names an exception, else the last line: torch.compile prints advice below errors."""
    lines = stderr.strip().splitlines()
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt|Unsupported)\b", line)]
    return (named or lines or [""])[-1]
