"""Names for the tensors that a model returns."""

from collections.abc import Mapping
from typing import Any

import torch

from melora_fx import MELoRAError
from melora_fx.torch_private import tree_paths


def named_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model's output by name: its fields' names, else `output` or `output_0`, `output_1`, …"""
    if isinstance(outputs, torch.Tensor):
        return {"output": outputs}
    named = {}
    for keys, leaf in tree_paths(_plain(outputs)):
        if isinstance(leaf, torch.Tensor):
            named["_".join(("output", *keys) if keys[0].isdigit() else keys)] = leaf
    if not named:
        raise MELoRAError(f"the model returns no tensor that has a name, but a {type(outputs).__name__}")
    return named


def _plain(outputs: Any) -> Any:
    """Hugging Face outputs as dicts, without their empty fields."""
    return {k: v for k, v in outputs.items() if v is not None} if isinstance(outputs, Mapping) else outputs
