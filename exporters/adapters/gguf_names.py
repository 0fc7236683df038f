"""The names that llama.cpp's converter gives to the weights of each architecture, and the order of their rows.

llama.cpp has a Python converter for each class of transformers. It renames most weights and leaves their values
unchanged. It reorders the rows of some weights, and the rows of an adapter's B must be reordered in the same way.
"""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from melora_fx import MELoRAError

REMEDY = "fold the adapter into the base (`melora-fx fold`) and convert the folded model"

RowOrder = Callable[[Mapping[str, Any], int], torch.Tensor]
"""(config.json, number of rows) → for each row in llama.cpp, the index of this row in the Hugging Face weight."""


@dataclass(frozen=True)
class Conversion:
    """How llama.cpp's converter treats one class of transformers.

    Attributes:
        architecture: llama.cpp's name of the architecture.
        row_orders: last part of a weight's name in llama.cpp → the order of its rows, for the weights whose rows move.
        has_experts: whether the stacks of gates and ups (E, 2·O, I) and of downs (E, O, I) become three stacks, one
            each for gates, ups and downs.
    """

    architecture: str
    row_orders: Mapping[str, RowOrder] = field(default_factory=dict)
    has_experts: bool = False


@dataclass(frozen=True)
class Place:
    """The place of an update in llama.cpp.

    Attributes:
        name: the name of the weight in llama.cpp.
        rows: for each of its rows, the index of this row in the Hugging Face weight.
    """

    name: str
    rows: torch.Tensor


def conversion_of(config: Mapping[str, Any], folder: Any) -> Conversion:
    """Returns how llama.cpp's converter treats the model that a config.json describes.

    Raises:
        MELoRAError: if the config.json names no class, or a class that is not in `CONVERSIONS`; the text says why if
            the reason is known.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str):
        raise MELoRAError(f"`{folder}/config.json` names no class in `architectures`, which llama.cpp needs")
    if name in CONVERSIONS:
        return CONVERSIONS[name]
    if name in REARRANGED:
        raise MELoRAError(f"llama.cpp's conversion of {name} rearranges {REARRANGED[name]}: {REMEDY}")
    raise MELoRAError(
        f"`{folder}` holds a {name}, and how llama.cpp converts its weights is not known: {REMEDY}; known classes are "
        f"{', '.join(CONVERSIONS)}"
    )


def places_of(
    weight: str, num_rows: int, conversion: Conversion, config: Mapping[str, Any], *, is_stack: bool
) -> list[Place]:
    """Returns the places of a weight's update in llama.cpp: one weight, or two for the gates and ups of experts.

    Args:
        weight: the name of the weight in the checkpoint.
        num_rows: O of one matrix.
        conversion, config: the conversion and the config.json of the model.
        is_stack: whether the weight is a stack (E, O, I).

    Raises:
        MELoRAError: if the place of the weight in llama.cpp is not known, or the weight does not fit the configuration.
    """
    if is_stack:
        return _expert_places(weight, num_rows, conversion)
    name = _known_name(weight, conversion.architecture)
    if name is None:
        raise MELoRAError(f"llama.cpp's {conversion.architecture} has no tensor for it")
    order = conversion.row_orders.get(name.rpartition(".")[2])
    try:
        rows = torch.arange(num_rows) if order is None else order(config, num_rows)
    except (ValueError, RuntimeError, TypeError) as error:
        raise MELoRAError(f"config.json has no number of heads for its {num_rows} rows: {error}") from error
    return [Place(f"{name}.weight", rows)]


def _known_name(weight: str, architecture: str) -> str | None:
    """Returns a weight's name in llama.cpp without the ending `.weight`, or None if llama.cpp does not know it."""
    layer = re.search(r"(?<=\.)\d+(?=\.)", weight)
    in_first = weight if layer is None else f"{weight[: layer.start()]}0{weight[layer.end() :]}"
    name: str | None = _names(architecture).get_name(in_first.removesuffix(".weight"))
    if name is None or layer is None:
        return name
    return name.replace("blk.0.", f"blk.{int(layer[0])}.", 1)


@functools.cache
def _names(architecture: str) -> Any:
    """Returns the names of the weights of a model with one layer."""
    from gguf import MODEL_ARCH_NAMES, TensorNameMap

    arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise MELoRAError(f"the package gguf does not know {architecture}: pip install --upgrade gguf")
    # a new class: for some architectures a map changes its class's table, which would affect later maps
    table = {"block_mappings_cfg": dict(TensorNameMap.block_mappings_cfg)}
    return type("Names", (TensorNameMap,), table)(arch, 1)


def _expert_places(weight: str, num_rows: int, conversion: Conversion) -> list[Place]:
    found = re.search(r"\.layers\.(\d+)\..*experts\.(gate_up_proj|down_proj)$", weight)
    if found is None or not conversion.has_experts:
        raise MELoRAError(f"the place of this stack in llama.cpp's {conversion.architecture} is not known")
    rows = torch.arange(num_rows)
    if found[2] == "down_proj":
        return [Place(f"blk.{found[1]}.ffn_down_exps.weight", rows)]
    gate, up = rows.chunk(2)
    return [Place(f"blk.{found[1]}.ffn_gate_exps.weight", gate), Place(f"blk.{found[1]}.ffn_up_exps.weight", up)]


