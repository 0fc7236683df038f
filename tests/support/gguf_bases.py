"""Small models of further architectures as GGUF files: names by gguf's own table, the rows of weights as llama.cpp's
converter leaves them.
"""

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
    """GPT-NeoX has q, k and v head by head; there all q come first."""
    if "query_key_value" not in name:
        return value
    heads = SIZES["num_attention_heads"]
    return value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True)
class Base:
    """A model of one class.

    Attributes:
        class_name: transformers'.
        architecture: llama.cpp's name of it.
        options: of its configuration.
        settings: what the file says beside the sizes: method of the writer → its argument.
        targets: what is adapted.
        rows: the order of a weight's rows there.
        bound: of differences in log probabilities.
    """

    class_name: str
    architecture: str
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    targets: Any = "all-linear"
    rows: Rows = _as_it_is
    bound: float = 2e-5

    def build(self) -> Any:
        """With random weights."""
        model_class = getattr(hf, self.class_name)
        return spread(model_class, model_class.config_class(**(SIZES | self.options)))

    def write(self, model: Any, path: Path) -> None:
        """The file, in float32."""
        import gguf

        config = model.config
        writer = gguf.GGUFWriter(path, self.architecture)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        sizes = {
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "head_count": config.num_attention_heads,
            "head_count_kv": config.num_key_value_heads,
            "feed_forward_length": config.intermediate_size,
            "rope_freq_base": config.rope_parameters["rope_theta"],
            "key_length": head_size,
            "value_length": head_size,
            "rope_dimension_count": int(head_size * config.rope_parameters.get("partial_rotary_factor", 1)),
        }
        for name, value in (sizes | self.settings).items():
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
        found = []
        for name, value in model.state_dict().items():
            block = name.partition("layers.")[2].partition(".")[0]
            if name.endswith("experts.gate_up_proj"):
                gate, up = value.chunk(2, 1)
                found += [(f"blk.{block}.ffn_gate_exps.weight", gate), (f"blk.{block}.ffn_up_exps.weight", up)]
            elif name.endswith("experts.down_proj"):
                found.append((f"blk.{block}.ffn_down_exps.weight", value))
            elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
                there = names.get_name(name, try_suffixes=(".weight", ".bias"))
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
