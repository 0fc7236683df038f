"""Wrappers around a model for several processes: DDP, FSDP2, DeepSpeed, and wrappers that adapters do not support."""

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
"""Wrappers that no function of melora_fx can look into. They flatten or copy the model's parameters, or change its
names, as DDP does unless it is around the whole model.
"""


def wrapper_name(value: object, names: set[str] = _WRAPPERS) -> str | None:
    """Returns the name of the wrapper class, one of `names`, that `value` is an instance of, or None."""
    kinds = (cls.__name__ for cls in type(value).__mro__ if cls.__module__.startswith(("torch.", "deepspeed.")))
    return next((name for name in kinds if name in names), None)


def wrapped_modules(model: nn.Module, *, is_opaque: bool = False) -> Iterator[tuple[str, str]]:
    """Yields (path, name) for each wrapper in `model`, itself included; with `is_opaque` only those of `_OPAQUE`."""
    names = _OPAQUE if is_opaque else _WRAPPERS
    plain = set[type]()  # check each class once, since some trainings call `disabled` in every step
    for path, module in model.named_modules():
        if type(module) in plain:
            continue
        name = wrapper_name(module, names)
        if name is None:
            plain.add(type(module))
        else:
            yield path, name


def wrapper_around(model: nn.Module) -> str | None:
    """Returns the name of a wrapper outside of `model` that contains `model` or a part of it, or None.

    A model does not know its wrapper, and DDP has already prepared its reductions. So all Python objects are searched,
    if the process has a process group.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    if _wrapper_around(model) is None:
        return None
    gc.collect()  # an abandoned wrapper is part of a reference cycle
    return _wrapper_around(model)


def _wrapper_around(model: nn.Module) -> str | None:
    own = {id(module) for module in model.modules()}
    for value in gc.get_objects():
        kinds = type(value).__mro__
        if nn.Module not in kinds or (name := wrapper_name(value, _WRAPPERS - {"DataParallel"})) is None:
            continue
        is_made = "_modules" in vars(value)  # otherwise its `__init__` has not got that far
        if is_made and id(value) not in own and any(id(module) in own for module in value.modules()):
            return name
    return None


def is_fsdp(module: Any) -> bool:
    """Returns whether `fully_shard` was called with `module`."""
    return wrapper_name(module, {"FSDPModule"}) is not None


def is_held_from_above(owner: nn.Module, parameters: Iterable[Tensor]) -> bool:
    """Returns whether FSDP has put full parameters on `owner`. After all known modules have been resharded, they belong
    to a module above. `parameters`: some parameters of `owner`.
    """
    return is_managed_by_fsdp(owner) and not any(is_sharded(parameter) for parameter in parameters)


def reshard(model: nn.Module) -> None:
    """Restores FSDP's sharded parameters on every module. After a forward its root has full parameters, and writes to
    them are lost.
    """
    if "torch.distributed.fsdp" not in sys.modules:  # nothing is sharded
        return
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()  # type: ignore[operator]  # of FSDPModule


def class_inside(module: nn.Module) -> type:
    """Returns the class of `module` without the class that FSDP has derived from it."""
    return class_below_fsdp(type(module)) or type(module)


def put_class(module: nn.Module, cls: type) -> None:
    """Exchanges the class of `module`, bypassing a custom `__setattr__`. FSDP's class stays on top if it is there."""
    object.__setattr__(module, "__class__", fsdp_class(cls) if class_below_fsdp(type(module)) else cls)


@contextmanager
def without_fsdp_class(module: nn.Module) -> Iterator[None]:
    """Takes FSDP's class off `module` inside the block, and puts it on top of the module's new class afterwards."""
    is_on_top = class_below_fsdp(type(module)) is not None
    object.__setattr__(module, "__class__", class_inside(module))
    yield
    if is_on_top:
        object.__setattr__(module, "__class__", fsdp_class(type(module)))


def forget_removed(model: nn.Module) -> None:
    """Stops FSDP from gathering parameters that have been removed from the modules of `model`."""
    for module in model.modules():
        if is_fsdp(module):
            forget_parameters(module)


def is_called_by_fsdp() -> bool:
    """Returns whether FSDP is among the callers of the function that calls this one."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith("torch.distributed.fsdp"):
            return True
        frame = frame.f_back
    return False