def _interleaved(*heads: str) -> RowOrder:
    """Returns an order that alternates between the rows of the two halves of each head, which rotary embeddings pair.

    `heads`: the entries of config.json that may contain the number of heads; the first one that does is used.
    """

    def order(config: Mapping[str, Any], num_rows: int) -> torch.Tensor:
        return torch.arange(num_rows).view(_number(config, *heads), 2, -1).mT.reshape(-1)

    return order


def _by_part(*heads: str) -> RowOrder:
    """Returns an order with all of q, then all of k, then all of v, for weights that store q, k and v head by head."""

    def order(config: Mapping[str, Any], num_rows: int) -> torch.Tensor:
        return _ungrouped(num_rows, _number(config, *heads), 1)

    return order


def _falcon_rows(config: Mapping[str, Any], num_rows: int) -> torch.Tensor:
    """Orders the rows as `_by_part` does, for weights in which each group of query heads has one k and one v."""
    heads = _number(config, "num_attention_heads", "n_head")
    size = _number(config, "hidden_size") // heads
    groups = (num_rows // size - heads) // 2
    return _ungrouped(num_rows, groups, heads // groups)


def _ungrouped(num_rows: int, groups: int, queries: int) -> torch.Tensor:
    grouped = torch.arange(num_rows).view(groups, queries + 2, -1)
    return torch.cat([grouped[:, :-2].reshape(-1), grouped[:, -2].reshape(-1), grouped[:, -1].reshape(-1)])


def _number(config: Mapping[str, Any], *names: str) -> int:
    """Returns the first of these entries that is a positive integer; raises ValueError if none is."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise ValueError(f"no {' or '.join(names)}")


_HEADS = ("num_attention_heads",)
_ROTARY = {
    "attn_q": _interleaved(*_HEADS),
    "attn_k": _interleaved("num_key_value_heads", *_HEADS),
}

CONVERSIONS: dict[str, Conversion] = {
    "LlamaForCausalLM": Conversion("llama", _ROTARY),
    "MistralForCausalLM": Conversion("llama", _ROTARY),
    "MixtralForCausalLM": Conversion("llama", _ROTARY, has_experts=True),
    "ArceeForCausalLM": Conversion("arcee", _ROTARY),
    "GraniteForCausalLM": Conversion("granite", _ROTARY),
    "SmolLM3ForCausalLM": Conversion("smollm3", _ROTARY),
    "OlmoForCausalLM": Conversion("olmo", _ROTARY),
    "Olmo2ForCausalLM": Conversion("olmo2"),
    "Olmo3ForCausalLM": Conversion("olmo2"),
    "Qwen2ForCausalLM": Conversion("qwen2"),
    "Qwen2MoeForCausalLM": Conversion("qwen2moe", has_experts=True),
    "Qwen3ForCausalLM": Conversion("qwen3"),
    "Qwen3MoeForCausalLM": Conversion("qwen3moe", has_experts=True),
    "GemmaForCausalLM": Conversion("gemma"),
    "Gemma2ForCausalLM": Conversion("gemma2"),
    "Gemma3ForCausalLM": Conversion("gemma3"),
    "Phi3ForCausalLM": Conversion("phi3"),
    "StableLmForCausalLM": Conversion("stablelm"),
    "CohereForCausalLM": Conversion("command-r"),
    "Exaone4ForCausalLM": Conversion("exaone4"),
    "Glm4ForCausalLM": Conversion("glm4"),
    "NemotronForCausalLM": Conversion("nemotron"),
    "SeedOssForCausalLM": Conversion("seed_oss"),
    "Starcoder2ForCausalLM": Conversion("starcoder2"),
    "GPT2LMHeadModel": Conversion("gpt2"),
    "GPTNeoXForCausalLM": Conversion("gptneox", {"attn_qkv": _by_part(*_HEADS)}),
    "BloomForCausalLM": Conversion("bloom", {"attn_qkv": _by_part("n_head", *_HEADS)}),
    "FalconForCausalLM": Conversion("falcon", {"attn_qkv": _falcon_rows}),
}
"""Class of transformers → what llama.cpp's converter does with it.

Each class was tested with a small base (October 2026): llama.cpp's converter converted the base, and llama.cpp with an
adapter on all linears computed the same as the folded model.
"""

REARRANGED = {
    "DeepseekV2ForCausalLM": "kv_b_proj, which it splits and transposes",
    "DeepseekV3ForCausalLM": "kv_b_proj, which it splits and transposes",
    "Qwen3NextForCausalLM": "in_proj_qkvz, whose columns it reorders",
    "GptOssForCausalLM": "the experts, whose rows alternate between gates and ups",
    "DbrxForCausalLM": "the experts, which it transposes",
    "Llama4ForCausalLM": "the experts, which it transposes",
}
"""Classes known to need more than new names and row orders → what llama.cpp rearranges."""
