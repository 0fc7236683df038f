"""GGUF adapters: what the file holds, what llama.cpp computes with it, and what is refused."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import gguf_models
from support.fold_folders import Folders, edit_json
from support.full_disk import full_disk
from support.llama_cpp import next_log_probabilities, worst_difference
from support.models import dense_update, fill, randn

import melora_fx
from exporters import write_gguf_adapter
from melora_fx import MELoRAConfig
from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.saving.adapter_file import write_adapter

gguf = pytest.importorskip("gguf")

TWO = MELoRAConfig(rank=(1, 2), num_blocks=2, alpha=(1.0, 2.0))
PROMPTS = [[1, 5, 9, 60, 33, 70, 12], [1, 80]]
LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def updates_of(path: Path) -> dict[str, np.ndarray]:
    """B A of each weight that the file names, in float64."""
    tensors = tensors_of(path)
    names = {name.rpartition(".")[0] for name in tensors}
    assert len(tensors) == 2 * len(names)
    return {
        name: tensors[f"{name}.lora_b"].astype(np.float64) @ tensors[f"{name}.lora_a"].astype(np.float64)
        for name in names
    }


def expected_of(model: Any) -> dict[str, torch.Tensor]:
    """The dense update (O, I) of each site."""
    sites = melora_fx.sites(model).items()
    return {name: dense_update(site.config, site.lora_a.detach(), site.lora_b.detach()) for name, site in sites}


def assert_update(found: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


def rotated(update: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of each head so that those stand together that rotary embeddings pair."""
    size = update.size(0) // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return update[order]


def test_llama(folders: Folders) -> None:
    model = folders.prepare(gguf_models.llama(), [*LLAMA_NAMES, "lm_head"], TWO)
    write_gguf_adapter(folders.adapter, folders.base, folders.out)
    found, expected = updates_of(folders.out), expected_of(model)
    assert len(found) == 15
    for layer in range(2):
        for module, name in LLAMA_NAMES.items():
            update = expected[f"model.layers.{layer}.{module}"]
            heads = {"attn_q": 4, "attn_k": 2}.get(name)
            assert_update(found[f"blk.{layer}.{name}.weight"], rotated(update, heads) if heads else update)
    assert_update(found["output.weight"], expected["lm_head"])


def test_metadata(folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj"], TWO)
    write_gguf_adapter(folders.adapter, folders.base, folders.out)
    fields = gguf.GGUFReader(folders.out).fields
    values = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert values == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
    }
    assert {array.dtype for array in tensors_of(folders.out).values()} == {np.dtype(np.float32)}


