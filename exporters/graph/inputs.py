"""The example inputs by name: a graph's inputs have names."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from melora_fx.whole_capture.dynamic_axes import DynamicAxes, has_dynamic_batch
from melora_fx.whole_capture.example_inputs import as_arguments


def named_inputs(
    model: nn.Module, example_inputs: Mapping[str, Any] | Sequence[Any], dynamic_axes: DynamicAxes
) -> dict[str, Any]:
    """The example inputs as keyword arguments, in the order of the model's own; a batch of one is doubled where axis 0
    is dynamic.

    Raises:
        TypeError: for more arguments than the model has names for, and for values that are no tensor and no constant.
    """
    args, kwargs = as_arguments(example_inputs, double=has_dynamic_batch(dynamic_axes))
    parameters = inspect.signature(model.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        raise TypeError(
            f"`{type(model).__name__}.forward` takes {len(names)} named arguments, `example_inputs` gives {len(args)}: "
            "pass a dict"
        )
    inputs = dict(zip(names, args, strict=False)) | kwargs
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor | bool | int | float | str | None):
            raise TypeError(
                f"`example_inputs`: `{name}` is a {type(value).__name__}, a graph's input must be a tensor (a number, "
                "a text or None becomes a constant of the graph)"
            )
    return {name: inputs[name] for name in sorted(inputs, key=lambda name: names.index(name) if name in names else -1)}
