"""Refusals of `write_gguf_adapter`: one error that names the cause, and nothing is written."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import gguf_models
from support.fold_folders import Folders, edit_json, edit_tensors
from support.full_disk import full_disk

from exporters import write_gguf_adapter
from exporters.adapters.gguf_names import CONVERSIONS, places_of
from melora_fx import MELoRAConfig, MELoRAError

pytest.importorskip("gguf")

TWO = MELoRAConfig(rank=(1, 2), num_blocks=2, alpha=(1.0, 2.0))


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


def refused(folders: Folders, text: str) -> None:
    with folders.refused(text):
        write_gguf_adapter(folders.adapter, folders.base, folders.out)


def test_a_trained_head_is_refused(folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj"], TWO, keep="lm_head")
    refused(folders, "has trained 'lm_head.weight' in addition to its sites.*melora-fx fold")


def test_a_tied_head_is_refused(folders: Folders) -> None:
    folders.prepare(gguf_models.gpt2(), ["lm_head", "c_fc"], TWO)
    refused(folders, r"`lm_head` shares its weight with 'transformer.wte.weight', .*untie=True")


def test_another_base_is_refused(folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj"], TWO)
    other = gguf_models.llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(2)
    other.save_pretrained(folders.base)
    refused(folders, "was trained on another base model:\n`model.layers.0.self_attn.q_proj`")


def test_a_base_of_another_architecture_is_refused(folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj"], TWO)
    gguf_models.gpt2().save_pretrained(folders.base)
    refused(folders, "holds a gpt2 model, not the LlamaForCausalLM")


@pytest.mark.default_cases("unknown", "rearranged", "empty")
@pytest.mark.parametrize(
    ("architectures", "text"),
    [
        (["BertModel"], "holds a BertModel, and how llama.cpp converts its weights is not known: fold"),
        (["DeepseekV2ForCausalLM"], "conversion of DeepseekV2ForCausalLM rearranges kv_b_proj, .*: fold"),
        ([], "names no class in `architectures`"),
        (None, "names no class in `architectures`"),
        ("LlamaForCausalLM", "names no class in `architectures`"),
        ([{}], "names no class in `architectures`"),
    ],
    ids=["unknown", "rearranged", "empty", "none", "text", "no text"],
)
def test_an_architecture_is_refused(architectures: Any, text: str, folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj"], TWO)
    edit_json(folders.base / "config.json", lambda config: config.update(architectures=architectures))
    refused(folders, text)


def test_a_weight_that_llama_cpp_lacks_is_refused(folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj"], TWO)
    edit_json(folders.base / "config.json", lambda config: config.update(architectures=["GPT2LMHeadModel"]))
    refused(folders, "llama.cpp cannot add.*\n`model.layers.0.self_attn.q_proj`: llama.cpp's gpt2 has no tensor for it")


def test_no_configuration_is_refused(folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj"], TWO)
    (folders.base / "config.json").unlink()
    refused(folders, "has no config.json")


def test_a_folder_without_an_adapter_is_refused(folders: Folders) -> None:
    gguf_models.llama().save_pretrained(folders.base)
    refused(folders, "is not an adapter folder")


@pytest.mark.default_cases("adapter*", "base")
@pytest.mark.parametrize("place", ["adapter/adapter.safetensors", "base/model.safetensors", "base", "base/new.gguf"])
def test_inputs_are_kept(place: str, folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj"], TWO)
    with folders.refused("is the folder that is read, or in it"):
        write_gguf_adapter(folders.adapter, folders.base, folders.parent / place)


def test_other_files_are_kept(folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj"], TWO)
    gguf_models.write_gguf(gguf_models.llama(), folders.parent / "model.gguf")
    (folders.parent / "notes").write_text("mine")
    for place in ("model.gguf", "notes"):
        with folders.refused("already exists and is not a GGUF adapter"):
            write_gguf_adapter(folders.adapter, folders.base, folders.parent / place)
    os.mkfifo(folders.parent / "pipe")
    with folders.refused("is a folder or a device, not a file"):
        write_gguf_adapter(folders.adapter, folders.base, folders.parent / "pipe")


def test_a_configuration_of_fewer_layers(folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj"], TWO)
    edit_json(folders.base / "config.json", lambda config: config.update(num_hidden_layers=1))
    refused(folders, "layers.1.self_attn.q_proj`: the base's config.json describes a model without it")


def test_a_full_disk(folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj"], TWO)
    for limit in (100, 1000, 2000):  # in the header and in the tensors
        with full_disk(limit), folders.refused("out` cannot be written"):
            write_gguf_adapter(folders.adapter, folders.base, folders.out)


def test_the_package_is_named(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(folders, "pip install gguf")


@pytest.mark.default_cases("long", "below_a_file")
@pytest.mark.parametrize(
    "place",
    ["x" * 300, "a\0b", "base.json/below", "/proc/melora_fx/out"],
    ids=["long", "nul", "below_a_file", "nobody_may"],
)
def test_places_that_cannot_be_written(place: str, folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj"], TWO)
    (folders.parent / "base.json").touch()
    with folders.refused("cannot be written"):
        write_gguf_adapter(folders.adapter, folders.base, folders.parent / place)


def test_a_truncated_adapter_is_refused(folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj"], TWO)
    file = folders.adapter / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    refused(folders, "truncated or corrupt")


def test_nan_is_refused(folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj"], TWO)
    edit_tensors(
        folders.adapter / "adapter.safetensors", lambda tensors: min(tensors.items())[1][0, 0].fill_(torch.nan)
    )
    refused(folders, "NaN")


def test_no_number_of_heads_is_refused() -> None:
    with pytest.raises(MELoRAError, match=r"config\.json has no number of heads for its 24 rows"):
        places_of("model.layers.0.self_attn.q_proj", 24, CONVERSIONS["LlamaForCausalLM"], {}, is_stack=False)
