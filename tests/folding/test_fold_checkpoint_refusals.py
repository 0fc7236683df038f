"""Checkpoints and adapters that a fold on disk must refuse."""

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapter_files import edit_header
from support.fold_folders import (
    BLOCKS,
    CONFIG,
    INDEX,
    SINGLE,
    Folders,
    assert_only_these_differ,
    bits,
    edit_json,
    edit_tensors,
    llama,
)
from support.models import (
    bert,
    bert_classifier,
    fill,
    gpt2,
)
from torch import nn
from transformers import (
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
)

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError


def test_tied_weight(folders: Folders) -> None:
    folders.prepare(gpt2(), ["lm_head", "c_attn"])
    folders.assert_refused(
        r"(?s)cannot be folded into `.*base`:\n`lm_head` shares its weight with 'transformer\.wte\.weight': fold in "
        r"memory with `fold\(model, untie=True\)`, and save$"
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
    """Fills the adapter with these values; row r of lora_a gets the r-th."""

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
    """Found while the weights are written: everything written so far is removed."""
    folders.prepare(bert_classifier().to(dtype), "query", MELoRAConfig(rank=2, num_blocks=3, alpha=2.0))
    filled_with(folders, lora_a, lora_b)
    name = str(dtype).removeprefix("torch.")
    folders.assert_refused(rf"`bert\.encoder.*query`: the sum of weight and update is beyond the range of {name}$")


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_base_with_a_value_that_is_not_finite(value: float, folders: Folders) -> None:
    """The adapter did not cause such values: they fold as in memory. They must not hide values that it did cause."""
    model = bert_classifier().half()
    model.bert.encoder.layer[0].attention.self.query.weight.data[0, 1] = value  # not sampled by the fingerprint
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
    """Its adapter does not contain the weight's orientation; this is noticed before anything is written."""
    folders.prepare(gpt2(), ["c_fc", "attn.c_proj"])

    def forget(header: dict[str, Any]) -> None:
        for site in header["sites"].values():
            del site["is_transposed"]

    edit_header(folders.adapter, forget)
    folders.assert_refused(r"`transformer\.h\.0\.attn\.c_proj` of `.*adapter`: its square weight may be")


def test_adapter_that_says_the_wrong_way(folders: Folders) -> None:
    """Its shapes contradict it."""
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
        ("no_base", "base` is not a folder: name that of a model"),
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
    """The same as none: transformers reads it as two labels."""
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
