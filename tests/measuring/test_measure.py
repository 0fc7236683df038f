"""Contenders: compared first, then timed; one row each."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.exports import Exports
from support.models import randn, rewritten_tower

import melora_fx
from exporters import OrtRunner, TorchRunner
from exporters.adapters.ort_adapter import swap_tensors
from exporters.measuring.measure import Contender, Measurement, measure
from exporters.measuring.tables import write_csv
from exporters.onnx_files.metadata import read_facts
from melora_fx import MELoRAError
from melora_fx.saving.adapter_file import read_adapter


@pytest.fixture(scope="module")
def contenders(tmp_path_factory: pytest.TempPathFactory, exports: Exports) -> list[Contender]:
    """The unmerged graph, a swappable one with the same adapter, the same without, and torch."""
    folder = tmp_path_factory.mktemp("measure")
    model = rewritten_tower()
    keep, swap = (Path(exports("adapted tower", adapter=adapter).path) for adapter in ("keep", "swap"))
    melora_fx.save_adapter(model, folder / "adapter")
    tensors = swap_tensors(read_adapter(folder / "adapter"), read_facts(swap))
    return [
        Contender("unmerged", OrtRunner(keep, threads=1), keep),
        Contender("swap", OrtRunner(swap, threads=1).with_tensors(tensors), swap, tensors),
        Contender("swap, no adapter", OrtRunner(swap, threads=1), swap),
        Contender("torch", TorchRunner(model.eval(), threads=1)),
    ]


def rows_of(contenders: list[Contender], **options: Any) -> list[Measurement]:
    inputs: Mapping[str, np.ndarray] = {"x": randn(3, 24).numpy()}
    options = {"loads": 1, "rounds": 3} | options
    return measure(
        lambda index: contenders,
        inputs,
        provider="cpu",
        model="Tower",
        batch=3,
        sequence=None,
        **options,
    )


def test_a_row_a_contender(contenders: list[Contender]) -> None:
    rows = rows_of(contenders)
    assert [row.form for row in rows] == ["unmerged", "swap", "swap, no adapter", "torch"]
    assert {(row.provider, row.model, row.batch, row.sequence, row.threads, row.rounds) for row in rows} == {
        ("cpu", "Tower", 3, None, 1, 3)
    }
    assert rows[0].ratio == 1
    assert all(row.p20_ms <= row.median_ms <= row.p80_ms for row in rows)
    assert rows[0].max_rel_difference == 0
    assert max(rows[1].max_rel_difference, rows[3].max_rel_difference) < 1e-5
    assert rows[2].max_rel_difference > 1e-2
    assert all(row.peak_memory_mib and row.file_size_mib for row in rows[:3])
    assert (rows[3].peak_memory_mib, rows[3].file_size_mib) == (None, None)
    assert rows[1].latency.name == "swap"


def test_every_load_gets_its_share_of_the_rounds(contenders: list[Contender]) -> None:
    loaded: list[int] = []

    def load(index: int) -> list[Contender]:
        loaded.append(index)
        return contenders[2:]

    inputs = {"x": randn(3, 24).numpy()}
    rows = measure(load, inputs, provider="cuda", model="", batch=3, sequence=None, loads=3, rounds=7)
    assert loaded == [0, 1, 2]
    assert {row.rounds for row in rows} == {9}
    assert {row.peak_memory_mib for row in rows} == {None}, "peak memory is the host's, not the device's"
    rows = measure(load, inputs, provider="cuda", model="", batch=3, sequence=None, rounds=90, max_seconds=0)
    assert {row.rounds for row in rows} == {3}


def test_unequal_outputs_are_refused_where_they_should_be_equal(contenders: list[Contender]) -> None:
    rows_of([*contenders[:2], contenders[3]], max_difference=1e-4)
    with pytest.raises(
        MELoRAError, match=r"differ from those of `unmerged` by more than 0.0001 .*`swap, no adapter` by"
    ):
        rows_of(contenders, max_difference=1e-4)


def test_a_csv_is_written_whole_or_not_at_all(contenders: list[Contender], tmp_path: Path) -> None:
    columns = [item.name for item in fields(Measurement)]
    write_csv([asdict(row) for row in rows_of(contenders[:1])], columns, tmp_path / "rows.csv")
    before = (tmp_path / "rows.csv").read_bytes()
    assert before.startswith(b"provider,form,model,batch,sequence,threads,median_ms,p20_ms,p80_ms,ratio,")
    with pytest.raises(ValueError, match="unknown"):
        write_csv([{"unknown": 1}], columns, tmp_path / "rows.csv")
    assert [file.name for file in tmp_path.iterdir()] == ["rows.csv"]
    assert (tmp_path / "rows.csv").read_bytes() == before
    with pytest.raises(MELoRAError, match="cannot be written"):
        write_csv([], columns, tmp_path / "nowhere" / "rows.csv")
