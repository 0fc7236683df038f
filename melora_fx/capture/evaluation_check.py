"""Whether a capture, which is made in training mode, computes in evaluation what its model does."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from melora_fx.errors import MELoRAError
from melora_fx.torch_private import tree_leaves

from .model_settings import in_mode, own_attributes, without_cache


def check_evaluation(
    model: nn.Module, graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuses a capture whose outputs in evaluation are not the model's; without values there is nothing to compare.

    `graph_module` is in evaluation afterwards. Both run on copies of their buffers, which a forward may write to.
    """
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        return
    with torch.no_grad(), own_attributes(model), in_mode(model, training=False), without_cache(model):
        expected = _leaves(_run(model, args, kwargs))
        actual = _leaves(_run(graph_module.eval(), args, kwargs))
    if not _are_near(actual, expected):
        raise MELoRAError(
            f"`{type(model).__name__}` cannot be captured whole: its forward differs between train and eval mode "
            "by more than dropout, which one graph cannot follow: rewrite it without `example_inputs=`"
        )


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return torch.func.functional_call(model, buffers, args, kwargs)


def _are_near(actual: list[Any], expected: list[Any]) -> bool:
    """Whether as many values come out, and each tensor is near."""
    if len(actual) != len(expected):
        return False
    pairs = zip(actual, expected, strict=True)
    return all(_is_near(got, want) for got, want in pairs if isinstance(want, torch.Tensor))


def _is_near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to the rounding of a whole model, relative to the largest value."""
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    scale = expected.abs().nan_to_num(0, 0, 0).max() if expected.numel() else 0
    bound = float(scale) * max(1e-4, 8 * torch.finfo(expected.dtype).eps)
    return torch.allclose(actual, expected, rtol=0, atol=bound, equal_nan=True)


def _leaves(outputs: Any) -> list[Any]:
    return tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs)
