"""What a Hugging Face model says of itself while it is rewritten: attributes of the instance, gone after a fold."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from melora_fx.torch_private import HAS_ADAPTERS, KEYS_NOT_SAVED

_SAVE = "save_pretrained"

_TIE = "tie_weights"
"""What a Trainer calls when it has loaded a checkpoint."""

_BEFORE = "melora_before_checkpoints"
"""Attribute that keeps the model's own `KEYS_NOT_SAVED` and `_TIE` between `leave_out` and `leave_in`."""


class _OwnSave(functools.partial[Any]):
    """A `save_pretrained` that stands on the instance by our doing, and not the user's."""


def attach(model: nn.Module) -> None:
    """From here on `save_pretrained` warns, and a quantised model says that it has adapters."""
    save_by(model, save_and_warn)
    if getattr(model, "is_quantized", False):
        vars(model)[HAS_ADAPTERS] = True


def save_by(model: nn.Module, save: Callable[..., Any]) -> None:
    """From here on `model.save_pretrained(…)` is `save(model, …)`; other models than Hugging Face's have none."""
    if has_save_pretrained(model):
        vars(model)[_SAVE] = _OwnSave(save, model)


def has_save_pretrained(model: nn.Module) -> bool:
    """Whether the class of `model` has a `save_pretrained`."""
    return hasattr(type(model), _SAVE)


def leave_out(model: nn.Module, names: list[str]) -> None:
    """From here on a Trainer does not miss the tensors `names` in a checkpoint."""
    own = vars(model)
    own.setdefault(_BEFORE, {name: own[name] for name in (KEYS_NOT_SAVED, _TIE) if name in own})
    own[KEYS_NOT_SAVED] = names
    if not hasattr(model, _TIE):
        own[_TIE] = _nothing_to_tie


def leave_in(model: nn.Module) -> None:
    """Undoes `leave_out`."""
    before = vars(model).pop(_BEFORE, None)
    if before is not None:
        for name in (KEYS_NOT_SAVED, _TIE):
            vars(model).pop(name, None)
        vars(model).update(before)


def _nothing_to_tie(*_: Any, **__: Any) -> None:
    """The `tie_weights` of a model that has none."""


def detach(model: nn.Module) -> None:
    """Takes all of it off, and nothing that is the user's own."""
    leave_in(model)
    if isinstance(vars(model).get(_SAVE), _OwnSave):
        for name in (_SAVE, HAS_ADAPTERS):
            vars(model).pop(name, None)


def save_and_warn(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`save_whole`, and a word of what it is not."""
    warnings.warn(
        "`save_pretrained` of a rewritten model writes base and adapter under names that `from_pretrained` drops: use "
        "`melora_fx.save_adapter`, or `melora_fx.fold` first; for a Trainer's checkpoints, `AdapterCheckpointCallback`",
        stacklevel=3,
    )
    return save_whole(model, *args, **kwargs)


def save_whole(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The class's own `save_pretrained`, of the whole model."""
    own = vars(model)
    state = {name: own[name] for name in (HAS_ADAPTERS, KEYS_NOT_SAVED, _TIE, _BEFORE) if name in own}
    leave_in(model)  # else the base would be left out
    own.pop(HAS_ADAPTERS, None)  # else PEFT's format would be written
    try:
        return type(model).save_pretrained(model, *args, **kwargs)
    finally:
        own.update(state)
