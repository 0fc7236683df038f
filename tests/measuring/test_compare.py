"""Errors between runners, and times of runners in turn."""

import csv
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters import Latency, LatencyTable, compare, measure_latency
from exporters.measuring.compare import compare_steps_of
from exporters.measuring.latency import time_runners
from melora_fx import MELoRAError


class Constant:
    """A runner that returns fixed outputs after `seconds`."""

    def __init__(self, seconds: float = 0.0, threads: int | None = 1, log: list[str] | None = None, **outputs: Any):
        self.outputs = {name: np.array(value, dtype=np.float32) for name, value in outputs.items()}
        self.seconds = seconds
        self.threads = threads
        self.log = log

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        if self.log is not None:
            self.log.append(next(iter(self.outputs)))
        time.sleep(self.seconds)
        return self.outputs


def test_absolute_and_relative_errors_by_output() -> None:
    result = compare(Constant(a=[1.0, -4.5], b=[0.0]), Constant(a=[1.0, -4.0], b=[0.25]), {})
    assert result.max_abs_errors == {"a": 0.5, "b": 0.25}
    assert result.max_rel_errors == {"a": 0.125, "b": 1.0}
    assert (result.max_abs_error, result.max_rel_error) == (0.5, 1.0)
    assert "a: max abs error 5.0e-01, relative 1.2e-01" in str(result)


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([np.nan, 1], [np.nan, 1], 0.0),
        ([np.inf], [np.inf], 0.0),
        ([np.nan], [1.0], np.inf),
        ([1.0], [np.nan], np.inf),
        ([-np.inf], [np.inf], np.inf),
        ([], [], 0.0),
    ],
    ids=["same_nan", "same_inf", "nan", "expected_nan", "signs", "empty"],
)
def test_values_that_are_not_finite(actual: list[float], expected: list[float], error: float) -> None:
    assert compare(Constant(a=actual), Constant(a=expected), {}).max_abs_error == error


def test_other_names_or_shapes_are_refused() -> None:
    with pytest.raises(MELoRAError, match="different names"):
        compare(Constant(a=[1]), Constant(b=[1]), {})
    with pytest.raises(MELoRAError, match=r"output `a` has the shapes \(2,\) and \(1,\)"):
        compare(Constant(a=[1, 2]), Constant(a=[1]), {})


def test_runners_take_turns_and_the_first_is_the_reference(tmp_path: Path) -> None:
    log: list[str] = []
    rounds_seen: list[None] = []
    runners = {"fast": Constant(0.001, log=log, f=[0]), "slow": Constant(0.01, log=log, s=[0])}
    table = measure_latency(runners, {}, rounds=5, warmup=2, on_round=lambda: rounds_seen.append(None))
    pairs = list(zip(log[4::2], log[5::2], strict=True))
    assert set(pairs) == {("f", "s"), ("s", "f")}, "interleaved, the order drawn"
    assert len(log) == 2 * 7
    assert len(rounds_seen) == 5
    assert table["fast"].ratio == 1.0
    assert table["slow"].ratio > 3
    assert table["slow"].p20_ms <= table["slow"].median_ms <= table["slow"].p80_ms
    assert table["slow"].median_ms >= 10
    assert "slow" in str(table)
    table.to_csv(tmp_path / "latency.csv")
    rows = list(csv.DictReader((tmp_path / "latency.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == ["fast", "slow"]
    assert float(rows[1]["median_ms"]) == pytest.approx(table["slow"].median_ms)


def test_no_round_begins_after_the_time_limit() -> None:
    runners = {"a": Constant(0.001, a=[0])}
    assert len(time_runners(runners, {}, rounds=50, warmup=0, max_seconds=0)["a"]) == 1
    assert len(time_runners(runners, {}, rounds=2, warmup=0, max_seconds=60)["a"]) == 2


def test_threads_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="different numbers of threads"):
        measure_latency({"a": Constant(threads=1, a=[0]), "b": Constant(threads=2, b=[0])}, {})
    with pytest.raises(ValueError, match="at least one runner"):
        measure_latency({}, {})


def test_a_difference_within_the_noise_is_said() -> None:
    def row(name: str, median_ms: float, spread_ms: float) -> Latency:
        return Latency(name, median_ms, median_ms - spread_ms / 2, median_ms + spread_ms / 2, median_ms / 10, 9, 1)

    table = LatencyTable((row("base", 10, 0.5), row("close", 10.4, 0.1), row("noisy", 12, 2.1), row("slow", 12, 1.9)))
    assert [table.is_within_noise(each) for each in table.rows] == [False, True, True, False]
    assert [line.endswith("within noise") for line in str(table).splitlines()[1:5]] == [False, True, True, False]
    assert (
        str(table).splitlines()[5]
        == "within noise: p20 to p80 is wider than the difference from the reference's median"
    )
    assert "noise" not in str(LatencyTable((table["base"], table["slow"])))
    assert table.is_within_noise(LatencyTable((table["noisy"],)).rows[0]), "a table may lack its reference"


def test_later_steps_are_compared_with_the_largest_value_so_far() -> None:
    steps = [{"y": np.array([10.0])}, {"y": np.array([1.0])}]
    others = [{"y": np.array([10.0])}, {"y": np.array([1.1])}]
    assert compare_steps_of(others, steps).max_rel_error == pytest.approx(0.01)
