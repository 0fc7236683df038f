"""Prepares the inputs that a capture is made with."""

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from melora_fx.torch_private import tree_leaves, tree_map

ExampleInputs = Mapping[str, Any] | Sequence[Any]
"""Keyword arguments by name, or positional ones in order."""


def as_arguments(example_inputs: Any, *, double: bool = True) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns `example_inputs` as positional and keyword arguments, with a copy of each tensor: an export would treat a
    tensor that is passed twice, or that the model owns too, as one input. With `double`, doubles a batch of one, which
    an export would freeze.

    Raises:
        TypeError: if `example_inputs` is neither a mapping nor a tuple or list.
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
    times = 2 if double and tensors and all(tensor.size(0) == 1 for tensor in tensors) else 1

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        copy = torch.cat([leaf] * times) if leaf.dim() and times > 1 else leaf.clone()
        return copy.detach().requires_grad_(leaf.requires_grad)

    made: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(own, (args, kwargs))
    return made


def with_named_keywords(signature: inspect.Signature, names: Iterable[str]) -> inspect.Signature:
    """Returns the signature with a keyword argument for each of `names` that would go to `**kwargs`, in place of it."""
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(own) == len(signature.parameters):
        return signature
    known = {each.name for each in own}
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names if name not in known]
    return signature.replace(parameters=[*own, *more])


def name_keywords(model: nn.Module, names: Iterable[str]) -> inspect.Signature:
    """Replaces `model.forward` by one with the signature of `with_named_keywords`, and returns this signature:
    `torch.export` does not find the dynamic shapes of arguments that go to `**kwargs` (torch 2.13).
    """
    forward = model.forward

    @functools.wraps(forward)
    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    signature = with_named_keywords(inspect.signature(forward), names)
    vars(named)["__signature__"] = signature
    vars(model)["forward"] = named
    return signature


def copied(leaf: Any) -> Any:
    """Returns a copy of a tensor, and any other value itself: a forward may change its inputs."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def changed_names(after: Mapping[str, Any], before: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the arguments with tensors that have changed."""
    return tuple(name for name in before if not all(map(_is_same, tree_leaves(after[name]), tree_leaves(before[name]))))


def _is_same(after: Any, before: Any) -> bool:
    if not isinstance(before, torch.Tensor):
        return True
    return after.shape == before.shape and bool(((after == before) | (after != after)).all())
