"""Wherever a process is killed, the old file or the new one is there, and the next run removes leftovers."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.fold_folders import Folders
from support.kills import killed_at_each_change
from support.models import bert, fill, randn, rewritten_tower, tower
from support.onnx_files import publish_small, value_in
from support.training import rewritten, trainer_of

import melora_fx
from exporters import OrtRunner, export_onnx, fold_onnx
from exporters.adapters.ort_adapter import write_ort_adapter
from melora_fx import AdapterCheckpointCallback

X = {"x": randn(2, 24)}


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def check_kills(
    folder: Path, run: Callable[[], object], check: Callable[[], object], again: Callable[[], object] | None = None
) -> int:
    """Kills `run` before every change to files, each time with the same initial files in `folder`, and calls `check`.
    Then runs it, or `again`, to its end: the files must be those of an undisturbed run. Returns the number of kills.
    """
    with tempfile.TemporaryDirectory() as kept:
        before = Path(kept, "before")
        shutil.copytree(folder, before, symlinks=True)

        def restore() -> None:
            shutil.rmtree(folder)
            shutil.copytree(before, folder, symlinks=True)

        run()
        expected = names(folder)
        restore()
        count = 0
        for number in killed_at_each_change(run):
            check()
            (again or run)()
            assert names(folder) == expected, f"after a kill before change {number}"
            restore()
            count = number + 1
    return count


@pytest.mark.slow
def test_publication_over_an_earlier_graph(tmp_path: Path) -> None:
    """The old graph or the new one is there, with its own weights, and without a description of the other."""
    folder = tmp_path / "graphs"
    path = folder / "model.onnx"
    publish_small(path, 1.0, config='{"is": 1}', tokenizer='{"is": 1}', same='{"is": "same"}')
    seen = set()

    def check() -> None:
        value = value_in(path)
        for file in ("config", "tokenizer"):
            description = folder / f"{file}.json"
            assert not description.exists() or description.read_text() == f'{{"is": {value:.0f}}}'
        seen.add(value)

    def run() -> None:
        publish_small(path, 2.0, config='{"is": 2}', tokenizer='{"is": 2}', same='{"is": "same"}', added="{}")

    assert check_kills(folder, run, check) > 10
    assert seen == {1.0, 2.0}


@pytest.mark.slow
def test_an_adapter_over_an_earlier_one(tmp_path: Path) -> None:
    old, new = (fill(rewritten_tower(), seed=seed) for seed in (0, 1))
    folder = tmp_path / "adapter"
    either = []
    for model in (new, old):
        melora_fx.save_adapter(model, folder)
        either.append(load_file(folder / "adapter.safetensors"))

    def check() -> None:
        found = load_file(folder / "adapter.safetensors")
        assert any(all(torch.equal(found[name], one[name]) for name in one) for one in either)

    assert check_kills(folder, lambda: melora_fx.save_adapter(new, folder), check) > 5
    assert names(folder) == {"adapter.safetensors", "adapter_config.json"}


def outputs_of(path: Path) -> list[float]:
    return OrtRunner(path).run(X)["output"].ravel().tolist()


@pytest.mark.slow_cases("True")
@pytest.mark.parametrize("verify", [False, True])
def test_an_export_over_an_earlier_one(verify: bool, tmp_path: Path) -> None:
    folder = tmp_path / "graphs"
    path = folder / "model.onnx"
    new = fill(rewritten_tower(), seed=1)
    export_onnx(new, (X["x"],), path, verify=False)
    either = [outputs_of(path)]
    export_onnx(rewritten_tower(), (X["x"],), path, verify=False)
    either.append(outputs_of(path))
    assert either[0] != either[1]
    seen = []

    def check() -> None:
        seen.append(either.index(outputs_of(path)))

    assert check_kills(folder, lambda: export_onnx(new, (X["x"],), path, verify=verify), check) > 10
    assert set(seen) == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("earlier", ["fold", "export"])
def test_a_fold_over_an_earlier_graph(earlier: str, tmp_path: Path) -> None:
    """Next to the base's graph, which stays."""
    folder = tmp_path / "graphs"
    path = folder / "folded.onnx"
    export_onnx(tower(), (X["x"],), folder / "base.onnx", verify=False)
    base = outputs_of(folder / "base.onnx")
    either = []
    for name, model in (("new", fill(rewritten_tower(), seed=1)), ("old", rewritten_tower())):
        melora_fx.save_adapter(model, tmp_path / name)
        if (name, earlier) == ("old", "export"):
            export_onnx(model, (X["x"],), path, verify=False)
        else:
            fold_onnx(folder / "base.onnx", tmp_path / name, path)
        either.append(outputs_of(path))
    assert either[0] != either[1]
    seen = []

    def check() -> None:
        seen.append(either.index(outputs_of(path)))
        assert outputs_of(folder / "base.onnx") == base

    assert check_kills(folder, lambda: fold_onnx(folder / "base.onnx", tmp_path / "new", path), check) > 10
    assert set(seen) == {0, 1}
    assert not (folder / "folded.export.json").exists() or earlier == "export"


