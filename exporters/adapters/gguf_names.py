"""What llama.cpp's converter makes of the weights of each architecture: the names, and the order of their rows.

llama.cpp has a converter in Python for each class of transformers. Most weights get another name and stay as they are;
some have their rows in another order there, and so has the B of an adapter.
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
"""(config.json, number of rows) → for each row in llama.cpp the row of the Hugging Face weight that it is."""


@dataclass(frozen=True)
class Conversion:
    """What becomes of one class of transformers.

    Attributes:
        architecture: its name in llama.cpp.
        row_orders: of the weights whose rows change their places, by the last part of their names there.
        has_experts: its stacks (E, 2·O, I) of gates and ups, and (E, O, I), become one stack each of gates, ups and
            downs.
    """

    architecture: str
    row_orders: Mapping[str, RowOrder] = field(default_factory=dict)
    has_experts: bool = False


@dataclass(frozen=True)
class Place:
    """Where an update stands in llama.cpp.

    Attributes:
        name: the weight's name there.
        rows: for each of its rows the one of the Hugging Face weight.
    """

    name: str
    rows: torch.Tensor


def conversion_of(config: Mapping[str, Any], folder: Any) -> Conversion:
    """What llama.cpp's converter does with the model that a config.json describes.

    Raises:
        MELoRAError: for an architecture that is not in `CONVERSIONS`; the text says why where that is known.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str):
        raise MELoRAError(f"`{folder}/config.json` names no class in `architectures`, by which llama.cpp converts it")
    if name in CONVERSIONS:
        return CONVERSIONS[name]
    if name in REARRANGED:
        raise MELoRAError(f"llama.cpp's conversion of {name} rearranges {REARRANGED[name]}: {REMEDY}")
    raise MELoRAError(
        f"`{folder}` holds a {name}, of which it is not known what llama.cpp makes of its weights: {REMEDY}; known are "
        f"{', '.join(CONVERSIONS)}"
    )


def places_of(
    weight: str, num_rows: int, conversion: Conversion, config: Mapping[str, Any], *, is_stack: bool
) -> list[Place]:
    """Where the update of a weight stands in llama.cpp: in one weight, or in two for gates and ups of experts.

    Args:
        weight: its name, as the checkpoint has it.
        num_rows: O, of one matrix.
        conversion, config: the model's.
        is_stack: whether it is (E, O, I).

    Raises:
        MELoRAError: for a weight that llama.cpp has under no name, or that does not fit the configuration.
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
    """A weight's name in llama.cpp, without its ending; None for one that it does not know."""
    layer = re.search(r"(?<=\.)\d+(?=\.)", weight)
    in_first = weight if layer is None else f"{weight[: layer.start()]}0{weight[layer.end() :]}"
    name: str | None = _names(architecture).get_name(in_first.removesuffix(".weight"))
    if name is None or layer is None:
        return name
    return name.replace("blk.0.", f"blk.{int(layer[0])}.", 1)


@functools.cache
def _names(architecture: str) -> Any:
    """The names of a model of one layer."""
    from gguf import MODEL_ARCH_NAMES, TensorNameMap

    arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise MELoRAError(f"the package gguf does not know {architecture}: pip install --upgrade gguf")
    # a class of its own: for some architectures the map changes its class's table, and so those that are made after it
    table = {"block_mappings_cfg": dict(TensorNameMap.block_mappings_cfg)}
    return type("Names", (TensorNameMap,), table)(arch, 1)


def _expert_places(weight: str, num_rows: int, conversion: Conversion) -> list[Place]:
    found = re.search(r"\.layers\.(\d+)\..*experts\.(gate_up_proj|down_proj)$", weight)
    if found is None or not conversion.has_experts:
        raise MELoRAError(f"it is not known where llama.cpp's {conversion.architecture} has this stack")
    rows = torch.arange(num_rows)
    if found[2] == "down_proj":
        return [Place(f"blk.{found[1]}.ffn_down_exps.weight", rows)]
    gate, up = rows.chunk(2)
    return [Place(f"blk.{found[1]}.ffn_gate_exps.weight", gate), Place(f"blk.{found[1]}.ffn_up_exps.weight", up)]


def _interleaved(*heads: str) -> RowOrder:
    """Row by row of the two halves of each head, which rotary embeddings pair.

    `heads`: where config.json has their number.
    """

    def order(config: Mapping[str, Any], num_rows: int) -> torch.Tensor:
        return torch.arange(num_rows).view(_number(config, *heads), 2, -1).mT.reshape(-1)

    return order


def _by_part(*heads: str) -> RowOrder:
    """All of q, then all of k, then all of v, where each head has its q, k and v side by side."""

    def order(config: Mapping[str, Any], num_rows: int) -> torch.Tensor:
        return _ungrouped(num_rows, _number(config, *heads), 1)

    return order


def _falcon_rows(config: Mapping[str, Any], num_rows: int) -> torch.Tensor:
    """As `_by_part`, but each group of query heads has one k and one v."""
    heads = _number(config, "num_attention_heads", "n_head")
    size = _number(config, "hidden_size") // heads
    groups = (num_rows // size - heads) // 2
    return _ungrouped(num_rows, groups, heads // groups)


def _ungrouped(num_rows: int, groups: int, queries: int) -> torch.Tensor:
    grouped = torch.arange(num_rows).view(groups, queries + 2, -1)
    return torch.cat([grouped[:, :-2].reshape(-1), grouped[:, -2].reshape(-1), grouped[:, -1].reshape(-1)])


def _number(config: Mapping[str, Any], *names: str) -> int:
    """The first of these entries that is there."""
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

Of each a small base was converted by the converter itself (October 2026), and llama.cpp computed with an adapter of all
of its linears what the folded model computes.
"""

REARRANGED = {
    "DeepseekV2ForCausalLM": "kv_b_proj, which it splits and transposes",
    "DeepseekV3ForCausalLM": "kv_b_proj, which it splits and transposes",
    "Qwen3NextForCausalLM": "in_proj_qkvz, whose columns it reorders",
    "GptOssForCausalLM": "the experts, whose gates and ups lie row by row",
    "DbrxForCausalLM": "the experts, which it transposes",
    "Llama4ForCausalLM": "the experts, which it transposes",
}
"""Those of which it is known that they need more than a name and an order of rows."""
