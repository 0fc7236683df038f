"""Names the tensors that a model accepts and returns, because a graph's inputs and outputs have names."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from melora_fx import MELoRAError
from melora_fx.torch_private import tree_paths
from melora_fx.whole_capture.dynamic_axes import DynamicAxes, has_dynamic_batch
from melora_fx.whole_capture.example_inputs import as_arguments


def named_inputs(
    model: nn.Module, example_inputs: Mapping[str, Any] | Sequence[Any], dynamic_axes: DynamicAxes
) -> dict[str, Any]:
    """Returns the example inputs as keyword arguments, in the order of the model's parameters. A batch of one is
    doubled if axis 0 is dynamic.

    Raises:
        TypeError: if there are more arguments than the model has names for, or a value is neither a tensor nor a
            constant.
    """
    args, kwargs = as_arguments(example_inputs, double=has_dynamic_batch(dynamic_axes))
    parameters = inspect.signature(model.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        raise TypeError(
            f"`{type(model).__name__}.forward` accepts {len(names)} named arguments, `example_inputs` has {len(args)}: "
            "pass a dict"
        )
    inputs = dict(zip(names, args, strict=False)) | kwargs
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor | bool | int | float | str | None):
            raise TypeError(
                f"`example_inputs`: `{name}` is a {type(value).__name__}, a graph's input must be a tensor (a number, "
                "a string or None becomes a constant of the graph)"
            )
    return {name: inputs[name] for name in sorted(inputs, key=lambda name: names.index(name) if name in names else -1)}


def named_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """Returns the tensors of a model's output by name: its fields' names, else `output` or `output_0`, `output_1`, …

    Raises:
        MELoRAError: if the output contains no tensor.
    """
    if isinstance(outputs, torch.Tensor):
        return {"output": outputs}
    named = {}
    for keys, leaf in tree_paths(_without_empty_fields(outputs)):
        if isinstance(leaf, torch.Tensor):
            path = ("output", *keys) if keys[0].isdigit() else keys
            named["_".join(path)] = leaf
    if not named:
        raise MELoRAError(f"the model returns a {type(outputs).__name__} without a named tensor")
    return named


def _without_empty_fields(outputs: Any) -> Any:
    """Returns a mapping, such as a Hugging Face output, as a dict without its None fields; other outputs unchanged."""
    if not isinstance(outputs, Mapping):
        return outputs
    return {name: value for name, value in outputs.items() if value is not None}
