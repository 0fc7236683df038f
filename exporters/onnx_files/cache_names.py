"""Names the inputs and outputs of a decoder's graph with a key-value cache, as optimum and onnxruntime-genai do.

    input_ids (batch, sequence), attention_mask (batch, past + sequence), position_ids (batch, sequence),
    past_key_values.N.key and .value (batch, heads, past, head_dim)
    → logits (batch, sequence, vocabulary), present.N.key and .value (batch, heads, past + sequence, head_dim)

The decoder of an encoder-decoder model also has `encoder_attention_mask`, and two kinds of keys and values: its own,
`past_key_values.N.decoder.key`, and those of its cross-attention, `past_key_values.N.encoder.key`. The latter come from
the encoder's graph, as `present.N.encoder.key`, and do not change.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

TOKENS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
ENCODER_MASK = "encoder_attention_mask"
PAST_AXIS, TOTAL_AXIS, SOURCE_AXIS = "past_sequence", "total_sequence", "encoder_sequence"
"""Dynamic axes: past tokens, past and new tokens, the encoder's tokens; the axis of new tokens is `sequence`."""

_PAST, _PRESENT = "past_key_values.", "present."
_CROSS = ".encoder."

PAST_PATTERN, PRESENT_PATTERN = f"{_PAST}%d.%s", f"{_PRESENT}%d.%s"
"""Patterns to fill with the layer, and "key" or "value"."""


def past_names(layers: int, part: str = "") -> list[str]:
    """Returns the names of a cache's tensors, key and value of each layer; `part`: "", "decoder." or "encoder."."""
    return [PAST_PATTERN % (layer, part + kind) for layer in range(layers) for kind in ("key", "value")]


def is_past(name: str) -> bool:
    """Returns whether an input is a tensor of the cache."""
    return name.startswith(_PAST)


def is_cross(name: str) -> bool:
    """Returns whether a tensor of the cache belongs to the cross-attention, so that new tokens do not extend it."""
    return _CROSS in name


def has_cache(names: Iterable[str]) -> bool:
    """Returns whether the inputs of a graph include a cache."""
    return any(map(is_past, names))


def present_of(past: str) -> str:
    """Returns the output that contains an input of the cache extended with the new tokens."""
    return _PRESENT + past.removeprefix(_PAST)


def past_of(present: str) -> str:
    """Returns the input that accepts an output of the previous step."""
    return _PAST + present.removeprefix(_PRESENT)


def next_past(outputs: Mapping[str, T]) -> dict[str, T]:
    """Returns the cache in the outputs of a step, by the names of the inputs that accept it."""
    return {past_of(name): value for name, value in outputs.items() if is_present(name)}


def is_present(name: str) -> bool:
    """Returns whether an output is a tensor of the cache."""
    return name.startswith(_PRESENT)
