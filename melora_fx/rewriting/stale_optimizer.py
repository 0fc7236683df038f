"""Optimizers that were made before `rewrite` hold what is frozen now and nothing of the adapter: they train nothing.

Only the optimizer knows what it holds, so the first step of each is looked at, by PyTorch's hook for that.
"""

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from melora_fx.adapter.site import owner_of
from melora_fx.torch_private import registered

from .module import rewritten_modules

_models: WeakSet[nn.Module] = WeakSet()
_checked: WeakSet[Optimizer] = WeakSet()


def watch_optimizers(model: nn.Module) -> None:
    """From here on an optimizer that holds parameters of `model` from before it was rewritten says so."""
    if not _models:
        register_optimizer_step_pre_hook(_check)
    _models.add(model)
    _checked.clear()  # one that has stepped before may hold this model


def _check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or optimizer in _checked:
        return
    _checked.add(optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for model in _models:
        stale = 0
        for _, module in rewritten_modules(model):
            for record in module.melora_records:
                owner = owner_of(module, record)
                weight = registered(owner)[0].get(record.parameter_name)
                lora_a = getattr(owner, record.attribute("lora_a"))
                stale += weight is not None and id(weight) in held and id(lora_a) not in held
        if stale:
            warnings.warn(
                f"this {type(optimizer).__name__} holds the weights of {stale} linears, which `rewrite` has frozen, "
                "and not their adapters: make the optimizer after `rewrite`",
                stacklevel=3,  # where `step` is called
            )
