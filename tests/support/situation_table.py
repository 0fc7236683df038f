"""Runs the tests marked `situation` and prints docs/SITUATIONS.md:

    PYTHONPATH=tests python -m support.situation_table > docs/SITUATIONS.md

Each row is in the table once and names its first test. Its result applies if all of its tests pass.
"""

import contextlib
import importlib.metadata
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

TABLE = Path(__file__).parents[2] / "docs" / "SITUATIONS.md"
Row = tuple[str, str, str, str]
"""Area, situation, result, `file::test`."""


class Collector:
    """A pytest plugin that stores the collected rows and files, including slow ones, and the rows that failed."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Row] = {}
        self.of_test: dict[str, tuple[str, str]] = {}
        self.failures: dict[tuple[str, str], str] = {}
        self.files: set[Path] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.files = {item.path for item in items}
        for item in items:
            marker = item.get_closest_marker("situation")
            if marker is not None:
                area, situation, result = marker.args
                test = item.nodeid.partition("[")[0].removeprefix("tests/")
                self.rows.setdefault((area, situation), (area, situation, result, test))
                self.of_test[item.nodeid] = (area, situation)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        key = self.of_test.get(report.nodeid)
        if key is not None and report.skipped:
            self.failures.setdefault(key, f"not run: {report.longrepr[2]}")  # type: ignore[index]  # of skips
        elif key is not None and report.failed:
            self.failures[key] = "FAILS"


def run() -> Collector:
    """Runs the tests of all rows; pytest's output goes to stderr."""
    collector = Collector()
    arguments = ["-q", "-n", "0", "-m", "situation", "-p", "no:cacheprovider", str(Path(__file__).parents[1])]
    with contextlib.redirect_stdout(sys.stderr):
        pytest.main(arguments, plugins=[collector])
    return collector


def by_area(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Returns the rows of each area, in the order of their first rows."""
    areas: dict[str, list[Row]] = {}
    for row in rows:
        areas.setdefault(row[0], []).append(row)
    return areas


def documented() -> dict[str, list[Row]]:
    """Returns the rows in the file, by area."""
    areas: dict[str, list[Row]] = {}
    for line in TABLE.read_text().splitlines():
        if line.startswith("## "):
            area = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and "::test_" in cells[2]:
            areas.setdefault(area, []).append((area, *cells[:2], cells[2].strip("`")))
    return areas


def main() -> None:
    found = run()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name).split('+')[0]}"
        for name in ("torch", "transformers", "accelerate", "trl", "torchao", "bitsandbytes")
    )
    print(f"""<!-- page: PYTHONPATH=tests python -m support.situation_table > docs/SITUATIONS.md -->

# Situations

What people do with a model, tried on a rewritten one. Each row states what its tests assert. This page is the output of
`PYTHONPATH=tests python -m support.situation_table > docs/SITUATIONS.md`, which runs these tests on a CPU with
{versions}.""")
    for area, rows in by_area(found.rows.values()).items():
        print(f"\n## {area}\n\n| situation | result | test |\n|---|---|---|")
        for _, situation, result, test in rows:
            print(f"| {situation} | {found.failures.get((area, situation), result)} | `{test}` |")


if __name__ == "__main__":
    main()
