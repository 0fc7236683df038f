"""Does CUDA compute what the CPU computes? Each test that needs a CUDA device is one case."""

import time
from typing import Any

import pytest

from benchmarks.common.checkout import ROOT

from .cells import LOST, is_lost
from .recorder import Recorder
from .rows import FAILED, PASSED, SKIPPED

TESTS = ("tests/cuda", "tests/lowering/test_triton_kernels.py", "tests/lowering/test_triton_lowering.py")
OPTIONS = (
    "--noconftest",  # the conftest needs packages that a machine may lack
    *("-o", "addopts=", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "-p", "no:terminal"),
    *("--rootdir", str(ROOT), "--continue-on-collection-errors"),
)

SECONDS = 10
"""Duration of the longest tests on an H100, those that compile."""


def run(record: Recorder) -> None:
    plugin = _Cases(record)
    status = pytest.main([*OPTIONS, *(str(ROOT / path) for path in TESTS)], [plugin])
    if plugin.is_lost:
        raise SystemExit(LOST)
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(int(status))


class _Cases:
    """A pytest plugin that turns tests into cases."""

    def __init__(self, record: Recorder) -> None:
        self.record = record
        self.session: pytest.Session
        self.start = 0.0
        self.reports: list[pytest.TestReport] = []
        self.is_lost = False

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.record.ends(report.nodeid, FAILED, reason=_reason(report))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[name] for name in self.record.in_order(by_name)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if not self.record.begins(item.nodeid, 0 if self.record.dry else SECONDS):
            return True  # handled: pytest does not run the test
        self.session = item.session
        self.start = time.perf_counter()
        self.reports = []
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        bad = next((report for report in self.reports if not report.passed), None)
        outcome = PASSED if bad is None else SKIPPED if bad.skipped else FAILED
        reason = {} if bad is None else {"reason": _reason(bad)}
        self.record.ends(nodeid, outcome, **reason, seconds=round(time.perf_counter() - self.start, 1))
        if is_lost():
            self.is_lost = True
            self.session.shouldstop = "the device is lost to this process"


def _reason(report: Any) -> str:
    """Returns what went wrong, or why the test was skipped, in one line; prints the full error for the log."""
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")
    print(report.longreprtext)
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join((crash.message if crash else report.longreprtext[-400:]).split())[:600]
