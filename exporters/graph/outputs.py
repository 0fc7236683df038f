"""Names for the tensors that a model returns."""

from collections.abc import Mapping
from typing import Any

import torch

from melora_fx import MELoRAError
from melora_fx.torch_private import tree_paths


def named_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model's output by name: its fields' names, else `output` or `output_0`, `output_1`, …

    Raises:
        MELoRAError: for an output without any tensor.
    """
    if isinstance(outputs, torch.Tensor):
        return {"output": outputs}
    named = {}
    for keys, leaf in tree_paths(_without_empty_fields(outputs)):
        if isinstance(leaf, torch.Tensor):
            path = ("output", *keys) if keys[0].isdigit() else keys
            named["_".join(path)] = leaf
    if not named:
        raise MELoRAError(f"the model returns no tensor that has a name, but a {type(outputs).__name__}")
    return named


def _without_empty_fields(outputs: Any) -> Any:
    """Hugging Face outputs as dicts, without the fields that are None."""
    if not isinstance(outputs, Mapping):
        return outputs
    return {name: value for name, value in outputs.items() if value is not None}
