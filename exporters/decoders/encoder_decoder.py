"""Splits an encoder-decoder model's forward in two: the part computed once per text, and the part for each step.

    encoder  forward(input_ids, attention_mask) → {last_hidden_state, present.N.encoder.key, …}
    decoder  forward(input_ids, encoder_attention_mask, past_key_values.N.decoder.key, …, past_key_values.N.encoder.key,
             …) → {logits, present.N.decoder.key, …}

The keys and values of the cross-attention are computed once, in the encoder's graph. The adapters of their projections
are in that graph too.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from exporters.hugging_face import first_setting, is_hugging_face_model
from exporters.onnx_files.cache_names import (
    ENCODER_MASK,
    LOGITS,
    MASK,
    TOKENS,
    is_cross,
    is_past,
    next_past,
)
from exporters.private import cache_argument, cache_of_both, is_plain_cache, returned_cache

from .flat_cache import dotted, named_cache, patched_forward

_STARTS = "decoder_input_ids"
_PAST_TOKENS, _NEW_TOKENS = 3, 2
"""Numbers of the decoder's tokens in the example."""


def pair_misfit(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Returns why an encoder-decoder model cannot be exported as two graphs, in words; None if it can."""
    if not is_hugging_face_model(model) or not model.can_generate():
        return f"`{type(model).__name__}` is not a transformers model that generates"
    if TOKENS not in inputs:
        return f"`example_inputs` has no `{TOKENS}`"
    if others := [name for name in inputs if name not in (TOKENS, MASK, _STARTS)]:
        return f"`example_inputs` has {', '.join(f'`{name}`' for name in others)} in addition to the tokens"
    parameters = inspect.signature(model.forward).parameters
    if cache_argument(model) is None or not {MASK, _STARTS, "encoder_outputs"} <= parameters.keys():
        return (
            f"`{type(model).__name__}.forward` must accept a cache, `attention_mask`, `{_STARTS}` and `encoder_outputs`"
        )
    if start_token(model) is None:
        return "its configuration has no `decoder_start_token_id`"
    tokens = torch.zeros((1, 2), dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            cache = returned_cache(model(**{TOKENS: tokens, _STARTS: tokens[:, :1]}, use_cache=True))
    except Exception as error:  # the model's own forward can raise anything
        return f"its forward does not run with only tokens ({type(error).__name__}: {error})"
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    if not all(is_plain_cache(part, length) for part, length in zip(parts, (1, 2), strict=True)):
        return "it keeps more of earlier tokens than keys and values of each layer"
    return None


def start_token(model: Any) -> int | None:
    """Returns the id of the token that texts of the model's decoder begin with; None if its configuration has none."""
    sources = (getattr(model, "generation_config", None), model.config)
    start: int | None = first_setting(sources, "decoder_start_token_id")
    return start


@contextmanager
def encoder_forward(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes its encoder's states and the keys and values of the cross-attention."""
    own, start, argument = model.forward, start_token(model), cache_argument(model)
    assert start is not None
    assert argument is not None

    def forward(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        starts = torch.full_like(inputs[TOKENS][:, :1], start)
        outputs = own(**inputs, **{_STARTS: starts, argument: cache_of_both([], [])}, use_cache=True)
        cross = named_cache(returned_cache(outputs).cross_attention_cache, "encoder.")
        return {"last_hidden_state": outputs.encoder_last_hidden_state, **cross}

    with patched_forward(model, forward):
        yield


@contextmanager
def decoder_forward(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes a step of its decoder."""
    own, argument = model.forward, cache_argument(model)
    assert argument is not None
    config: Any = model.config

    def forward(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        named = {dotted(name): value for name, value in inputs.items()}
        past = [value for name, value in named.items() if is_past(name) and not is_cross(name)]
        cross = [value for name, value in named.items() if is_past(name) and is_cross(name)]
        mask = named[ENCODER_MASK]
        unread = cross[0].new_zeros(()).expand(*mask.shape, config.hidden_size)  # its keys and values are in the cache
        outputs = own(
            attention_mask=mask,
            encoder_outputs=(unread,),
            use_cache=True,
            **{_STARTS: named[TOKENS], argument: cache_of_both(past, cross)},
        )
        return {LOGITS: outputs.logits, **named_cache(returned_cache(outputs).self_attention_cache, "decoder.")}

    with patched_forward(model, forward):
        yield


def encoder_inputs(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the encoder's example inputs: tokens and a mask, (batch, sequence) both."""
    tokens = inputs[TOKENS].long()
    return {TOKENS: tokens, MASK: inputs.get(MASK, torch.ones_like(tokens)).long()}


def decoder_step(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the decoder's example inputs by name: a step with a past, for the texts in `inputs` with one padded."""
    texts = encoder_inputs(inputs)
    tokens, mask = texts[TOKENS], texts[MASK].clone()
    mask[0, -1] = 0
    given = inputs.get(_STARTS, torch.full_like(tokens[:, :1], start_token(model) or 0))
    length = _PAST_TOKENS + _NEW_TOKENS
    decoder_tokens = torch.cat([given, tokens.repeat(1, length)], dim=1)[:, :length]
    with torch.no_grad():
        with encoder_forward(model):
            encoded = model(**{TOKENS: tokens, MASK: mask})
        cross = next_past(encoded)
        step = {TOKENS: decoder_tokens[:, :_PAST_TOKENS], ENCODER_MASK: mask}
        with decoder_forward(model):
            outputs = model(**step, **cross)
    past = {name: value.clone() for name, value in next_past(outputs).items()}
    return step | {TOKENS: decoder_tokens[:, _PAST_TOKENS:].contiguous()} | past | cross
