"""Folds on disk are all or nothing, and need little memory."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.fold_folders import (
    CONFIG,
    INDEX,
    OTHERS,
    SINGLE,
    Folders,
    add_files,
    bits,
    content_of,
    edit_json,
    llama,
    names,
)
from support.full_disk import full_disk
from support.models import (
    bert,
    fill,
    randn,
)
from transformers import (
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.folding import fold_checkpoint as module


class Crash(BaseException):
    """Ends the fold, as a crash does."""


STEPS = ["_write_weights", "write_edited", "_write_index", "_write_config", "make_header"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Crash()], ids=["disk_full", "crash"])
@pytest.mark.parametrize("step", STEPS)
def test_what_fails_on_the_way_leaves_nothing(
    step: str, error: BaseException, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.prepare(bert(), "query", sharded=True)
    add_files(folders.base, OTHERS)

    def fails(*_: object) -> None:
        raise error

    before = content_of(folders.parent)
    with monkeypatch.context() as patch:
        patch.setattr(module, step, fails)
        with pytest.raises(MELoRAError if isinstance(error, OSError) else Crash) as caught:
            melora_fx.fold_checkpoint(folders.base, folders.adapter, folders.out)
    if isinstance(error, OSError):
        assert str(caught.value) == f"`{folders.out}` cannot be written: No space left on device"
    assert names(folders.parent) == {"base", "adapter"}
    assert content_of(folders.parent) == before
    folders.fold()


def test_a_full_disk_is_one_error_and_leaves_nothing(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    before = content_of(folders.parent)
    assert (folders.base / SINGLE).stat().st_size > 20_000
    with full_disk(20_000), pytest.raises(MELoRAError) as caught:
        melora_fx.fold_checkpoint(folders.base, folders.adapter, folders.out)
    assert str(caught.value) == f"`{folders.out}` cannot be written: File too large"
    assert names(folders.parent) == {"base", "adapter"}
    assert content_of(folders.parent) == before


KILLED = """
import os, signal, sys
import melora_fx

from melora_fx.folding import fold_checkpoint as module

*folders, step = sys.argv[1:]
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
write_edited = module.write_edited
if step == "writing":
    module.write_edited = lambda files, _: write_edited(files, lambda count: count > 5000 and kill())
elif step == "moving":
    os.replace = kill
else:
    setattr(module, step, kill)
melora_fx.fold_checkpoint(*folders)
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", ["_write_weights", "writing", "_write_index", "_write_config", "moving"])
def test_a_killed_fold_leaves_no_folder_and_the_next_one_removes_what_it_wrote(step: str, folders: Folders) -> None:
    folders.prepare(bert(), "query", sharded=True)
    before = content_of(folders.base)
    command = [sys.executable, "-c", KILLED, folders.base, folders.adapter, folders.out, step]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (left,) = names(folders.parent) - {"base", "adapter"}
    assert left.startswith(".out.")
    assert content_of(folders.base) == before
    (folders.parent / ".other.abcdefgh.tmp").mkdir()
    melora_fx.fold_checkpoint(folders.base, folders.adapter, folders.out)
    assert names(folders.parent) == {"base", "adapter", "out", ".other.abcdefgh.tmp"}
    expected, _ = folders.in_memory(BertModel)
    assert bits(BertModel.from_pretrained(folders.out).state_dict()) == bits(expected.state_dict())


PEAK = """
import sys
sys.path.insert(0, "tests")

import melora_fx
from support.peak_memory import PeakMemory

small, large = (sys.argv[1:4], sys.argv[4:])
melora_fx.fold_checkpoint(*small)  # permanent imports are not counted
with PeakMemory() as memory:
    melora_fx.fold_checkpoint(*large)
print(memory.growth)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_peak_memory_is_that_of_a_few_weights(sharded: bool, tmp_path: Path) -> None:
    """Counts the memory of the process; pages of files, which the system can reclaim from its cache, do not count."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 3, "vocab_size": 6000}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=4))
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.view(-1, 16).copy_(randn(16) * 0.02)
    small = Folders(tmp_path / "small")
    large = Folders(tmp_path / "large")
    small.prepare(llama(), "all-linear")
    model.save_pretrained(large.base, max_shard_size="100MB" if sharded else "5GB")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    rewritten = fill(melora_fx.rewrite(model, "all-linear", MELoRAConfig(rank=8, num_blocks=8)))
    melora_fx.save_adapter(rewritten, large.adapter)
    largest = max(site.weight.nbytes for site in melora_fx.sites(rewritten).values())
    del model, rewritten
    assert weights > max(300e6, 13 * largest)
    command = [sys.executable, "-c", PEAK, *(f for each in (small, large) for f in (each.base, each.adapter, each.out))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # freed memory goes back to the system
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert largest < int(result.stdout) < 4 * largest
    assert (large.out / CONFIG).is_file()


def test_links_below_the_top_are_followed(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    elsewhere = folders.parent / "elsewhere"
    add_files(elsewhere, {"config.json": b"{}"})
    (folders.base / "1_Pooling").mkdir()
    (folders.base / "1_Pooling" / "linked").symlink_to(elsewhere)
    folders.fold()
    assert (folders.out / "1_Pooling" / "linked" / "config.json").read_bytes() == b"{}"
    shutil.rmtree(folders.out)
    shutil.rmtree(elsewhere)
    folders.assert_refused("linked` cannot be read")  # as for a broken link next to the weights


def test_links_in_a_circle_end(folders: Folders) -> None:
    """To the link's own folder, to the base, and above it; each way is followed once."""
    folders.prepare(bert(), "query")
    add_files(folders.base, {"a/file": b"a", "b/file": b"b"})
    for link, target in {"a/own": ".", "a/base": "..", "a/beyond": "../..", "a/b": "../b", "b/a": "../a"}.items():
        (folders.base / link).symlink_to(target)
    report = folders.fold()
    assert {name for name in content_of(folders.out) if "/" in name} == {"a/file", "a/b/file", "b/file", "b/a/file"}
    (note,) = report.notes
    cycles = {"a/own", "a/base", "a/beyond", "a/b/a", "b/a/own", "b/a/base", "b/a/beyond", "b/a/b"}
    assert set(note.removeprefix("not copied, because they link to folders above them: ").split(", ")) == cycles


def test_out_that_is_a_link(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    (folders.parent / "empty").mkdir()
    link = folders.parent / "link"
    link.symlink_to(folders.parent / "empty")
    with pytest.raises(MELoRAError, match="exists already"):
        melora_fx.fold_checkpoint(folders.base, folders.adapter, link)
    assert link.is_symlink()


def test_index_that_names_a_tensor_that_no_file_has(folders: Folders) -> None:
    folders.prepare(bert(), "query", sharded=True)
    edit_json(
        folders.base / INDEX, lambda index: index["weight_map"].update(gone=next(iter(index["weight_map"].values())))
    )
    folders.assert_refused("names 'gone', which no file has")
