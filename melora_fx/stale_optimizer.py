"""Optimizers that were made before `rewrite` hold what is frozen now and nothing of the adapter: they train nothing.

Only the optimizer knows what it holds, so the first step of each is looked at, by PyTorch's hook for that.
"""

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .rewritten import rewritten_modules

_models: WeakSet[nn.Module] = WeakSet()
_checked: WeakSet[Optimizer] = WeakSet()


def watch_optimizers(model: nn.Module) -> None:
    """From here on an optimizer that holds parameters of `model` from before it was rewritten says so."""
    if not _models:
        register_optimizer_step_pre_hook(_check)
    _models.add(model)


def _check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or optimizer in _checked:
        return
    _checked.add(optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for model in _models:
        if not any(rewritten_modules(model)):
            continue  # folded meanwhile
        own = list(model.parameters())
        frozen = sum(id(parameter) in held for parameter in own if not parameter.requires_grad)
        missing = sum(id(parameter) not in held for parameter in own if parameter.requires_grad)
        if frozen and missing:
            warnings.warn(
                f"this {type(optimizer).__name__} holds {frozen} parameters that `rewrite` has frozen, and lacks "
                f"{missing} that are trained: make the optimizer after `rewrite`",
                stacklevel=3,  # where `step` is called
            )
