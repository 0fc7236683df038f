"""Folds on disk: the bits of a fold in memory, and the report."""

import io
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from support.adapter_files import edit_header
from support.fold_folders import (
    BLOCKS,
    SINGLE,
    Folders,
    assert_only_these_differ,
    bits,
    content_of,
    edit_tensors,
    llama,
    metadata_of,
    stored,
)
from support.models import (
    TOWER_CONFIG,
    TOWER_SITES,
    bert,
    bert_classifier,
    fill,
    gpt2,
    tokens,
    tower,
)
from support.zoo import HUGGING_FACE, ZOO, build
from transformers import (
    BertForSequenceClassification,
    GPT2LMHeadModel,
)

import melora_fx
from melora_fx import MELoRAConfig

_SPLIT = MELoRAConfig(rank=(1, 2, 1), num_blocks=3, alpha=2.0, split=3)

_UNEVEN = MELoRAConfig(rank=(1, 2), num_blocks=2, alpha=2.0, split=(8, 4))

_SIZES = MELoRAConfig(rank=2, num_blocks=3, alpha=4.0, use_rslora=True, split=(24, 48))

CASES: dict[str, tuple[Callable[[], Any], dict[str, MELoRAConfig], int]] = {
    "bert": (bert_classifier, {"query": BLOCKS, "dense": MELoRAConfig(rank=3, num_blocks=2, alpha=2.0)}, 2 * 4 + 1),
    "gpt2": (gpt2, {"h.0.attn.c_attn": _SPLIT, "h.1.attn.c_attn": _SIZES, "c_fc": BLOCKS, "c_proj": BLOCKS}, 2 * 4),
    "llama": (llama, {"q_proj": BLOCKS, "k_proj": _UNEVEN, "v_proj": BLOCKS, "re:.*(up|down)_proj": BLOCKS}, 2 * 5),
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.default_cases("gpt2-fp16-sharded", "bert-fp32-single", "llama-bf16-*")
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
    """No config.json, matrices in a Conv1D and under a custom name, and a trained norm."""
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


@pytest.mark.default_cases("BERT", "Llama", "GPT-2")
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_every_architecture(name: str, folders: Folders) -> None:
    model, _ = build(name)
    config = MELoRAConfig(rank=(1, 2), num_blocks=2, alpha=2.0)
    found = melora_fx.match(model, "all-linear", config).sites
    targets = [site.name for site in found if site.num_experts == 1]  # a checkpoint stores stacks in another form
    trained = folders.prepare(model, targets, config)
    expected, checked = folders.in_memory(type(model))
    report = folders.fold()
    assert bits(type(model).from_pretrained(folders.out).state_dict()) == bits(expected.state_dict())
    assert {site.name: site for site in report.sites} == {site.name: site for site in checked.sites}
    assert len(report.sites) == len(melora_fx.sites(trained)) == len(targets)
    assert len(found) == ZOO[name].sites


def test_adapter_of_a_float32_base_folds_into_the_rounded_one(folders: Folders) -> None:
    folders.prepare(bert_classifier(), "query")
    shutil.rmtree(folders.base)
    bert_classifier().to(torch.bfloat16).save_pretrained(folders.base)
    expected, _ = folders.in_memory(BertForSequenceClassification)
    folders.fold()
    folded = BertForSequenceClassification.from_pretrained(folders.out)
    assert folded.dtype == torch.bfloat16
    assert bits(folded.state_dict()) == bits(expected.state_dict())


@pytest.mark.slow
def test_adapter_of_a_whole_captured_model(folders: Folders) -> None:
    folders.prepare(bert_classifier(), "query")
    model = BertForSequenceClassification.from_pretrained(folders.base).eval()
    captured = fill(melora_fx.rewrite(model, "query", BLOCKS, example_inputs=tokens(), keep_trainable="classifier"))
    melora_fx.save_adapter(captured, folders.adapter)
    expected, _ = folders.in_memory(BertForSequenceClassification)
    folders.fold()
    assert bits(BertForSequenceClassification.from_pretrained(folders.out).state_dict()) == bits(expected.state_dict())


def test_adapter_of_an_early_version(folders: Folders) -> None:
    """It contains neither the orientation of the weights nor the class of its model: shapes and names must suffice."""
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
    first = folders.parent / "first"
    second = folders.parent / "second"
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


def test_report_is_sorted_and_identifies_the_adapter(folders: Folders) -> None:
    trained = folders.prepare(bert_classifier().to(torch.bfloat16), ["query", "dense"], keep="classifier")
    report = folders.fold()
    checked = melora_fx.check_fold(trained)
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
        report = melora_fx.fold_checkpoint(folders.base, folders.adapter, folders.out)
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
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=screen, force_terminal=True, width=100))
    folders.fold(folders.parent / "again")
    assert "folding again" in screen.getvalue()
