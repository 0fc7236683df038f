"""The timer: turns, untimed parts, and summaries."""

import gc
import time

import pytest

from exporters.measuring.timing import summarize, time_in_turn


def test_all_take_turns_and_preparation_is_not_timed() -> None:
    log: list[str] = []

    def prepare(name: str) -> tuple[str]:
        time.sleep(0.02)
        return (name,)

    seconds = time_in_turn({"a": log.append, "b": log.append}, rounds=6, warmup=2, prepare=prepare)
    assert log[:4] == ["a", "a", "b", "b"], "warm-up"
    pairs = set(zip(log[4::2], log[5::2], strict=True))
    assert pairs == {("a", "b"), ("b", "a")}
    assert {name: len(times) for name, times in seconds.items()} == {"a": 6, "b": 6}
    assert max(map(max, seconds.values())) < 0.02


def test_no_garbage_is_collected_while_timed() -> None:
    seen: list[bool] = []
    time_in_turn({"a": lambda: seen.append(gc.isenabled())}, rounds=1)
    assert seen == [False, False]
    assert gc.isenabled()


def test_the_reference_is_named() -> None:
    seconds = {"a": [0.002, 0.004, 0.003], "b": [0.006]}
    timings = summarize(seconds)
    assert timings["a"].columns() == {"median_ms": 3.0, "p20_ms": 2.4, "p80_ms": 3.6, "ratio": 1.0, "rounds": 3}
    assert (timings["b"].p20_ms, timings["b"].ratio) == (pytest.approx(6), pytest.approx(2)), "for one round too"
    assert summarize(seconds, "b")["a"].ratio == pytest.approx(0.5)
