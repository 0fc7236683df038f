"""An export's files: all or none, whatever ends it; an earlier export stays until the last moment."""

import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support.full_disk import full_disk
from support.models import assert_unchanged, randn, rewritten_tower, tower

import melora_fx
from exporters import OrtRunner, export_onnx
from melora_fx import MELoRAError
from melora_fx.files import new_folder, staging_folder, write_atomically, write_together
from melora_fx.saving import adapter_file


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_what_a_killed_export_left_is_removed_and_a_running_ones_files_are_not(tmp_path: Path) -> None:
    path = tmp_path / "model [1].onnx"
    for folder in (".model [1].onnx.abcdefgh.tmp", ".other.onnx.abcdefgh.tmp"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "weights").touch()
    with staging_folder(path) as running:
        (running / "weights").touch()
        with staging_folder(path) as second:
            assert names(tmp_path) == {running.name, second.name, ".other.onnx.abcdefgh.tmp"}
            assert names(running) == {"weights"}
    assert names(tmp_path) == {".other.onnx.abcdefgh.tmp"}


def test_what_earlier_versions_left_is_removed_and_users_files_are_not(tmp_path: Path) -> None:
    for file in (".model.safetensors.123.tmp", ".model.safetensors.a_b0c1d2.new"):
        (tmp_path / file).touch()
    mine = {".model.safetensors.tmp", ".model.safetensors.backup.tmp", "model.safetensors.123.tmp", ".other.123.tmp"}
    for file in mine:
        (tmp_path / file).touch()
    write_atomically(tmp_path / "model.safetensors", lambda path: path.write_text("new"))
    assert names(tmp_path) == {"model.safetensors", *mine}


def test_a_staging_folder_that_another_run_has_removed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its creation and its lock it looks like a killed run's."""
    make = tempfile.mkdtemp
    made = []

    def removed_at_first(**options: Any) -> str:
        made.append(make(**options))
        if len(made) == 1:
            shutil.rmtree(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", removed_at_first)
    with staging_folder(tmp_path / "model.onnx") as staging:
        assert [str(staging)] == made[1:]
    assert names(tmp_path) == set()


def test_files_written_together_are_all_new_or_none(tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        path.write_text("half")
        raise ValueError

    (tmp_path / "first").write_text("old")
    with pytest.raises(ValueError, match=r"^$"):
        write_together(tmp_path, {"first": lambda path: path.write_text("new"), "second": fails})
    assert names(tmp_path) == {"first"}
    assert (tmp_path / "first").read_text() == "old"


def test_a_failed_save_leaves_no_folder_that_it_has_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rewritten_tower()
    (tmp_path / "mine").mkdir()
    with full_disk(100):
        for folder in ("new", "mine", "mine/new/deep"):
            with pytest.raises(MELoRAError, match=f"{folder}` cannot be written: File too large"):
                melora_fx.save_adapter(model, tmp_path / folder)
        with (
            pytest.raises(MELoRAError, match="cannot be written: File too large"),
            new_folder(tmp_path / "a/b") as made,
        ):
            (made / "weights").write_bytes(bytes(1000))
    with pytest.raises(MELoRAError, match="cannot be written: File name too long"):
        melora_fx.save_adapter(model, tmp_path / "new" / ("n" * 300))

    def cannot_be_serialised(*_: object) -> None:
        raise TypeError

    monkeypatch.setattr(adapter_file, "write_tensors", cannot_be_serialised)
    with pytest.raises(TypeError):
        melora_fx.save_adapter(model, tmp_path / "new")
    assert [file.name for file in tmp_path.rglob("*")] == ["mine"]


def test_a_new_folder_is_there_when_it_is_whole(tmp_path: Path) -> None:
    """It is readable for others too, as the umask says; a block that raises an error keeps the existing folder."""
    path = tmp_path / "out"
    (tmp_path / "by_hand").mkdir()
    with new_folder(path) as made:
        (made / "weights").touch()
        assert not path.exists()
    assert names(path) == {"weights"}
    assert path.stat().st_mode == (tmp_path / "by_hand").stat().st_mode
    with pytest.raises(MELoRAError, match=r"out` exists already"), new_folder(path) as made:
        (made / "others").touch()
    assert (names(tmp_path), names(path)) == ({"out", "by_hand"}, {"weights"})


def test_a_full_disk_is_one_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    model = rewritten_tower()
    refused = pytest.raises(MELoRAError, match=f"^`{re.escape(str(path))}` cannot be written: ")
    with full_disk(5_000), refused, assert_unchanged(model):
        export_onnx(model, (randn(2, 24),), path)
    assert names(tmp_path) == {"model.onnx"}
    assert path.read_text() == "old"


def test_a_folder_in_the_place_of_a_file_leaves_the_old_graph(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("old")
    (tmp_path / "model.export.json").mkdir()
    with pytest.raises(MELoRAError, match=r"model\.export\.json` is a folder"):
        export_onnx(tower(), (randn(2, 24),), tmp_path, verify=False)
    assert names(tmp_path) == {"model.onnx", "model.export.json"}
    assert (tmp_path / "model.onnx").read_text() == "old"


@pytest.mark.parametrize("path", ["n" * 300 + ".onnx", "folder.onnx"], ids=["name_too_long", "folder"])
def test_a_path_that_cannot_be_a_file_is_one_error(path: str, tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(MELoRAError, match="cannot be written"):
        export_onnx(tower(), (randn(2, 24),), tmp_path / path)
    assert names(tmp_path) == {"folder.onnx"}


@pytest.mark.slow
@pytest.mark.parametrize("path", ["a b/mö ∂.onnx", "new/deep/v1.2"])
def test_odd_paths_work(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also relative ones: external data is found next to the graph."""
    monkeypatch.chdir(tmp_path)
    report = export_onnx(tower(), (randn(2, 24),), path)
    assert OrtRunner(report.path).run({"x": randn(3, 24)})["output"].shape == (3, 6)
    assert names(tmp_path / Path(report.path).parent) == set(report.files)


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
import onnx_ir
from support.models import randn, rewritten_tower
import exporters.export
import exporters.graph.build
import exporters.verify
from exporters import export_onnx

path, step = sys.argv[1:]
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
replace = os.replace

def replace_all_but_the_last(source, target):
    kill() if str(target) == path else replace(source, target)

if step == "moving":
    os.replace = replace_all_but_the_last
else:
    module, name = {
        "translating": (exporters.graph.build, "build_graph"),
        "writing": (onnx_ir, "to_proto"),
        "comparing": (exporters.verify, "compare"),
        "moving_starts": (exporters.export, "publish"),
    }[step]
    setattr(module, name, kill)
export_onnx(rewritten_tower(seed=1), (randn(2, 24),), path)
"""


@pytest.mark.slow_cases("writing", "moving")
@pytest.mark.parametrize("step", ["translating", "writing", "comparing", "moving_starts", "moving"])
def test_a_killed_export_leaves_the_earlier_one(step: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    x = {"x": randn(2, 24)}
    export_onnx(rewritten_tower(), (x["x"],), path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    result = subprocess.run([sys.executable, "-c", KILLED, path, step], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = [file for file in tmp_path.iterdir() if file.is_dir()]
    assert len(left) == 1, "the files of the killed export"
    lost = {tmp_path / "model.export.json"} if step == "moving" else set()
    assert {file: file.read_bytes() for file in before if file not in lost} == {
        file: content for file, content in before.items() if file not in lost
    }
    OrtRunner(path).run(x)
    export_onnx(rewritten_tower(), (x["x"],), path)
    assert names(tmp_path) == {file.name for file in before}
    assert path.read_bytes() == before[path]
