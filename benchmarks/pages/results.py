"""The blocks of docs/RESULTS.md: for each benchmark its report or a table of its rows, and its pictures; and for each
command that wrote a report.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.__main__ import BENCHMARKS, Benchmark
from benchmarks.common.cases import COLUMNS
from benchmarks.common.origin import origin
from exporters.measuring.plots import format_ms
from exporters.measuring.tables import markdown_table

from . import commands
from .block import RESULTS, Block, Rows
from .words import paragraph

PAGE = "docs/RESULTS.md"
_FROM_PAGE = "../benchmarks/results"
_PICTURE = re.compile(r"!\[([^]]*)\]\(([^)]*)\)")


def section(benchmark: Benchmark, rows: Rows) -> list[str]:
    """Returns the question, how to measure again, the origin of the rows, all tables, and all pictures."""
    lines = paragraph(
        f"*{benchmark.question}* `python -m benchmarks {benchmark.name}` measures again, in about {benchmark.minutes} "
        f"minutes; the rows are in [{benchmark.name}.csv]({_FROM_PAGE}/{benchmark.name}.csv)."
    )
    report = RESULTS / f"{benchmark.name}.md"
    if report.is_file():
        body = _report(report.read_text())
    else:
        body = table(rows) if "median_ms" in rows[0] else ["*In progress: there is no report yet.*"]
    if not any("Written by `python -m benchmarks" in line for line in body):
        lines += ["", *paragraph(f"From rows of {origin(rows)}.")]
    drawn = {path for line in body for _, path in _PICTURE.findall(line)}
    pictures = [path.name for path in sorted(RESULTS.glob(f"{benchmark.name}*.png"))]
    missing = [name for name in pictures if f"{_FROM_PAGE}/{name}" not in drawn]
    pictures_below = [line for name in missing for line in ("", f"![{benchmark.name}]({_FROM_PAGE}/{name})")]
    return [*lines, "", *body, *pictures_below]


def _report(text: str) -> list[str]:
    """Returns a report for a section of the page: without title, with deeper headings and the paths of the pictures."""
    lines = text.rstrip("\n").splitlines()[1:]
    while lines and not lines[0]:
        lines = lines[1:]
    lines = [f"#{line}" if line.startswith("#") else line for line in lines]
    return [_PICTURE.sub(rf"![\1]({_FROM_PAGE}/\2)", line) for line in lines]


def table(rows: Rows) -> list[str]:
    """Returns a table of the rows that were timed, and one of the rows that only have other values."""
    lines = []
    for row in rows:
        if row["median_ms"]:
            spread = "–".join(format_ms(float(row[name])) for name in ("p20_ms", "p80_ms") if row[name])
            ratio = f"{float(row['ratio']):.3f}" if row["ratio"] else ""
            lines.append(
                [row["case"], row["side"], format_ms(float(row["median_ms"])), spread, ratio, row["reference"]]
            )
    timed = markdown_table(["case", "side", "median, ms", "p20–p80", "ratio", "relative to"], lines, text_columns=2)
    others = [row for row in rows if not row["median_ms"]]
    names = [name for name in rows[0] if name not in COLUMNS and any(row[name] for row in others)]
    if not names:
        return timed
    untimed = [[row["case"], row["side"], *(row[name] for name in names)] for row in others]
    headings = ["case", "side", *(name.replace("_", " ") for name in names)]
    return [*timed, "", *markdown_table(headings, untimed, text_columns=2)]


class _Report(NamedTuple):
    """A command that writes a report: its CSV file, how to run it, and the function that returns the lines."""

    csv: str
    question: str
    command: str
    write: Callable[[Rows], list[str]]


_REPORTS = (
    _Report("demo", "What does the demo show?", "melora-fx demo --out demo-output", commands.demo),
    _Report(
        "train_command",
        "What accuracy does `melora-fx train` reach on SNIPS?",
        "melora-fx train MODEL TEXTS -o trained",
        commands.train,
    ),
    _Report(
        "instruction_tuning",
        "Does the recipe of the paper's second experiment run, at toy size?",
        "python examples/instruction_tuning.py",
        commands.tuning,
    ),
)


def _reported(report: _Report, rows: Rows) -> list[str]:
    """Returns the section of a command that writes a report."""
    lines = paragraph(
        f"*{report.question}* `{report.command}` writes a report.json, and `python -m benchmarks.report_rows "
        f"{report.csv} report.json` converts it into the rows in [{report.csv}.csv]({_FROM_PAGE}/{report.csv}.csv)."
    )
    return [*lines, "", *paragraph(f"From rows of {origin(rows)}."), "", *report.write(rows)]


RESULT_BLOCKS = (
    *(Block(PAGE, benchmark.name, benchmark.name, functools.partial(section, benchmark)) for benchmark in BENCHMARKS),
    *(Block(PAGE, report.csv, report.csv, functools.partial(_reported, report)) for report in _REPORTS),
)
