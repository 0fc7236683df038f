"""Writes the tables in docs/CAPTURES.md: the results of hand-written modules, in place and captured whole.

    PYTHONPATH=tests python -m support.capture_table

runs all cases (those in place in train and in eval mode), prints the tables, and writes them between the markers of
the page. The exit status is 1 if a result is WRONG: not correct, not refused, and not a documented limit.
"""

import sys
import warnings
from pathlib import Path

import torch

from support.hand_written import CASES, Case
from support.hand_written.case import AT_REWRITE, IN_FORWARD, LIMIT, RIGHT, WITH_GRADIENTS
from support.hand_written.checks import Verdict, verdict
from support.pages import lines_between, replace_between
from support.whole_captures import CASES as WHOLE_CASES
from support.whole_captures import check

PAGE = Path(__file__).parents[2] / "docs" / "CAPTURES.md"
IN_PLACE = "table"
WHOLE = "whole captures"
HEADER = ("| area | module | result |", "|---|---|---|")
WRONG = "WRONG"
_RANK = (RIGHT, WITH_GRADIENTS, IN_FORWARD, AT_REWRITE, WRONG)
Row = tuple[str, str, str]
"""Area, module, result."""


def found(case: Case) -> Verdict:
    """Runs the case in train and in eval mode and returns the worse verdict."""
    verdicts = []
    for training in (True, False):
        try:
            verdicts.append(verdict(case, training=training))
        except Exception as error:  # every failure becomes a row of the table
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            verdicts.append(Verdict(WRONG, f"{'train' if training else 'eval'}, {text}"))
    return max(verdicts, key=lambda each: _RANK.index(each.outcome))


def rows() -> list[Row]:
    """Returns the table's rows, area by area; each verdict and its text go to stderr."""
    made = []
    areas = list(dict.fromkeys(case.area for case in CASES.values()))
    for case in sorted(CASES.values(), key=lambda case: areas.index(case.area)):
        what = found(case)
        if case.outcome == WITH_GRADIENTS and what.outcome == IN_FORWARD:
            what = Verdict(WITH_GRADIENTS, what.text)
        if case.outcome == LIMIT and what.outcome == WRONG:
            what = Verdict(LIMIT)
        made.append((case.area, case.what, what.outcome))
        print(f"{case.id:32} {what.outcome:30} {what.text[:200]}", file=sys.stderr, flush=True)
    return made


def whole_rows() -> list[Row]:
    """Returns the rows of the table of whole captures."""
    made = []
    for case in WHOLE_CASES.values():
        try:
            result = check(case)
        except Exception as error:  # every failure becomes a row of the table
            result = WRONG
            print(f"{case.id:32} {type(error).__name__}: {error}"[:300], file=sys.stderr, flush=True)
        made.append((case.area, case.what, result))
    return made


def documented(table: str) -> list[Row]:
    """Returns the rows in the page."""
    lines = lines_between(PAGE, _start(table), _end(table))[len(HEADER) :]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [(area, what, result) for area, what, result in cells]


def _start(table: str) -> str:
    return f"<!-- {table}: PYTHONPATH=tests python -m support.capture_table -->"


def _end(table: str) -> str:
    return f"<!-- end of {table} -->"


def main() -> int:
    tables = {IN_PLACE: rows(), WHOLE: whole_rows()}
    for table, made in tables.items():
        lines = [*HEADER, *(f"| {' | '.join(row)} |" for row in made)]
        print("\n".join(lines))
        if PAGE.exists():
            replace_between(PAGE, _start(table), lines, _end(table))
    return int(any(result == WRONG for made in tables.values() for _, _, result in made))


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    sys.exit(main())
