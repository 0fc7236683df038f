"""docs/SITUATIONS.md, by running the tests that are marked `situation`:

    PYTHONPATH=tests python -m support.situation_table > docs/SITUATIONS.md

A row stands in the table once, with its first test; it holds where all of its tests pass.
"""

import contextlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import pytest

TABLE = Path(__file__).parents[2] / "docs" / "SITUATIONS.md"
Row = tuple[str, str, str, str]
"""Area, situation, result, `file::test`."""


class Collector:
    """A pytest plugin: the rows and files that were collected, slow ones too, and what did not pass."""

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
            self.failures.setdefault(key, f"not run: {report.longrepr[2]}")  # type: ignore[index]  # of a skip
        elif key is not None and report.failed:
            self.failures[key] = "FAILS"


def run() -> Collector:
    """Runs the tests of all rows; what pytest prints goes to stderr."""
    collector = Collector()
    arguments = ["-q", "-n", "0", "-m", "situation", "-p", "no:cacheprovider", str(Path(__file__).parents[1])]
    with contextlib.redirect_stdout(sys.stderr):
        pytest.main(arguments, plugins=[collector])
    return collector


def documented() -> list[Row]:
    """The rows that the file has."""
    rows: list[Any] = []
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 4 and "::test_" in cells[3]:
            rows.append((*cells[:3], cells[3].strip("`")))
    return rows


def main() -> None:
    found = run()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name).split('+')[0]}"
        for name in ("torch", "transformers", "accelerate", "trl", "torchao", "bitsandbytes")
    )
    print(f"""<!-- page: PYTHONPATH=tests python -m support.situation_table > docs/SITUATIONS.md -->

# Situations

What people do with a model, done with a rewritten one. Each row is what its tests assert; made by
`PYTHONPATH=tests python -m support.situation_table > docs/SITUATIONS.md`, which runs them, on a CPU, with
{versions}.

| area | situation | result | test |
|---|---|---|---|""")
    for area, situation, result, test in found.rows.values():
        print(f"| {area} | {situation} | {found.failures.get((area, situation), result)} | `{test}` |")


if __name__ == "__main__":
    main()