@pytest.mark.slow
def test_a_folded_checkpoint_is_whole_or_not_there(tmp_path: Path) -> None:
    folders = Folders(tmp_path / "folders")
    folders.prepare(bert(num_layers=1), "query")
    (folders.base / "1_Pooling").mkdir()
    (folders.base / "1_Pooling" / "config.json").write_text("{}")
    melora_fx.fold_checkpoint(folders.base, folders.adapter, tmp_path / "expected")
    seen = []

    def check() -> None:
        seen.append(folders.out.exists())
        for file in (file for file in (tmp_path / "expected").rglob("*") if folders.out.exists() and file.is_file()):
            assert (folders.out / file.relative_to(tmp_path / "expected")).read_bytes() == file.read_bytes()

    def run() -> None:
        melora_fx.fold_checkpoint(folders.base, folders.adapter, folders.out)

    def again() -> None:
        shutil.rmtree(folders.out, ignore_errors=True)
        run()

    assert check_kills(folders.parent, run, check, again) > 5
    assert set(seen) == {False, True}


@pytest.mark.slow
def test_an_adapter_for_onnx_runtime_over_an_earlier_one(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    new = fill(rewritten_tower(), seed=1)
    export_onnx(new, (X["x"],), tmp_path / "swap.onnx", adapter="swap", verify=False)
    either = []
    for name, model in (("new", new), ("old", rewritten_tower())):
        melora_fx.save_adapter(model, tmp_path / name)
        write_ort_adapter(tmp_path / name, tmp_path / "swap.onnx", folder / "a.onnx_adapter")
        either.append((folder / "a.onnx_adapter").read_bytes())

    def check() -> None:
        assert (folder / "a.onnx_adapter").read_bytes() in either

    def run() -> None:
        write_ort_adapter(tmp_path / "new", tmp_path / "swap.onnx", folder / "a.onnx_adapter")

    assert check_kills(folder, run, check) > 3


@pytest.mark.slow
def test_a_trainers_checkpoint_over_one_of_an_earlier_run(tmp_path: Path) -> None:
    """Never one run's adapter next to files from which another run resumes."""
    model = fill(rewritten())
    trainer_of(model, tmp_path, AdapterCheckpointCallback())
    folder = tmp_path / "checkpoint-3"
    model.save_pretrained(folder)
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_text("of the earlier run")
    old = load_file(folder / "model.safetensors")
    fill(model, seed=1)
    seen = set()

    def check() -> None:
        adapter = load_file(folder / "adapter.safetensors")
        name = next(name for name in adapter if name.endswith("query.lora_b"))
        is_old = torch.equal(adapter[name], old[name])
        if (folder / "model.safetensors").exists():
            assert torch.equal(load_file(folder / "model.safetensors")[name], adapter[name])
        seen.add((is_old, *((folder / name).exists() for name in ("model.safetensors", "optimizer.pt"))))

    check_kills(folder, lambda: model.save_pretrained(folder), check)
    assert {(True, True, True), (True, False, False), (False, False, False), (False, True, False)} <= seen
    assert (False, True, True) not in seen
