"""Files that earlier commits wrote: the current code reads them, and folds to the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.make_fixtures import ADAPTERS, CHECKPOINTS, facts_of, save_base
from safetensors import safe_open
from safetensors.torch import load_file
from support.models import TOLERANCE, assert_equal
from torch import nn
from transformers import BertForSequenceClassification

import melora_fx
from melora_fx import MELoRAError

ROOT = Path(__file__).parent / "fixtures"
COMMITS = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__")
assert COMMITS, "no fixtures"

pytestmark = pytest.mark.parametrize("commit", COMMITS)
each_adapter = pytest.mark.parametrize("name", ADAPTERS)
each_checkpoint = pytest.mark.parametrize("name", CHECKPOINTS)


def plain(name: str) -> nn.Module:
    return ADAPTERS[name].build()


def rewritten(name: str) -> nn.Module:
    """Returns the rewritten model, with other values in its adapters."""
    case = ADAPTERS[name]
    return melora_fx.rewrite(case.build(), case.targets, **case.options)


def load(model: nn.Module, name: str, folder: Path) -> nn.Module:
    return melora_fx.load_adapter(model, folder, example_inputs=ADAPTERS[name].options.get("example_inputs"))


def expected_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "expected.json").read_text())


@each_adapter
def test_adapter_holds_what_was_written(commit: str, name: str) -> None:
    assert facts_of(ROOT / commit / name / "adapter") == expected_of(ROOT / commit / name)


@each_adapter
@pytest.mark.parametrize("build", [plain, rewritten])
def test_adapter_gives_the_outputs_that_it_gave(commit: str, name: str, build: Any) -> None:
    folder = ROOT / commit / name
    model = load(build(name), name, folder / "adapter")
    expected = load_file(folder / "outputs.safetensors")["output"]
    torch.testing.assert_close(ADAPTERS[name].output(model), expected, **TOLERANCE[torch.float32])
    assert (expected - ADAPTERS[name].output(plain(name))).abs().max() > 0.1, "the adapter must change the output"


@each_adapter
def test_adapter_saved_again_is_the_same(commit: str, name: str, tmp_path: Path) -> None:
    folder = ROOT / commit / name
    melora_fx.save_adapter(load(plain(name), name, folder / "adapter"), tmp_path)
    again, expected = facts_of(tmp_path), expected_of(folder)
    assert again["model"].items() >= expected["model"].items()  # the padding token came later
    assert again | {"model": expected["model"]} == expected


@each_checkpoint
def test_fold_on_disk_gives_the_same_files(commit: str, name: str, tmp_path: Path) -> None:
    before = ROOT / commit / name
    save_base(name, tmp_path / "base")
    melora_fx.fold_checkpoint(tmp_path / "base", ROOT / commit / CHECKPOINTS[name][0] / "adapter", tmp_path / "out")
    names = sorted(path.name for path in before.iterdir() if "safetensors" in path.name)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if "safetensors" in path.name) == names
    for file in names:
        if file.endswith(".json"):
            assert json.loads((tmp_path / "out" / file).read_text()) == json.loads((before / file).read_text())
            continue
        assert_equal(load_file(tmp_path / "out" / file), load_file(before / file))
        with safe_open(before / file, "pt") as old, safe_open(tmp_path / "out" / file, "pt") as new:
            assert new.metadata() == old.metadata()


@each_checkpoint
def test_fold_in_memory_gives_the_same_weights(commit: str, name: str) -> None:
    adapter, dtype, _ = CHECKPOINTS[name]
    model = load(plain(adapter).to(dtype), adapter, ROOT / commit / adapter / "adapter")
    state = melora_fx.fold(model).state_dict()
    stored = {}
    for file in (ROOT / commit / name).glob("*.safetensors"):
        stored |= load_file(file)
    assert_equal({key: state[key] for key in stored}, stored)


def test_folded_checkpoint_is_loaded(commit: str) -> None:
    folder = ROOT / commit / "folded_bert_checkpoint"
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    expected = load_file(ROOT / commit / "bert_adapter" / "outputs.safetensors")["output"]
    actual = ADAPTERS["bert_adapter"].output(model)
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])


@each_checkpoint
def test_folded_checkpoint_is_known(commit: str, name: str, tmp_path: Path) -> None:
    folder = ROOT / commit / CHECKPOINTS[name][0]
    sha256 = expected_of(folder)["sha256"]
    with pytest.raises(MELoRAError, match=rf"holds an adapter already \(sha256 {sha256[:12]}…\)"):
        melora_fx.fold_checkpoint(ROOT / commit / name, folder / "adapter", tmp_path / "out")


def test_fixtures_are_small(commit: str) -> None:
    assert sum(path.stat().st_size for path in (ROOT / commit).rglob("*") if path.is_file()) < 200_000
