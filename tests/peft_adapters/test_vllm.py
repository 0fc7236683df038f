"""vLLM's own models and loader, compared with `check_for_vllm`; without a GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from support.fold_folders import llama
from support.models import bert, bert_classifier, fill, gpt2
from support.vllm_runs import read_by_vllm

import melora_fx
from exporters import write_peft_adapter
from exporters.adapters.lora_form import loras_of
from exporters.peft_adapters.vllm import RANKS, check_for_vllm
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.saving.adapter import Adapter
from melora_fx.saving.adapter_file import read_adapter

pytestmark = pytest.mark.slow

BLOCKS = MELoRAConfig(rank=(2, 1, 2), num_blocks=3, alpha=(3.0, 1.0, 2.0))
LAYER = "model.layers.0."


def written(folder: Path, model: Any, targets: list[str]) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """Writes the base, our adapter on `targets` and PEFT's folder of it; returns the adapter and each site's update."""
    model.save_pretrained(folder / "model")
    melora_fx.save_adapter(fill(melora_fx.rewrite(model, targets, BLOCKS)), folder / "adapter")
    write_peft_adapter(folder / "adapter", folder / "peft")
    adapter = read_adapter(folder / "adapter")
    loras = {name: loras_of(adapter.tensors_of(name))[0] for name in adapter.configs}
    return adapter, {name: lora.lora_b @ lora.lora_a for name, lora in loras.items()}


def assert_holds(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Checks that vLLM's layers have these updates and no others."""
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        np.testing.assert_allclose(found[name].numpy(), update.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)


def test_llama_has_its_projections_packed(tmp_path: Path) -> None:
    adapter, updates = written(tmp_path, llama(), [r"re:model\.layers\.0\..*(q|v|o|up|down)_proj"])
    rank = check_for_vllm(adapter).max_lora_rank
    names = {
        "self_attn.q_proj": "self_attn.qkv_proj.0",
        "self_attn.v_proj": "self_attn.qkv_proj.2",
        "self_attn.o_proj": "self_attn.o_proj.0",
        "mlp.up_proj": "mlp.gate_up_proj.1",
        "mlp.down_proj": "mlp.down_proj.0",
    }
    result = read_by_vllm(tmp_path / "model", tmp_path / "peft", "--max-lora-rank", str(rank))
    assert (result["class"], result["error"], tuple(result["ranks"])) == ("LlamaForCausalLM", None, RANKS)
    assert_holds(result["updates"], {LAYER + new: updates[LAYER + old] for old, new in names.items()})


def test_a_smaller_flag_is_refused(tmp_path: Path) -> None:
    adapter, _ = written(tmp_path, llama(), ["q_proj"])
    assert check_for_vllm(adapter).max_lora_rank == 8
    result = read_by_vllm(tmp_path / "model", tmp_path / "peft", "--max-lora-rank", "1")
    assert "LoRA rank 5 is greater than max_lora_rank 1" in result["error"]


def test_a_classifier_of_bert(tmp_path: Path) -> None:
    adapter, updates = written(tmp_path, bert_classifier(num_layers=1), ["query", "key", r"re:.*intermediate\.dense"])
    check_for_vllm(adapter)
    layer = "bert.encoder.layer.0."
    names = {
        "attention.self.query": "attention.self.qkv_proj.0",
        "attention.self.key": "attention.self.qkv_proj.1",
        "intermediate.dense": "intermediate.dense.0",
    }
    result = read_by_vllm(tmp_path / "model", tmp_path / "peft", "--runner", "pooling")
    assert (result["class"], result["error"]) == ("BertForSequenceClassification", None)
    assert_holds(result["updates"], {layer + new: updates[layer + old] for old, new in names.items()})


def test_a_pooler_is_dropped_without_a_word(tmp_path: Path) -> None:
    adapter, updates = written(tmp_path, bert(num_layers=1), [r"re:.*(intermediate|pooler)\.dense"])
    with pytest.raises(MELoRAError, match=r"`pooler\.dense`, which vLLM silently drops"):
        check_for_vllm(adapter)
    result = read_by_vllm(tmp_path / "model", tmp_path / "peft", "--runner", "pooling")
    kept = "encoder.layer.0.intermediate.dense"
    assert result["error"] is None
    assert_holds(result["updates"], {f"model.{kept}.0": updates[kept]})


def test_a_model_without_adapters_does_not_start(tmp_path: Path) -> None:
    adapter, _ = written(tmp_path, gpt2(num_layers=1), ["c_attn"])
    with pytest.raises(MELoRAError, match="which vLLM serves without adapters"):
        check_for_vllm(adapter)
    assert "LoRA is not supported for GPT2LMHeadModel" in read_by_vllm(tmp_path / "model", tmp_path / "peft")["error"]
    assert (
        "received ['model.h.0.attn.c_attn'"
        in read_by_vllm(tmp_path / "model", tmp_path / "peft", "--model-impl", "transformers")["error"]
    )


def test_a_head_is_refused_for_other_models(tmp_path: Path) -> None:
    small = {"num_hidden_layers": 1, "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = hf.Qwen2Config(**small, intermediate_size=36, vocab_size=48, tie_word_embeddings=False)
    adapter, _ = written(tmp_path, hf.Qwen2ForCausalLM(config), ["q_proj", "lm_head"])
    assert check_for_vllm(adapter).notes[0].startswith("vLLM adapts `lm_head` only in models that name it")
    assert "but received ['lm_head', 'lm_head']" in read_by_vllm(tmp_path / "model", tmp_path / "peft")["error"]


def test_names_of_a_bare_model_are_left_out_where_text_is_generated(tmp_path: Path) -> None:
    adapter, _ = written(tmp_path, llama().model, ["q_proj"])
    assert "would load the adapter and ignore it" in check_for_vllm(adapter).notes[0]
    llama().save_pretrained(tmp_path / "model")
    result = read_by_vllm(tmp_path / "model", tmp_path / "peft")
    assert (result["class"], result["error"], result["updates"]) == ("LlamaForCausalLM", None, {})
