"""Manages the temporary attributes of a rewritten Hugging Face model; a fold removes them."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from melora_fx.torch_private import HAS_ADAPTERS, KEYS_NOT_SAVED

from .marks import ROOT_MARK, Patches, root_mark

_SAVE = "save_pretrained"

_TIE = "tie_weights"
"""The method that a Trainer calls after it has loaded a checkpoint."""


def attach(model: nn.Module) -> None:
    """Makes `save_pretrained` warn, and makes a quantised model report that it has adapters."""
    save_by(model, save_and_warn)
    if getattr(model, "is_quantized", False):
        root_mark(model).patches.put(model, HAS_ADAPTERS, True)


def save_by(model: nn.Module, save: Callable[..., Any]) -> None:
    """Makes `model.save_pretrained(…)` call `save(model, …)`; a no-op if the class has no `save_pretrained`."""
    if has_save_pretrained(model):
        root_mark(model).patches.put(model, _SAVE, functools.partial(save, model))


def has_save_pretrained(model: nn.Module) -> bool:
    """Returns whether the class of `model` has a `save_pretrained`."""
    return hasattr(type(model), _SAVE)


def leave_out(model: nn.Module, names: list[str]) -> None:
    """Makes a Trainer accept checkpoints without the tensors `names`."""
    patches = root_mark(model).patches
    patches.put(model, KEYS_NOT_SAVED, names)
    if not hasattr(model, _TIE):
        patches.put(model, _TIE, _nothing_to_tie)


def leave_in(model: nn.Module) -> None:
    """Undoes `leave_out`."""
    root_mark(model).patches.take_off(model, KEYS_NOT_SAVED, _TIE)


def _nothing_to_tie(*_: Any, **__: Any) -> None:
    """Stands in for `tie_weights` on a model that lacks it."""


def save_and_warn(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls `save_whole`, after a warning that `from_pretrained` drops what it writes."""
    warnings.warn(
        "`save_pretrained` of a rewritten model writes base and adapter under names that `from_pretrained` drops: use "
        "`melora_fx.save_adapter`, or call `melora_fx.fold` first; for a Trainer's checkpoints use "
        "`AdapterCheckpointCallback`",
        stacklevel=3,
    )
    return save_whole(model, *args, **kwargs)


def save_whole(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls the model's own `save_pretrained`, which writes the whole model, not PEFT's format."""
    patches = root_mark(model).patches if ROOT_MARK in vars(model) else Patches()  # someone may call this after a fold
    own_save = patches.before.get(_SAVE, functools.partial(type(model).save_pretrained, model))
    with patches.lifted(model):
        return own_save(*args, **kwargs)
