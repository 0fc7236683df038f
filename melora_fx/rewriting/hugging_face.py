"""What a Hugging Face model says of itself while it is rewritten: attributes of the instance, gone after a fold."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from melora_fx.torch_private import HAS_ADAPTERS, KEYS_NOT_SAVED

from .marks import ROOT_MARK, Patches, root_mark

_SAVE = "save_pretrained"

_TIE = "tie_weights"
"""What a Trainer calls when it has loaded a checkpoint."""


def attach(model: nn.Module) -> None:
    """From here on `save_pretrained` warns, and a quantised model says that it has adapters."""
    save_by(model, save_and_warn)
    if getattr(model, "is_quantized", False):
        root_mark(model).patches.put(model, HAS_ADAPTERS, True)


def save_by(model: nn.Module, save: Callable[..., Any]) -> None:
    """From here on `model.save_pretrained(…)` is `save(model, …)`; other models than Hugging Face's have none."""
    if has_save_pretrained(model):
        root_mark(model).patches.put(model, _SAVE, functools.partial(save, model))


def has_save_pretrained(model: nn.Module) -> bool:
    """Whether the class of `model` has a `save_pretrained`."""
    return hasattr(type(model), _SAVE)


def leave_out(model: nn.Module, names: list[str]) -> None:
    """From here on a Trainer does not miss the tensors `names` in a checkpoint."""
    patches = root_mark(model).patches
    patches.put(model, KEYS_NOT_SAVED, names)
    if not hasattr(model, _TIE):
        patches.put(model, _TIE, _nothing_to_tie)


def leave_in(model: nn.Module) -> None:
    """Undoes `leave_out`."""
    root_mark(model).patches.take_off(model, KEYS_NOT_SAVED, _TIE)


def _nothing_to_tie(*_: Any, **__: Any) -> None:
    """The `tie_weights` of a model that has none."""


def save_and_warn(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`save_whole`, and a word of what it is not."""
    warnings.warn(
        "`save_pretrained` of a rewritten model writes base and adapter under names that `from_pretrained` drops: use "
        "`melora_fx.save_adapter`, or `melora_fx.fold` first; for a Trainer's checkpoints, `AdapterCheckpointCallback`",
        stacklevel=3,
    )
    return save_whole(model, *args, **kwargs)


def save_whole(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own `save_pretrained`: of the whole model, and not in PEFT's format."""
    patches = root_mark(model).patches if ROOT_MARK in vars(model) else Patches()  # none, where someone kept this
    own_save = patches.before.get(_SAVE, functools.partial(type(model).save_pretrained, model))
    with patches.lifted(model):
        return own_save(*args, **kwargs)
