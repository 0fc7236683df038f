"""Makes the inputs of one step of a decoder's graph: tokens, mask, positions, and the cache, initially empty."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exporters.onnx_files.cache_names import MASK, POSITIONS, TOKENS, has_cache, is_cross, is_past
from exporters.onnx_runtime import Arrays, as_array

_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_PAST_AXIS = 2


def empty_cache(inputs: Sequence[Any], batch: int) -> Arrays:
    """Returns a cache without tokens for `batch` texts, in the shapes and types of a session's inputs."""
    return {
        value.name: np.zeros([batch, value.shape[1], 0, value.shape[3]], _FLOATS[value.type])
        for value in inputs
        if is_past(value.name) and not is_cross(value.name)
    }


def as_types(inputs: Sequence[Any], arrays: Arrays) -> Arrays:
    """Casts float arrays to the types of a session's inputs: a graph in half precision also has its cache in it."""
    types = {value.name: _FLOATS.get(value.type) for value in inputs}
    return {name: value if (found := types[name]) is None else value.astype(found) for name, value in arrays.items()}


def step_inputs(names: Sequence[str], tokens: np.ndarray, mask: np.ndarray) -> Arrays:
    """Returns the inputs of a step except the cache.

    Args:
        names: the names of the graph's inputs.
        tokens: the ids of the new tokens, (batch, new).
        mask: the mask of the past and the new tokens, (batch, past + new); 0 for padding.
    """
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -tokens.shape[1] :]
    inputs = {TOKENS: tokens, MASK: mask, POSITIONS: positions}
    return {name: np.ascontiguousarray(value, np.int64) for name, value in inputs.items() if name in names}


def with_empty_cache(inputs: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Completes `given` for a decoder's first step: a mask of ones, positions in order, and an empty cache.

    If any part of the cache is given, nothing is added.

    Args:
        inputs: the inputs of the session.
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
