"""Builds the step with which a decoder is translated: new tokens follow a past, and one text is padded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from exporters.onnx_files.cache_names import (
    ENCODER_MASK,
    MASK,
    PAST_AXIS,
    POSITIONS,
    SOURCE_AXIS,
    TOKENS,
    TOTAL_AXIS,
    is_cross,
    is_past,
    is_present,
    next_past,
)

from .flat_cache import flat_cache, takes_positions

_LEAST_TOKENS = 5
"""Minimum length of an example text: several past and several new tokens, which differ in number."""


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Returns the position of each token among those of its text that are not padding; both (batch, sequence)."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def example_step(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the inputs of a step by name, built from example texts whose first tokens are the past.

    Args:
        model: a decoder that has a cache.
        inputs: `input_ids` and, if there is padding, `attention_mask`; at least two rows.
    """
    tokens, mask = padded_texts(inputs[TOKENS], inputs.get(MASK))
    positions = {POSITIONS: positions_of(mask)} if takes_positions(model) else {}
    split = tokens.size(1) - (tokens.size(1) - 1) // 2
    before = {TOKENS: tokens[:, :split], MASK: mask[:, :split]} | {n: p[:, :split] for n, p in positions.items()}
    with torch.no_grad(), flat_cache(model):
        outputs = model(**before)
    past = {name: value.clone() for name, value in next_past(outputs).items()}
    step = {TOKENS: tokens[:, split:], MASK: mask} | {name: value[:, split:] for name, value in positions.items()}
    return {name: value.contiguous() for name, value in step.items()} | past


def padded_texts(tokens: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids and mask, long enough for an example, the first text padded: graphs drop masks of ones."""
    repeats = -(-_LEAST_TOKENS // tokens.size(1))
    mask = torch.ones_like(tokens) if mask is None else mask
    tokens, mask = tokens.long().repeat(1, repeats), mask.long().repeat(1, repeats)
    mask[0, 0] = 0
    mask[:, -1] = 1
    return tokens, mask


def step_axes(name: str) -> dict[int, str]:
    """Returns the names of the dynamic axes of a step's input or output, by index."""
    if is_cross(name):
        return {0: "batch", 2: SOURCE_AXIS}
    if is_past(name):
        return {0: "batch", 2: PAST_AXIS}
    if is_present(name):
        return {0: "batch", 2: TOTAL_AXIS}
    if name == ENCODER_MASK:
        return {0: "batch", 1: SOURCE_AXIS}
    return {0: "batch", 1: TOTAL_AXIS if name == MASK else "sequence"}
