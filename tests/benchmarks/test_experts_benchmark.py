"""benchmarks/experts.py: one cell measured on a tiny Mixtral, and its table."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it


@pytest.mark.slow
def test_a_cell_and_its_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("experts")
    cell = benchmark.Cell("grouped_mm", 16, hidden=32, intermediate=64, experts=4)
    rows = benchmark.measure(cell, 2)
    by_side = {row["side"]: row for row in rows}
    assert list(by_side) == list(benchmark.SIDES)
    assert all(row.keys() == set(benchmark.FIELDS) for row in rows)
    assert by_side["frozen"]["ratio"] == 1.0
    ours = by_side["ours"]["parameters"]
    equal = by_side["PEFT LoRA, equal parameters"]["parameters"]
    assert ours == equal == by_side["PEFT LoRA, equal rank"]["parameters"] // 8
    assert by_side["frozen"]["parameters"] == 0
    benchmark.write_report(rows, tmp_path / "experts.md")
    assert "| ours | " in (tmp_path / "experts.md").read_text()
    assert "ours" in capsys.readouterr().out