def test_the_same_bytes_each_time(folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj", "down_proj"], TWO)
    for name in ("first", "second"):
        write_gguf_adapter(folders.adapter, folders.base, folders.parent / name)
    assert (folders.parent / "first").read_bytes() == (folders.parent / "second").read_bytes()


def test_packed_parts_of_gpt2_stay(folders: Folders) -> None:
    config = MELoRAConfig(rank=2, num_blocks=2, split=3)
    model = folders.prepare(gguf_models.gpt2(), {"c_attn": config, "c_fc": TWO}, TWO)
    write_gguf_adapter(folders.adapter, folders.base, folders.out)
    found, expected = updates_of(folders.out), expected_of(model)
    assert_update(found["blk.1.attn_qkv.weight"], expected["transformer.h.1.attn.c_attn"])
    assert_update(found["blk.0.ffn_up.weight"], expected["transformer.h.0.mlp.c_fc"])


def test_falcon_has_its_queries_first(folders: Folders) -> None:
    model = folders.prepare(gguf_models.falcon(num_kv_heads=2), ["query_key_value"], TWO)
    write_gguf_adapter(folders.adapter, folders.base, folders.out)
    update = expected_of(model)["transformer.h.0.self_attention.query_key_value"]
    first, second = update.split(48)
    pieces = [first[:24], second[:24], first[24:36], second[24:36], first[36:], second[36:]]
    assert_update(updates_of(folders.out)["blk.0.attn_qkv.weight"], torch.cat(pieces))


def test_experts(folders: Folders) -> None:
    gguf_models.mixtral().save_pretrained(folders.base)
    shapes = {"gate_up_proj": (120, 48), "down_proj": (48, 60)}
    adapters, sites, tensors = {}, {}, {}
    for kind, (rows, columns) in shapes.items():
        own = AdapterTensors.new(TWO, columns, rows, num_experts=4)
        own.lora_b[..., :1] = randn(*own.lora_b.shape[:2], 1)
        name = f"model.layers.1.mlp.experts.{kind}"
        adapters[kind] = own
        tensors |= {f"{name}.lora_a": own.lora_a, f"{name}.lora_b": own.lora_b}
        base = {"dtype": "float32", "shape": [4, rows, columns], "without_values": "meta"}
        sites[name] = {"config": TWO.to_dict(), "base": base, "is_transposed": False}
    write_adapter(folders.adapter, tensors, {"sites": sites, "kept": [], "model": {"class": "MixtralForCausalLM"}})
    write_gguf_adapter(folders.adapter, folders.base, folders.out)
    found = updates_of(folders.out)
    gate_up, down = (
        torch.stack([dense_update(TWO, one.lora_a, one.lora_b) for one in own.by_matrix()]) for own in adapters.values()
    )
    assert len(found) == 3
    assert_update(found["blk.1.ffn_gate_exps.weight"], gate_up[:, :60])
    assert_update(found["blk.1.ffn_up_exps.weight"], gate_up[:, 60:])
    assert_update(found["blk.1.ffn_down_exps.weight"], down)


@needs_llama_cpp
@pytest.mark.parametrize(
    ("build", "bound"),
    [
        (gguf_models.llama, 1e-5),
        (gguf_models.gpt2, 5e-3),
        (gguf_models.mixtral, 1e-5),
    ],  # ggml's GELU is a float16 table
    ids=["llama", "gpt2", "mixtral"],
)
@pytest.mark.slow
def test_llama_cpp_computes_the_folded_model(build: Callable[[], Any], bound: float, folders: Folders) -> None:
    base = build()
    base.save_pretrained(folders.base)
    inputs = {"input_ids": torch.tensor([[1, 2, 3, 4, 5]])}
    model = melora_fx.rewrite(type(base).from_pretrained(folders.base).eval(), "all-linear", TWO, example_inputs=inputs)
    melora_fx.save_adapter(fill(model), folders.adapter)
    write_gguf_adapter(folders.adapter, folders.base, folders.out)
    gguf_models.write_gguf(base, folders.parent / "base.gguf")
    plain = next_log_probabilities(folders.parent / "base.gguf", PROMPTS, gguf_models.VOCABULARY)
    adapted = next_log_probabilities(folders.parent / "base.gguf", PROMPTS, gguf_models.VOCABULARY, folders.out)
    assert worst_difference(plain, base, PROMPTS) < bound
    assert worst_difference(adapted, melora_fx.fold(model), PROMPTS) < bound
    assert worst_difference(adapted, base, PROMPTS) > 0.1


def refused(folders: Folders, text: str) -> None:
    with folders.refused(text):
        write_gguf_adapter(folders.adapter, folders.base, folders.out)


def test_a_trained_head_is_refused(folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj"], TWO, keep="lm_head")
    refused(folders, "has trained 'lm_head.weight' beside its sites.*melora-fx fold")


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


@pytest.mark.parametrize(
    ("architectures", "text"),
    [
        (["BertModel"], "holds a BertModel, of which it is not known what llama.cpp makes of its weights: fold"),
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


@pytest.mark.parametrize("place", ["adapter/adapter.safetensors", "base/model.safetensors", "base", "base/new.gguf"])
def test_inputs_are_kept(place: str, folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj"], TWO)
    with folders.refused("is the folder that is read, or in it"):
        write_gguf_adapter(folders.adapter, folders.base, folders.parent / place)


def test_a_full_disk(folders: Folders) -> None:
    folders.prepare(gguf_models.llama(), ["q_proj"], TWO)
    for limit in (100, 1000, 2000):  # in the header and in the tensors
        with full_disk(limit), folders.refused("out` cannot be written"):
            write_gguf_adapter(folders.adapter, folders.base, folders.out)


def test_the_package_is_named(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(folders, "pip install gguf")
