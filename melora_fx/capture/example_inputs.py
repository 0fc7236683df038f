"""The inputs that a capture is made with, and those that it takes afterwards."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from melora_fx.errors import MELoRAError
from melora_fx.torch_private import tree_leaves, tree_map

ExampleInputs = Mapping[str, Any] | Sequence[Any]
"""Keyword arguments by name, or positional ones in order."""


def frozen_sizes(value: Any) -> tuple[int | None, ...] | None:
    """The sizes of an input that the export froze, None for each dynamic one; None for what is not a tensor."""
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(size if isinstance(size, int) else size.node.maybe_as_int() for size in value.shape)


def check_input_sizes(graph_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises MELoRAError for an input of another size than the export froze: a hook before the forward."""
    if torch.compiler.is_compiling():
        return
    sizes = vars(graph_module)["input_sizes"]
    for name, value in [*zip(sizes, args, strict=False), *kwargs.items()]:
        frozen = sizes.get(name)
        if frozen is None or not isinstance(value, torch.Tensor) or _fits(value, frozen):
            continue
        raise MELoRAError(
            f"input `{name}` has shape {tuple(value.shape)}, but the capture is for "
            f"({', '.join('any' if size is None else str(size) for size in frozen)}): "
            "capture again with `example_inputs` of that shape"
        )


def _fits(value: torch.Tensor, frozen: tuple[int | None, ...]) -> bool:
    if value.dim() != len(frozen):
        return False
    return all(want in (None, got) for want, got in zip(frozen, value.shape, strict=True))


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


def all_dynamic(leaf: Any) -> Any:
    """The `dynamic_shapes` entry of one input that leaves every dimension to the export."""
    return dict.fromkeys(range(leaf.dim()), Dim.AUTO) if isinstance(leaf, torch.Tensor) else None
