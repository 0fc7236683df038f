"""Random models in the shapes of known ones, which need no weights from elsewhere."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel


@dataclass(frozen=True)
class Shape:
    """Sizes of a random model. `key_value_heads`: None for as many as query heads."""

    kind: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int | None = None

    @property
    def query_value(self) -> tuple[str, str]:
        """The names of its query and value linears."""
        return ("query", "value") if self.kind == "bert" else ("q_proj", "v_proj")


_SMALL_SIZES = {"hidden": 64, "intermediate": 128, "layers": 2, "heads": 4}
SHAPES = {
    "MiniLM-shaped": Shape("bert", 384, 1536, 6, 12),
    "SmolLM2-shaped": Shape("llama", 576, 1536, 30, 9, 3),
    "Llama-shaped, 1B": Shape("llama", 2048, 8192, 16, 32, 8),
}
"""The shapes of MiniLM-L6, SmolLM2-135M and Llama 3.2 1B without their vocabularies, and for each of them one of the
same kind with two small layers."""
SMALL = ", small"
SHAPES |= {
    f"{name}{SMALL}": replace(shape, **_SMALL_SIZES, key_value_heads=shape.key_value_heads and 2)
    for name, shape in SHAPES.items()
}


def random_model(shape: Shape) -> nn.Module:
    """Returns a model on the default device, in evaluation mode, without head and dropout, with 128 token ids."""
    torch.manual_seed(0)
    if shape.kind == "llama":
        config = llama_config(
            shape.hidden,
            shape.intermediate,
            shape.layers,
            shape.heads,
            num_key_value_heads=shape.key_value_heads or shape.heads,
            vocab_size=128,
            use_cache=False,
        )
        return LlamaModel(config).eval()
    sizes = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate}
    numbers = {"num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "vocab_size": 128}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(**sizes, **numbers, **no_dropout), add_pooling_layer=False).eval()


def llama_config(hidden: int, intermediate: int, layers: int, heads: int, **others: Any) -> LlamaConfig:
    """Returns the configuration of a Llama, by default with as many key and value heads as query heads."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=others.pop("num_key_value_heads", heads),
        **others,
    )
