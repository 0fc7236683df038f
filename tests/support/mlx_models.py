"""Tiny models that both transformers and mlx_lm have, and their logits in mlx_lm on the CPU."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

IDS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(7))
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER = _TOKENS | {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_ctx": 64} | _TOKENS
_WIDE = _DECODER | {"head_dim": 16}
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SIZES: dict[str, dict[str, Any]] = {
    "Cohere2ForCausalLM": _DECODER | {"sliding_window": 16, "num_hidden_layers": 4},
    "CohereForCausalLM": _DECODER,
    "Ernie4_5ForCausalLM": _DECODER,
    "GPT2LMHeadModel": _GPT,
    "GPTJForCausalLM": _GPT | {"rotary_dim": 4, "pad_token_id": None},
    "GPTNeoXForCausalLM": _DECODER | {"intermediate_size": 128, "num_attention_heads": 2},
    "Gemma2ForCausalLM": _WIDE | {"query_pre_attn_scalar": 16},
    "Gemma3ForCausalLM": _WIDE | {"query_pre_attn_scalar": 16, "num_hidden_layers": 6},
    "GemmaForCausalLM": _WIDE,
    "Glm4ForCausalLM": _WIDE,
    "GraniteForCausalLM": _DECODER,
    "HeliumForCausalLM": _DECODER | {"head_dim": 8},
    "LlamaForCausalLM": _DECODER,
    "MistralForCausalLM": _DECODER,
    "MixtralForCausalLM": _DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "NemotronForCausalLM": _DECODER,
    "Olmo2ForCausalLM": _DECODER,
    "OlmoeForCausalLM": _DECODER | {"num_experts": 4, "num_experts_per_tok": 2},
    "Phi3ForCausalLM": _DECODER,
    "PhiForCausalLM": _DECODER,
    "Qwen2ForCausalLM": _DECODER,
    "Qwen2MoeForCausalLM": _DECODER | _MIXTURE | {"shared_expert_intermediate_size": 40, "norm_topk_prob": False},
    "Qwen3ForCausalLM": _WIDE,
    "Qwen3MoeForCausalLM": _WIDE | _MIXTURE,
    "SeedOssForCausalLM": _WIDE,
    "SmolLM3ForCausalLM": _DECODER,
    "Starcoder2ForCausalLM": _DECODER,
}
CLASSES = tuple(_SIZES)
OTHERWISE_IN_MLX = ("GPTNeoXForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM", "Starcoder2ForCausalLM")
"""The logits of their bases differ by 1e-4 between mlx_lm and transformers."""


def model_of(class_name: str, **sizes: Any) -> Any:
    """Returns a model with random weights, large enough that every site changes its logits."""
    torch.manual_seed(0)
    model_class = getattr(hf, class_name)
    model = model_class(model_class.config_class(**_SIZES[class_name] | sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def save_base(model: Any, folder: Path) -> None:
    """Saves a checkpoint that mlx_lm reads: GPT-2 without the prefix, as it is published, and rope's values in the
    places where configurations of transformers 4 have them.
    """
    (model.transformer if isinstance(model, hf.GPT2LMHeadModel) else model).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    theta, share = rope.get("rope_theta"), rope.get("partial_rotary_factor")
    found = {"rope_theta": theta, "rotary_emb_base": theta, "partial_rotary_factor": share, "rotary_pct": share}
    found["n_ctx"] = config.get("n_positions")
    found["num_experts"] = config.get("num_experts") or config.get("num_local_experts")
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None} | config))


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.numpy()


def mlx_logits(base: Path, adapter: Path | None = None) -> np.ndarray:
    """Returns the logits of a base folder in mlx_lm, with an MLX adapter folder if there is one."""
    skip_without_mlx()
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(base)
    if adapter is not None:
        load_adapters(model, str(adapter))
    model.eval()
    return np.array(model(mx.array(IDS.numpy())))


def skip_without_mlx() -> None:
    """Skips the test if MLX cannot be imported."""
    for name in ("mlx.core", "mlx_lm"):
        pytest.importorskip(name, reason=f"{name} is missing: pip install mlx[cpu] mlx-lm", exc_type=ImportError)


def error_of(actual: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference relative to the largest logit."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
