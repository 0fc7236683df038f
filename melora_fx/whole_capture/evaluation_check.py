"""Checks that a capture computes what its model does in evaluation."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from melora_fx.capture.model_settings import (
    changed_attributes,
    in_mode,
    own_attributes,
    same_random_state,
    without_cache,
)
from melora_fx.errors import MELoRAError
from melora_fx.torch_private import tree_leaves, tree_map

from .assumed_inputs import AssumedInputs
from .example_inputs import changed_names, copied
from .tried_sizes import try_sizes


def has_values(model: nn.Module) -> bool:
    """Returns whether no tensor of `model` is on the meta device."""
    return not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def check_evaluation(
    model: nn.Module, graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Compares the outputs of a capture in evaluation with the model's, and finds out which axes must be larger than 1.

    Does nothing for a model without values. Warns if the forward changes its inputs, or keeps attributes from call to
    call. Leaves `graph_module` in evaluation mode. Both run on copies of everything that a forward may write to.

    Raises:
        MELoRAError: if the outputs differ, if only the graph raises, or if the outputs depend on attributes that the
            forward keeps from call to call.
    """
    if not has_values(model):
        return
    graph_module.eval()
    with torch.no_grad(), own_attributes(model), in_mode(model, training=False), without_cache(model):
        name = type(model).__name__
        runs = list[Any]()
        kept = changed_attributes(model, lambda: runs.append(_run(model, args, kwargs)))
        expected = runs[0]
        try:
            actual = _run(graph_module, args, kwargs)
        except Exception as error:  # the graph can raise anything
            raise MELoRAError(
                f"`{name}` cannot be captured whole: its graph raises what the forward catches or avoids, {error}: "
                "rewrite it without `example_inputs=`"
            ) from error
        if not _are_near(tree_leaves(actual), tree_leaves(expected)):
            raise MELoRAError(
                f"`{name}` cannot be captured whole: its graph computes something else, as its forward differs between "
                "train and eval mode by more than dropout, or asks for something that no graph knows, such as whether "
                "gradients are recorded: rewrite it without `example_inputs=`"
            )
        assumed: AssumedInputs = vars(graph_module)["assumed_inputs"]
        if kept and not _are_near(tree_leaves(runs[1]), tree_leaves(expected)):
            raise MELoRAError(
                f"`{name}` cannot be captured whole: its outputs depend on {_quoted(kept)}, which its "
                "forward keeps from call to call: make it a buffer, or rewrite without `example_inputs=`"
            )
        changed = changed_names(assumed.by_name(*expected[1:]), assumed.by_name(args, kwargs))
        _warn(model, changed, "changes the input {}, and so does the capture")
        _warn(model, kept, "keeps {} from call to call, the capture does not")
        try_sizes(assumed, args, kwargs, partial(_is_right, model, graph_module))


def _warn(model: nn.Module, names: Sequence[str], text: str) -> None:
    if names:
        said = text.format(_quoted(names))
        warnings.warn(f"the forward of `{type(model).__name__}` {said}", stacklevel=7)  # the line that called `rewrite`


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _is_right(model: nn.Module, graph_module: fx.GraphModule, args: Any, kwargs: Any) -> bool | None:
    """Returns whether the graph computes what the model does; None if the model does not accept the inputs."""
    try:
        expected = _run(model, args, kwargs)
    except Exception:  # the model's own forward can raise anything
        return None
    try:
        return _are_near(tree_leaves(_run(graph_module, args, kwargs)), tree_leaves(expected))
    except Exception:  # as can the graph
        return False


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Runs the model on copies of its inputs and buffers. Returns the outputs, and the copied inputs after the call.

    Draws the same random numbers in every call.
    """
    args, kwargs = tree_map(copied, (args, kwargs))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with same_random_state(model):
        outputs = torch.func.functional_call(model, buffers, args, kwargs)
    return dict(outputs) if isinstance(outputs, Mapping) else outputs, args, kwargs


def _are_near(actual: list[Any], expected: list[Any]) -> bool:
    """Returns whether the number of values is the same, and each tensor is near the expected one."""
    if len(actual) != len(expected):
        return False
    pairs = zip(actual, expected, strict=True)
    return all(_is_near(got, want) for got, want in pairs if isinstance(want, torch.Tensor))


def _is_near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Returns whether two tensors are equal up to the rounding of a whole model, relative to the largest value."""
    if not isinstance(actual, torch.Tensor) or actual.shape != expected.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    scale = expected.abs().nan_to_num(0, 0, 0).max() if expected.numel() else 0
    bound = float(scale) * max(1e-4, 8 * torch.finfo(expected.dtype).eps)
    return torch.allclose(actual, expected, rtol=0, atol=bound, equal_nan=True)
