"""benchmarks/decoding.py: its rows, its report, and stopped runs; `test_benchmarks` runs all of it."""

import itertools
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import decoding
from benchmarks.common import kept
from benchmarks.common.checkout import DONE, FAILED
from benchmarks.common.ratios import ratios_of
from benchmarks.deployment import decoding_graphs
from benchmarks.deployment.decoding_cells import GOALS, REFERENCE, SETTINGS, SIDES, STEPS, Step, settings_and_steps
from benchmarks.deployment.decoding_process import _given_and_expected, _refuse_wrong
from benchmarks.deployment.decoding_report import write_report
from exporters.measuring.tables import read_csv
from exporters.onnx_files.cache_names import MASK, POSITIONS, TOKENS
from melora_fx import MELoRAError


def options_of(folder: Path, **others: Any) -> Namespace:
    return Namespace(
        benchmark="decoding",
        out=folder / "out",
        cache=folder / "cache",
        quick=True,
        only="",
        again=False,
        report_only=False,
        processes=3,
        seconds=1.0,
        olive="no-such-python",
        **others,
    )


def printed(job: dict[str, Any]) -> dict[str, Any]:
    """Returns what a process might print: process k is k + 1 times as slow, with the same ratios in each."""
    sides = [side for side in SIDES if side.name in job["sides"]]
    times = {side.name: [10.0 * (job["index"] + 1) * (1 + place / 100)] * 3 for place, side in enumerate(sides)}
    differences = {side.name: 1e-6 for side in sides}
    names = [Step(*each).name for each in job["steps"]]
    return {"milliseconds": dict.fromkeys(names, times), "differences": dict.fromkeys(names, differences)}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the indices of the processes that ran; nothing is exported, and no process is started."""
    indices: list[int] = []

    def run_apart(module: str, job: str, **_: Any) -> Any:
        found = json.loads(job)
        indices.append(found["index"])
        return printed(found)

    monkeypatch.setattr(kept, "run_apart", run_apart)
    monkeypatch.setattr(decoding.Workshop, "prepare", lambda self, setting, steps: {})
    return indices


def test_what_is_measured() -> None:
    assert {(setting.targets, setting.total_rank) for setting in SETTINGS} == set(
        itertools.product(("q,v", "all-linear"), (8, 64))
    )
    assert all(setting.rank * setting.num_blocks == setting.total_rank for setting in SETTINGS)
    assert [(step.past, step.new) for step in STEPS] == [(64, 1), (512, 1), (0, 64), (0, 512)]
    for quick in (False, True):
        settings, steps = settings_and_steps(quick)
        assert sum(step.share for step in steps) == pytest.approx(1)
        assert len({setting.file_name for setting in settings}) == len(settings)
    assert GOALS.keys() <= {side.name for side in SIDES}


def test_a_ratio_is_the_median_of_the_processes_ratios() -> None:
    """A process that is slow for all sides, and one in which one side is slow, change nothing."""
    times = [
        {REFERENCE: [10, 10, 30], "merged": [11, 11, 90]},
        {REFERENCE: [20, 20, 20], "merged": [22, 22, 22]},
        {REFERENCE: [10, 10, 10], "merged": [15, 15, 15]},
    ]
    row = ratios_of("merged", REFERENCE, times)
    assert row["ratio"] == 1.1
    assert (row["ratio_p20"], row["ratio_p80"]) == (1.1, pytest.approx(1.34))
    assert (row["median_ms"], row["rounds"]) == (15, 9)
    assert ratios_of(REFERENCE, REFERENCE, times)["ratio"] == 1


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_run_that_was_stopped_goes_on(tmp_path: Path, ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(tmp_path)
    whole = kept.run_apart

    def stopped(module: str, job: str, **more: Any) -> Any:
        if json.loads(job)["index"] == 1:
            raise MELoRAError("stopped")
        return whole(module, job, **more)

    monkeypatch.setattr(kept, "run_apart", stopped)
    assert decoding.run(options) == FAILED
    assert set(ran) == {0}
    monkeypatch.setattr(kept, "run_apart", whole)
    ran.clear()
    assert decoding.run(options) == DONE
    assert ran == [1, 2], "the first is on disk; both cases of the setting come from the same processes"
    ran.clear()
    assert decoding.run(options) == DONE
    assert ran == []
    options.again = True
    assert decoding.run(options) == DONE
    assert ran == [0, 1, 2]
    rows = read_csv(options.out / "decoding.csv")
    assert {row["processes"] for row in rows} == {"3"}
    assert not any("Olive" in row["side"] for row in rows), "no Python of this name"
    assert all("no Olive" in row["settings"] for row in rows)
    assert "Olive's sides were left out" in (options.out / "decoding.md").read_text()


def row_of(side: str, ratio: float, past: int = 64, **others: str) -> dict[str, str]:
    values: dict[str, Any] = {
        "case": f"q,v, total rank 8, a token after {past}",
        "side": side,
        "model": "SmolLM2-135M",
        "targets": "q,v",
        "total_rank": 8,
        "num_blocks": 8,
        "past": past,
        "new": 1 if past else 64,
        "processes": 5,
        "median_ms": 30 * ratio,
        "reference": REFERENCE,
        "ratio": ratio,
        "ratio_p20": ratio - 0.01,
        "ratio_p80": ratio + 0.02,
        "goal": GOALS.get(side, {}).get("q,v", ""),
        "rounds": 60,
        "made_by": "exporters",
        "device": "CPU",
        "versions": "torch 2",
        "commit": "abc-dirty",
        "time": "2026-11-25T00:00:00+00:00",
    }
    return {name: str(value) for name, value in (values | others).items()}


def test_the_report(tmp_path: Path) -> None:
    ratios = (1, 1.004, 1.06, 1.02, 1.05, 1.04, 1.07, 1.08, 1.9)
    rows = [row_of(side.name, ratio) for side, ratio in zip(SIDES, ratios, strict=True)]
    write_report([*rows, *(row_of(side.name, 1, past=0) for side in SIDES)], tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["decoding.md", "decoding.png"]
    text = (tmp_path / "decoding.md").read_text()
    assert "| q,v, 8 | a token after 64 | 30.0 | 1.00 (0.99–1.02) | **1.06** (1.05–1.08) | 1.02 (1.01–1.04) |" in text
    assert "| 1.90 (1.89–1.92) | **1.9 ×** |" in text
    assert "| goal: q,v |  |  | ≤ 1.00 | ≤ 1.04 | ≤ 1.02 |  |" in text
    assert "; commit abc-dirty; compared with graphs of " in text
    assert "left out" not in text


def test_a_side_that_computes_something_else_is_refused() -> None:
    step = Step(64, 1)
    logits = np.arange(6, dtype=np.float32).reshape(1, 1, 6)
    reference = {"base/a token after 64": logits, "adapted/a token after 64": logits + 1}
    _refuse_wrong(step, {"merged": 1e-5}, reference)
    with pytest.raises(MELoRAError, match=r"a token after 64: logits differ from torch's.*'merged': 0.1"):
        _refuse_wrong(step, {"merged": 0.1, "unmerged": 1e-6}, reference)
    with pytest.raises(MELoRAError, match="'merged': nan"):
        _refuse_wrong(step, {"merged": float("nan")}, reference)
    with pytest.raises(MELoRAError, match="changes nothing"):
        _refuse_wrong(step, {"merged": 0.0}, dict.fromkeys(reference, logits))


def test_a_step_is_given_the_cache_of_its_own_model() -> None:
    past = np.arange(2 * 9 * 3, dtype=np.float32).reshape(1, 2, 9, 3)
    logits = np.zeros((1, 1, 50), np.float32)
    reference = {"base/past_key_values.0.key": past, "adapted/past_key_values.0.key": past + 1}
    reference |= {"base/a token after 8": logits, "adapted/a token after 8": logits + 1}
    arrays, expected = _given_and_expected(reference, SIDES[1], Step(8, 1))
    assert (expected == 1).all()
    assert {name: value.shape for name, value in arrays.items()} == {
        TOKENS: (1, 1),
        MASK: (1, 9),
        POSITIONS: (1, 1),
        "past_key_values.0.key": (1, 2, 8, 3),
    }
    np.testing.assert_array_equal(arrays["past_key_values.0.key"], past[:, :, :8] + 1)
    assert arrays[POSITIONS] == 8
    assert arrays[TOKENS] == decoding_graphs.text(20, 50)[:, 8:9]


def test_what_is_made_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "half").touch()
        raise MELoRAError("stopped")

    with pytest.raises(MELoRAError, match="stopped"):
        kept.once(tmp_path / "made", make)
    assert list(tmp_path.iterdir()) == []
    made = kept.once(tmp_path / "made", lambda folder: (folder / "whole").touch())
    assert kept.once(made, make) == made
    assert [file.name for file in made.iterdir()] == ["whole"]


def test_what_another_program_says_is_told(tmp_path: Path) -> None:
    with pytest.raises(MELoRAError, match=r"(?s)`.*-c import nothing_of_this_name` failed: .*ModuleNotFoundError"):
        kept.run_offline([decoding_graphs.sys.executable, "-c", "import nothing_of_this_name"], tmp_path)
    assert decoding_graphs._version_in(decoding_graphs.sys.executable, "numpy") == np.__version__
    assert decoding_graphs._version_in(decoding_graphs.sys.executable, "nothing-of-this-name") == ""
