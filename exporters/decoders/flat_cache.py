"""Gives a model a forward with the key-value cache as named tensors, as in a graph.

    forward(input_ids, attention_mask, position_ids, past_key_values.0.key, …) → {logits, present.0.key, …}

Caches of models with a sliding window are kept whole: their masks leave out the tokens before the window.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from exporters.hugging_face import decoder_config, is_hugging_face_model
from exporters.onnx_files.cache_names import LOGITS, MASK, POSITIONS, TOKENS, is_past, past_names, present_of
from exporters.private import cache_argument, dynamic_cache, is_plain_cache, returned_cache

_DATA_DEPENDENT_ROPES = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the tokens so far: a graph would keep those of its example."""


class CacheLayout(NamedTuple):
    """A decoder's cache: the number of its layers, and whether the decoder's forward accepts positions."""

    num_layers: int
    takes_positions: bool


def cache_misfit(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Returns why a model's graph cannot have a cache, in words; None if it can."""
    if not is_hugging_face_model(model) or not model.can_generate():
        return f"`{type(model).__name__}` is not a transformers model that generates"
    if model.config.is_encoder_decoder:
        return "it has an encoder"
    if TOKENS not in inputs:
        return f"`example_inputs` has no `{TOKENS}`"
    if others := [name for name in inputs if name not in (TOKENS, MASK, POSITIONS)]:
        return f"`example_inputs` has {', '.join(f'`{name}`' for name in others)} in addition to the tokens"
    shapes = {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if (mask := shapes.get(MASK, shapes.get(TOKENS))) != shapes.get(TOKENS):
        return f"`{MASK}` has the shape {mask}, not that of `{TOKENS}`"
    if cache_argument(model) is None or MASK not in inspect.signature(model.forward).parameters:
        return f"`{type(model).__name__}.forward` must accept a cache and `{MASK}`"
    if (rope := _rope_type(model)) in _DATA_DEPENDENT_ROPES:
        return f"its rotary embedding (`rope_type` {rope!r}) changes with the number of tokens"
    try:
        layout = cache_layout(model)
    except Exception as error:  # the model's own forward can raise anything
        return f"its forward does not run with only tokens ({type(error).__name__}: {error})"
    return None if layout else "it keeps more of earlier tokens than keys and values of each layer"


def _rope_type(model: nn.Module) -> str | None:
    """Returns the `rope_type` in the model's configuration; of several, a data-dependent one if there is any."""
    parameters = getattr(decoder_config(model), "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, Mapping))]
    found = [str(kind["rope_type"]) for kind in kinds if "rope_type" in kind]
    return next((kind for kind in found if kind in _DATA_DEPENDENT_ROPES), found[0] if found else None)


def cache_layout(model: nn.Module) -> CacheLayout | None:
    """Returns the layout of the cache that the model's forward returns; None if it is not just keys and values."""
    argument = cache_argument(model)
    if argument is None:
        return None
    device = next(model.parameters()).device
    tokens = torch.zeros((1, 2), dtype=torch.int64, device=device)
    with torch.no_grad():
        cache = returned_cache(model(**{TOKENS: tokens}, use_cache=True))
    if not is_plain_cache(cache, length=2):
        return None
    return CacheLayout(len(cache.layers), takes_positions(model))


def takes_positions(model: nn.Module) -> bool:
    """Returns whether the model's forward accepts the positions of tokens."""
    return POSITIONS in inspect.signature(model.forward).parameters


@contextmanager
def flat_cache(model: nn.Module) -> Iterator[None]:
    """Inside the block the model accepts the cache as tensors and returns a dict, with the names of a graph's inputs
    and outputs. Without tensors of a past it starts a new cache.
    """
    own, argument = model.forward, cache_argument(model)
    assert argument is not None

    def forward(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        past = [value for name, value in inputs.items() if is_past(dotted(name))]
        others = {name: value for name, value in inputs.items() if not is_past(dotted(name))}
        outputs = own(**others, **{argument: dynamic_cache(past)}, use_cache=True)
        return {LOGITS: outputs.logits, **named_cache(returned_cache(outputs))}

    with patched_forward(model, forward):
        yield


@contextmanager
def patched_forward(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block `forward` is the model's forward; afterwards it is the instance's or the class's again."""
    before = vars(model).get("forward")
    vars(model)["forward"] = forward
    try:
        yield
    finally:
        del vars(model)["forward"]
        if before is not None:
            vars(model)["forward"] = before


def named_cache(cache: Any, part: str = "") -> dict[str, torch.Tensor]:
    """Returns the keys and values of each layer by the names of a graph's outputs; `part` as for `past_names`."""
    kept = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    return dict(zip(map(present_of, past_names(len(cache.layers), part)), kept, strict=True))


def identifier(name: str) -> str:
    """Returns the name of an input as a valid argument name: `past_key_values_0_key` for `past_key_values.0.key`."""
    return name.replace(".", "_")


def dotted(name: str) -> str:
    """Returns the inverse of `identifier` for names of the cache's inputs; other names are unchanged."""
    return name.replace("_", ".").replace("past.key.values", "past_key_values") if "_values_" in name else name
