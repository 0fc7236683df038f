"""The inputs that a capture is made with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from melora_fx.torch_private import tree_leaves, tree_map

ExampleInputs = Mapping[str, Any] | Sequence[Any]
"""Keyword arguments by name, or positional ones in order."""


def as_arguments(example_inputs: Any, *, double: bool = True) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`example_inputs` as positional and keyword arguments; with `double` a batch of one, which would be frozen, is
    doubled.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, tuple | list):
        args = tuple(example_inputs)
    else:
        kind = type(example_inputs).__name__
        raise TypeError(f"`example_inputs` must be a dict of keyword or a tuple of positional arguments, got {kind}")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if double and tensors and all(tensor.size(0) == 1 for tensor in tensors):
        args, kwargs = tree_map(_doubled, (args, kwargs))
    return args, kwargs


def _doubled(leaf: Any) -> Any:
    return torch.cat([leaf, leaf]) if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf


def copied(leaf: Any) -> Any:
    """A tensor's copy, what is no tensor itself: a forward may change its inputs."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def changed_names(after: Mapping[str, Any], before: Mapping[str, Any]) -> tuple[str, ...]:
    """The arguments with tensors that are not as they were."""
    return tuple(name for name in before if not all(map(_is_same, tree_leaves(after[name]), tree_leaves(before[name]))))


def _is_same(after: Any, before: Any) -> bool:
    if not isinstance(before, torch.Tensor):
        return True
    return after.shape == before.shape and bool(((after == before) | (after != after)).all())
