"""benchmarks/peers.py: its rows and its report; `test_benchmarks` runs all of it."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.deployment.peers_graphs import MERGED, OURS, PLAIN, SETTINGS, Setting
from benchmarks.deployment.peers_report import GOALS, write_report
from benchmarks.peers import rows_of

ORIGIN = {"device": "CPU", "versions": "torch 2", "commit": "abc", "time": "2026-11-28T00:00:00+00:00"}


def times_of(**milliseconds: float) -> dict[str, list[float]]:
    """Returns the times of a process in which every side that is not named takes 10 ms."""
    sides = {PLAIN: 10.0, "optimum O3": 10.0, **dict.fromkeys(OURS, 10.0)}
    named = {"plain": PLAIN, "o3": "optimum O3", "merged": MERGED, "swap": "swap idle all-linear"}
    return {side: [time] * 3 for side, time in (sides | {named[key]: ms for key, ms in milliseconds.items()}).items()}


def rows(setting: Setting, shape: str, *processes: dict[str, list[float]]) -> dict[str, Any]:
    def measured(of: Setting) -> list[dict[str, Any]]:
        assert of is setting
        differences = {side: 1e-6 * index for index, side in enumerate(processes[0])}
        return [{"milliseconds": {shape: times}, "differences": {shape: differences}} for times in processes]

    return {row["side"]: row for row in rows_of(setting, shape, measured, lambda side: f"maker of {side}")}


def test_a_ratio_is_over_the_fastest_peer_of_the_same_process() -> None:
    """The second process is twice as slow, the third is like another machine."""
    found = rows(
        SETTINGS[0],
        "8 × 64",
        times_of(o3=8, merged=6, swap=9),
        times_of(plain=20, o3=16, merged=14, swap=14),
        times_of(plain=1, o3=0.8, merged=0.8, swap=4),
    )
    merged = found[MERGED]
    assert {row["reference"] for row in found.values()} == {"optimum O3"}
    assert (merged["ratio"], merged["ratio_p20"], merged["ratio_p80"]) == (0.875, 0.8, pytest.approx(0.95))
    assert (merged["median_ms"], merged["rounds"], merged["processes"]) == (6, 9, 3)
    assert (merged["over_merged"], merged["over_plain"]) == (1, 0.7)
    assert found["swap idle all-linear"]["over_merged"] == 1.5
    assert found["optimum O3"]["ratio"] == 1
    assert merged["made_by"] == f"maker of {MERGED}"
    assert merged["max_rel_difference"] == pytest.approx(1e-6 * list(found).index(MERGED))


def test_the_report(tmp_path: Path) -> None:
    setting = SETTINGS[0]
    shapes = [shape.name for shape in setting.shapes]
    ours = [dict(times_of(merged=merged), **{"swap idle all-linear": [merged * 1.05]}) for merged in (9, 9, 9, 11)]
    all_rows = [
        {name: str(value) for name, value in (row | ORIGIN).items()}
        for shape, times in zip(shapes, ours, strict=True)
        for row in rows(setting, shape, times).values()
    ]
    write_report(all_rows, tmp_path)
    text = (tmp_path / "peers.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith(f"| {MERGED} "))
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["0.900", "0.900", "0.900", "**1.100**"]
    swap = next(line for line in text.splitlines() if line.startswith("| swap idle all-linear "))
    assert "0.945; **1.050**" in swap, f"the goal is {GOALS['swap idle all-linear']}"
    assert "geometric mean: 0.946 of the fastest peer, 0.946 of optimum-onnx's plain export" in text
    assert (tmp_path / f"peers-{setting.model.lower()}.png").stat().st_size > 10_000
