"""What a Hugging Face model says of itself while it is rewritten: attributes of the instance, gone after a fold."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

_SAVE = "save_pretrained"
_HAS_ADAPTERS = "_hf_peft_config_loaded"
"""PEFT's word for adapters that are there to be trained; without it a Trainer refuses a quantised model."""
_UNSAVED, _UNSAVED_BEFORE = "_keys_to_ignore_on_save", "melora_keys_to_ignore_on_save"
"""Keys that a Trainer does not miss in a checkpoint, and the model's own value of it meanwhile."""
_OURS = (_HAS_ADAPTERS, _UNSAVED, _UNSAVED_BEFORE)


def attach(model: nn.Module) -> None:
    """From here on `save_pretrained` warns, and a quantised model says that it has adapters."""
    save_by(model, save_and_warn)
    if getattr(model, "is_quantized", False):
        vars(model)[_HAS_ADAPTERS] = True


def save_by(model: nn.Module, save: Callable[..., Any]) -> None:
    """From here on `model.save_pretrained(…)` is `save(model, …)`; other models than Hugging Face's have none."""
    if has_save_pretrained(model):
        vars(model)[_SAVE] = functools.partial(save, model)


def has_save_pretrained(model: nn.Module) -> bool:
    """Whether the class of `model` has a `save_pretrained`."""
    return hasattr(type(model), _SAVE)


def leave_out(model: nn.Module, names: list[str]) -> None:
    """From here on a Trainer does not miss the tensors `names` in a checkpoint."""
    vars(model).setdefault(_UNSAVED_BEFORE, vars(model).get(_UNSAVED))
    vars(model)[_UNSAVED] = names


def leave_in(model: nn.Module) -> None:
    """Undoes `leave_out`."""
    if _UNSAVED_BEFORE in vars(model):
        vars(model)[_UNSAVED] = vars(model).pop(_UNSAVED_BEFORE)


def detach(model: nn.Module) -> None:
    """Takes all of it off."""
    leave_in(model)
    for name in (_SAVE, _HAS_ADAPTERS):
        vars(model).pop(name, None)


def save_and_warn(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The class's own `save_pretrained`, of the whole model, and a word of what it is not."""
    warnings.warn(
        "`save_pretrained` of a rewritten model writes base and adapter under names that `from_pretrained` drops: use "
        "`melora_fx.save_adapter`, or `melora_fx.fold` first; for a Trainer's checkpoints, `AdapterCheckpointCallback`",
        stacklevel=3,
    )
    attributes = dict(vars(model))
    leave_in(model)  # else the base would be left out
    vars(model).pop(_HAS_ADAPTERS, None)  # else PEFT's format would be written
    try:
        return type(model).save_pretrained(model, *args, **kwargs)
    finally:
        vars(model).update({name: attributes[name] for name in _OURS if name in attributes})
