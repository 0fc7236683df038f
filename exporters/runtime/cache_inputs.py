"""The inputs of one step of a decoder's graph: tokens, mask, positions, and the cache, empty before the first one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exporters.onnx_files.cache_names import MASK, POSITIONS, TOKENS, has_cache, is_cross, is_past
from exporters.onnx_runtime import Arrays, as_array

_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_PAST_AXIS = 2


def empty_cache(inputs: Sequence[Any], batch: int) -> Arrays:
    """A cache of no tokens for so many texts, by the inputs of a session."""
    return {
        value.name: np.zeros([batch, value.shape[1], 0, value.shape[3]], _FLOATS[value.type])
        for value in inputs
        if is_past(value.name) and not is_cross(value.name)
    }


def as_types(inputs: Sequence[Any], arrays: Arrays) -> Arrays:
    """Arrays of floats in the types that a session takes: a graph in half precision has its cache in it too."""
    types = {value.name: _FLOATS.get(value.type) for value in inputs}
    return {name: value if (found := types[name]) is None else value.astype(found) for name, value in arrays.items()}


def step_inputs(names: Sequence[str], tokens: np.ndarray, mask: np.ndarray) -> Arrays:
    """What a step takes beside the cache.

    Args:
        names: the graph's inputs.
        tokens: the ids of the new tokens, (batch, new).
        mask: of the past and the new tokens, (batch, past + new); 0 for padding.
    """
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -tokens.shape[1] :]
    inputs = {TOKENS: tokens, MASK: mask, POSITIONS: positions}
    return {name: np.ascontiguousarray(value, np.int64) for name, value in inputs.items() if name in names}


def with_empty_cache(inputs: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, and for a decoder's first step what follows from its tokens: a mask of ones, positions in order,
    and an empty cache. Where any of the cache was given, nothing is added to it.

    Args:
        inputs: those of the session.
        given: arrays or tensors by name.
    """
    names = [value.name for value in inputs]
    if TOKENS not in given or not has_cache(names) or has_cache(given):
        return dict(given)
    tokens = as_array(given[TOKENS])
    if tokens.ndim != 2:
        return dict(given)
    mask = as_array(given.get(MASK, np.ones(tokens.shape, np.int64)))
    first = step_inputs(names, tokens, mask) if mask.shape == tokens.shape else {}
    return {**first, **empty_cache(inputs, len(tokens)), **given}
