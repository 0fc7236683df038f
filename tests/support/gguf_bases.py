"""Small models of further architectures as GGUF files: names from gguf's own table, rows of weights in the order of
llama.cpp's converter.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from support.gguf_models import SIZES, add_vocabulary, spread

Rows = Callable[[str, torch.Tensor], torch.Tensor]


def _as_it_is(name: str, value: torch.Tensor) -> torch.Tensor:
    return value


def _by_kind(name: str, value: torch.Tensor) -> torch.Tensor:
    """Reorders q, k and v: GPT-NeoX and BLOOM have them head by head, llama.cpp has all q first."""
    if "query_key_value" not in name:
        return value
    heads = SIZES["num_attention_heads"]
    return value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _rotated(name: str, value: torch.Tensor) -> torch.Tensor:
    """Reorders rows: rotary embeddings pair neighbouring rows in llama.cpp, the halves of a head in transformers."""
    kinds = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    kind = kinds.get(name.split(".")[-2])
    return value if kind is None else value.unflatten(0, (SIZES[kind], 2, -1)).transpose(1, 2).flatten(0, 2)


def _above_one(name: str, value: torch.Tensor) -> torch.Tensor:
    """Adds 1 to the weights of norms: Gemma's and Nemotron's norms multiply by 1 plus the weight."""
    return value + 1 if "norm" in name and name.endswith("weight") else value


@dataclass(frozen=True)
class Base:
    """A model of one class.

    Attributes:
        class_name: transformers' class.
        architecture: llama.cpp's name for it.
        options: options of its configuration.
        settings: metadata of the file in addition to the sizes: method of the writer → its argument.
        targets: the targets of the adapter.
        rows: reorders the rows of a weight for llama.cpp.
        bound: the largest difference in log probabilities.
    """

    class_name: str
    architecture: str
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    targets: Any = "all-linear"
    rows: Rows = _as_it_is
    bound: float = 2e-5

    def build(self) -> Any:
        """Returns the model with random weights."""
        model_class = getattr(hf, self.class_name)
        return spread(model_class, model_class.config_class(**(SIZES | self.options)))

    def write(self, model: Any, path: Path) -> None:
        """Writes the GGUF file in float32."""
        import gguf

        config = model.config
        writer = gguf.GGUFWriter(path, self.architecture)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {}
        rope = rope.get("full_attention", rope)  # one entry for each kind of layers
        sizes = {
            "context_length": SIZES["max_position_embeddings"],
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "head_count": config.num_attention_heads,
            "head_count_kv": getattr(config, "num_key_value_heads", None),
            "feed_forward_length": getattr(config, "intermediate_size", 4 * config.hidden_size),
            "rope_freq_base": rope.get("rope_theta"),
            "key_length": head_size,
            "value_length": head_size,
            "rope_dimension_count": int(head_size * rope.get("partial_rotary_factor", 1)),
        }
        for name, value in (sizes | self.settings).items():
            if value is not None:
                getattr(writer, f"add_{name}")(value)
        add_vocabulary(writer)
        for name, value in self._tensors(model):
            writer.add_tensor(name, value.detach().float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _tensors(self, model: Any) -> list[tuple[str, torch.Tensor]]:
        import gguf

        architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = gguf.TensorNameMap(architecture, model.config.num_hidden_layers)
        found, endings = [], (".weight", ".bias")
        for name, value in model.state_dict().items():
            block = re.sub(r"\D*(\d+).*", r"\1", name)
            if name.endswith("experts.gate_up_proj"):
                gate, up = value.chunk(2, 1)
                found += [(f"blk.{block}.ffn_gate_exps.weight", gate), (f"blk.{block}.ffn_up_exps.weight", up)]
            elif name.endswith("experts.down_proj"):
                found.append((f"blk.{block}.ffn_down_exps.weight", value))
            elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
                candidates = (name, name.removeprefix("transformer."))
                there = next(filter(None, (names.get_name(each, endings) for each in candidates)), None)
                assert there is not None, name
                found.append((there, self.rows(name, value)))
        return found


_RMS = {"layer_norm_rms_eps": 1e-6}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
BASES = [
    Base("Qwen2ForCausalLM", "qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}, _RMS),
    Base("Qwen3ForCausalLM", "qwen3", {"head_dim": 16, "num_key_value_heads": 1}, _RMS),
    Base("Olmo2ForCausalLM", "olmo2", {"rms_norm_eps": 1e-6}, _RMS),
    Base("Phi3ForCausalLM", "phi3", {"rms_norm_eps": 1e-6}, _RMS | {"sliding_window": 0}),
    Base(
        "Qwen3MoeForCausalLM",
        "qwen3moe",
        {"head_dim": 16, **_EXPERTS},
        _RMS | {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24},
    ),
    Base("CohereForCausalLM", "command-r", {"logit_scale": 0.5}, {"layer_norm_eps": 1e-5, "logit_scale": 0.5}),
    Base("MistralForCausalLM", "llama", {"sliding_window": None}, _RMS, rows=_rotated),
    Base(
        "GraniteForCausalLM",
        "granite",
        {"attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 3.0},
        _RMS | {"attention_scale": 0.3, "embedding_scale": 2.0, "residual_scale": 0.5, "logit_scale": 3.0},
        rows=_rotated,
    ),
    Base("OlmoForCausalLM", "olmo", {}, {"layer_norm_eps": 1e-5}, rows=_rotated),
    Base("ArceeForCausalLM", "arcee", {"rms_norm_eps": 1e-6}, _RMS, rows=_rotated),
    Base("SmolLM3ForCausalLM", "smollm3", {"no_rope_layers": [1, 1]}, _RMS, rows=_rotated),
    Base(
        "StableLmForCausalLM",
        "stablelm",
        {
            "layer_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
        {"layer_norm_eps": 1e-5, "parallel_residual": False},
    ),
    Base(
        "GemmaForCausalLM",
        "gemma",
        {"head_dim": 12, "hidden_activation": "gelu_pytorch_tanh"},
        _RMS,
        rows=_above_one,
        bound=2e-3,
    ),
    Base(
        "Gemma2ForCausalLM",
        "gemma2",
        {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 64},
        _RMS | {"sliding_window": 64, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        rows=_above_one,
        bound=2e-3,
    ),
    Base("Glm4ForCausalLM", "glm4", {"head_dim": 12, "rms_norm_eps": 1e-6}, _RMS),
    Base(
        "NemotronForCausalLM", "nemotron", {"norm_eps": 1e-5, "head_dim": 12}, {"layer_norm_eps": 1e-5}, rows=_above_one
    ),
    Base("SeedOssForCausalLM", "seed_oss", {"head_dim": 12, "rms_norm_eps": 1e-6}, _RMS),
    Base(
        "Exaone4ForCausalLM",
        "exaone4",
        {"rms_norm_eps": 1e-6, "sliding_window": None, "layer_types": ["full_attention"] * 2},
        _RMS,
    ),
    Base("Olmo3ForCausalLM", "olmo2", {"rms_norm_eps": 1e-6, "layer_types": ["full_attention"] * 2}, _RMS),
    Base(
        "Qwen2MoeForCausalLM",
        "qwen2moe",
        _EXPERTS | {"norm_topk_prob": False, "shared_expert_intermediate_size": 36},
        _RMS
        | {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 24,
            "expert_shared_feed_forward_length": 36,
        },
        targets=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"],
    ),
    Base(
        "Gemma3ForCausalLM",
        "gemma3",
        {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2},
        _RMS | {"sliding_window": 64},
        rows=_above_one,
        bound=2e-3,
    ),
    Base(
        "BloomForCausalLM",
        "bloom",
        {"n_layer": 2, "n_head": 4},
        {"layer_norm_eps": 1e-5, "rope_dimension_count": None, "head_count_kv": 4, "feed_forward_length": 192},
        rows=_by_kind,
        bound=2e-3,
    ),
    Base(
        "FalconForCausalLM",
        "falcon",
        {"new_decoder_architecture": False, "multi_query": True, "alibi": False, "bias": False},
        {"layer_norm_eps": 1e-5, "head_count_kv": 1, "feed_forward_length": 192},
        bound=2e-3,
    ),
    Base(
        "Starcoder2ForCausalLM",
        "starcoder2",
        {"norm_epsilon": 1e-5, "sliding_window": None, "hidden_act": "gelu_pytorch_tanh"},
        {"layer_norm_eps": 1e-5},
        bound=2e-3,  # ggml's GELU is a float16 table, here and below
    ),
    Base(
        "GPTNeoXForCausalLM",
        "gptneox",
        {
            "num_key_value_heads": 4,
            "use_parallel_residual": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
        {"layer_norm_eps": 1e-5, "parallel_residual": False},
        rows=_by_kind,
        bound=2e-3,
    ),
]
