"""Shared by all benchmarks: which cases are measured, their CSV file, and what a stopped run leaves."""

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.common import cases
from benchmarks.common import cases as module
from benchmarks.common.cases import (
    COLUMNS,
    DONE,
    FAILED,
    LEFT_OUT,
    MISUSED,
    Case,
    Row,
    run_apart,
    run_cases,
    timed_rows,
)
from benchmarks.common.origin import origin, written_by
from exporters.measuring.tables import read_csv
from melora_fx import MELoRAError


def options(out: Path, **changes: object) -> Namespace:
    defaults = {"quick": False, "only": "", "again": False, "report_only": False}
    return Namespace(benchmark="example", out=out, **defaults | changes)


class Measured:
    """Cases named a, b, c that record that they are measured; one of them raises `fault`."""

    def __init__(self, fault: tuple[str, BaseException] | None = None, **missing: str) -> None:
        self.log: list[str] = []
        self.fault = fault
        self.cases = [Case(name, lambda name=name: self.measure(name), missing.get(name, "")) for name in "abc"]

    def measure(self, name: str) -> list[Row]:
        if self.fault and self.fault[0] == name:
            raise self.fault[1]
        self.log.append(name)
        return timed_rows({"ours": [0.002, 0.002], "base": [0.001]}, "base", {"ours": {"own": name}})


def test_rows_have_the_common_columns_and_their_own(tmp_path: Path) -> None:
    assert run_cases(options(tmp_path), Measured().cases, settings="rounds 2") == DONE
    rows = read_csv(tmp_path / "example.csv")
    assert list(rows[0]) == [*COLUMNS, "own"]
    assert [(row["case"], row["side"]) for row in rows] == [(case, side) for case in "abc" for side in ("ours", "base")]
    first = rows[0]
    assert [first[name] for name in ("benchmark", "median_ms", "ratio", "reference", "rounds", "settings", "own")] == [
        *("example", "2.0", "2.0", "base", "2", "rounds 2", "a")
    ]
    assert all(first[name] for name in ("device", "versions", "source", "time"))
    assert "peft" in first["versions"]


def test_a_text_that_is_in_no_name_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cases(options(tmp_path, only="zzz"), Measured().cases, settings="") == MISUSED
    assert "`--only zzz` matches no case: a, b, c" in capsys.readouterr().out


def test_a_run_that_was_killed_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed = Measured(("b", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run_cases(options(tmp_path), killed.cases, settings="")
    assert killed.log == ["a"]
    assert {row["case"] for row in read_csv(tmp_path / "example.csv")} == {"a"}
    second = Measured()
    assert run_cases(options(tmp_path), second.cases, settings="") == DONE
    assert second.log == ["b", "c"]
    assert "skipped: its rows of" in capsys.readouterr().out
    again = Measured()
    run_cases(options(tmp_path, again=True, only="b"), again.cases, settings="")
    assert again.log == ["b"]
    assert [row["case"] for row in read_csv(tmp_path / "example.csv")] == [*"aabbcc"], "in the order of the cases"


@pytest.mark.parametrize("column", ["settings", "versions", "device", "source"])
def test_rows_of_another_origin_are_measured_again(
    column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_cases(options(tmp_path), Measured().cases, settings="rounds 1")
    origin = module.origin_columns("cpu", "peft")
    monkeypatch.setattr(
        module, "origin_columns", lambda *_: {**origin, column: "other"} if column in origin else origin
    )
    if column == "source":
        monkeypatch.setattr(module, "source_digest", lambda: "other")
    second = Measured()
    settings = "other" if column == "settings" else "rounds 1"
    run_cases(options(tmp_path, only="b"), second.cases, settings=settings)
    assert second.log == ["b"]
    assert f"differ in {column}\n" in capsys.readouterr().out
    found = {row["case"]: row[column] == "other" for row in read_csv(tmp_path / "example.csv")}
    assert found == {"a": False, "b": True, "c": False}, "each row has its own"


def test_what_fails_or_is_missing_does_not_cost_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = Measured(("a", MELoRAError("no such graph")), b="its weights are missing: pip install weights")
    reports: list[int] = []
    status = run_cases(
        options(tmp_path), measured.cases, settings="", write_report=lambda rows, out: reports.append(len(rows))
    )
    assert status == FAILED
    assert measured.log == ["c"]
    assert reports == [2]
    told = capsys.readouterr().out
    assert "failed: no such graph" in told
    assert "left out: its weights are missing: pip install weights" in told
    assert "example: 1 measured, 1 failed, 1 left out" in told
    assert run_cases(options(tmp_path), Measured(b="missing").cases, settings="") == LEFT_OUT


def test_a_process_of_its_own_that_fails_or_hangs_is_told() -> None:
    with pytest.raises(MELoRAError, match=r"No module named benchmarks\.nothing"):
        run_apart("nothing")
    with pytest.raises(MELoRAError, match=r"stopped after 0\.01 s"):
        run_apart("train_step", timeout_s=0.01)


def test_a_process_that_failed_is_told_by_its_exception_not_by_the_advice_below_it() -> None:
    advised = "Traceback (most recent call last):\n  File\ntorch.exc.InductorError: no compiler\nSet TORCH_LOGS=+all\n"
    assert cases._error_of(advised) == "torch.exc.InductorError: no compiler"
    assert cases._error_of("Killed\n") == "Killed"
    assert cases._error_of("") == ""


def test_the_origin_names_every_day_machine_and_commit() -> None:
    first = {"device": "A, 2 cores", "versions": "torch 2", "commit": "c", "time": "2026-11-28T01:00:00+00:00"}
    second = first | {"device": "B", "versions": "torch 3", "commit": "d-dirty", "time": "2026-11-27T01:00:00+00:00"}
    told = written_by("peers", [first, first, second])
    assert told == (
        "Written by `python -m benchmarks peers` from rows of 2026-11-27 to 2026-11-28: A, 2 cores; torch 2, and B; "
        "torch 3; commits c, d-dirty"
    )
    unknown = dict.fromkeys(first, "")
    assert origin([unknown]) == "an unknown day: an unknown machine; commit unknown"
