"""The inputs and outputs of a decoder's graph with a key-value cache, as optimum and onnxruntime-genai call them.

    input_ids (batch, sequence), attention_mask (batch, past + sequence), position_ids (batch, sequence),
    past_key_values.N.key and .value (batch, heads, past, head_dim)
    → logits (batch, sequence, vocabulary), present.N.key and .value (batch, heads, past + sequence, head_dim)

The decoder of an encoder-decoder model has `encoder_attention_mask` and the keys and values of its cross-attention
beside: `past_key_values.N.decoder.key` and `past_key_values.N.encoder.key`. The latter come from the encoder's graph,
as `present.N.encoder.key`, and stay as they are.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

TOKENS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
ENCODER_MASK = "encoder_attention_mask"
PAST_AXIS, TOTAL_AXIS, SOURCE_AXIS = "past_sequence", "total_sequence", "encoder_sequence"
"""Dynamic axes: earlier tokens, earlier and new ones, tokens of the encoder; new ones are `sequence`."""

_PAST, _PRESENT = "past_key_values.", "present."
_CROSS = ".encoder."

PAST_PATTERN, PRESENT_PATTERN = f"{_PAST}%d.%s", f"{_PRESENT}%d.%s"
"""Layer, and "key" or "value"."""


def past_names(layers: int, part: str = "") -> list[str]:
    """The names of a cache's tensors, key and value of each layer; `part`: "decoder." or "encoder."."""
    return [PAST_PATTERN % (layer, part + kind) for layer in range(layers) for kind in ("key", "value")]


def is_past(name: str) -> bool:
    """Whether this input is a tensor of the cache."""
    return name.startswith(_PAST)


def is_cross(name: str) -> bool:
    """Whether it is one of what a decoder attends to in its encoder: no token adds to it."""
    return _CROSS in name


def has_cache(names: Iterable[str]) -> bool:
    """Whether the inputs of a graph hold a cache."""
    return any(map(is_past, names))


def present_of(past: str) -> str:
    """The output that follows an input: the cache with the new tokens in it."""
    return _PRESENT + past.removeprefix(_PAST)


def past_of(present: str) -> str:
    """The input that takes an output of the step before."""
    return _PAST + present.removeprefix(_PRESENT)


def next_past(outputs: Mapping[str, T]) -> dict[str, T]:
    """The cache in the outputs of a step, by the names of the inputs that take it."""
    return {past_of(name): value for name, value in outputs.items() if is_present(name)}


def is_present(name: str) -> bool:
    """Whether this output is a tensor of the cache."""
    return name.startswith(_PRESENT)
