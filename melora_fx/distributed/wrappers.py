"""Wrappers around a model for several processes: DDP, FSDP2, DeepSpeed, and those that no adapter goes through."""

import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor, nn

from .private import class_below_fsdp, forget_parameters, fsdp_class, is_managed_by_fsdp
from .tensors import is_sharded

_WRAPPERS = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}
_OPAQUE = {"DataParallel", "FullyShardedDataParallel", "DistributedDataParallel"}
"""Those below which no verb finds a model's own parameters, for they are flattened or copied, or its own names: DDP,
where it is not around the whole model.
"""


def wrapper_name(value: object, names: set[str] = _WRAPPERS) -> str | None:
    """What its package calls the wrapper that `value` is, one of `names`; None for what is none."""
    kinds = (cls.__name__ for cls in type(value).__mro__ if cls.__module__.startswith(("torch.", "deepspeed.")))
    return next((name for name in kinds if name in names), None)


def wrapped_modules(model: nn.Module, *, is_opaque: bool = False) -> Iterator[tuple[str, str]]:
    """(path, name) of each wrapper in `model`, itself included; `is_opaque`: only those that no verb looks into."""
    names = _OPAQUE if is_opaque else _WRAPPERS
    plain = set[type]()  # each class is looked at once: `disabled` comes here in every step of some trainings
    for path, module in model.named_modules():
        if type(module) in plain:
            continue
        name = wrapper_name(module, names)
        if name is None:
            plain.add(type(module))
        else:
            yield path, name


def wrapper_around(model: nn.Module) -> str | None:
    """The name of a wrapper that `model` or a part of it is in, although it is none itself; None where there is none.

    A model does not know who wraps it, and DDP has prepared its reductions by then: so all objects are looked at, in a
    process that has a process group.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    if _wrapper_around(model) is None:
        return None
    gc.collect()  # one that has been given up holds itself
    return _wrapper_around(model)


def _wrapper_around(model: nn.Module) -> str | None:
    own = {id(module) for module in model.modules()}
    for value in gc.get_objects():
        kinds = type(value).__mro__
        if nn.Module not in kinds or (name := wrapper_name(value, _WRAPPERS - {"DataParallel"})) is None:
            continue
        is_made = "_modules" in vars(value)  # else its `__init__` has not come so far
        if is_made and id(value) not in own and any(id(module) in own for module in value.modules()):
            return name
    return None


def is_fsdp(module: Any) -> bool:
    """Whether `fully_shard` was called with `module`."""
    return wrapper_name(module, {"FSDPModule"}) is not None


def is_held_from_above(owner: nn.Module, parameters: Iterable[Tensor]) -> bool:
    """Whether FSDP has put whole parameters on `owner`, although all modules that are known have been resharded: they
    are those of a module above. `parameters`: some of its own.
    """
    return is_managed_by_fsdp(owner) and not any(is_sharded(parameter) for parameter in parameters)


def reshard(model: nn.Module) -> None:
    """Every module's parameters are again those that FSDP shards: a root has whole ones after its forward, and what is
    written into these is lost.
    """
    if "torch.distributed.fsdp" not in sys.modules:  # nobody has sharded anything
        return
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()  # type: ignore[operator]  # of FSDPModule


def class_inside(module: nn.Module) -> type:
    """The class of `module` without FSDP's on top of it."""
    return class_below_fsdp(type(module)) or type(module)


def put_class(module: nn.Module, cls: type) -> None:
    """Exchanges the class of `module`, whatever its own `__setattr__` does; below FSDP's, where that is on top."""
    object.__setattr__(module, "__class__", fsdp_class(cls) if class_below_fsdp(type(module)) else cls)


@contextmanager
def without_fsdp_class(module: nn.Module) -> Iterator[None]:
    """Inside the block `module` has its class without FSDP's, which is behind it on top of the one that it has then."""
    is_on_top = class_below_fsdp(type(module)) is not None
    object.__setattr__(module, "__class__", class_inside(module))
    yield
    if is_on_top:
        object.__setattr__(module, "__class__", fsdp_class(type(module)))


def forget_removed(model: nn.Module) -> None:
    """FSDP no longer gathers what has been removed from the modules of `model`."""
    for module in model.modules():
        if is_fsdp(module):
            forget_parameters(module)


def is_called_by_fsdp() -> bool:
    """Whether FSDP has called the function that calls this one."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith("torch.distributed.fsdp"):
            return True
        frame = frame.f_back
    return False
