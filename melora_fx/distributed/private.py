"""What models on several processes borrow of torch and transformers that they do not document.

An upgrade that takes a name away breaks this file, and `tests/test_private.py`, which calls every one.
"""

import inspect
from typing import Any

from torch import nn


def shard_size_and_offset(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(size, offset) in each dimension of what this process holds of a DTensor, in the whole; no public way tells.
    torch 2.13.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # heavy: only where it is used

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def class_below_fsdp(cls: type) -> type | None:
    """The class that a module had when `fully_shard` put `cls` on top of it; None where `cls` is of no such making.
    torch 2.13.
    """
    is_on_top = len(cls.__mro__) > 2 and cls.__mro__[1].__name__ == "FSDPModule"
    return cls.__mro__[2] if is_on_top else None


def fsdp_class(cls: type) -> type:
    """The class that `fully_shard` puts on top of `cls`; it would shard parameters too. torch 2.13."""
    from torch.distributed.fsdp import FSDPModule  # heavy: only where it is used
    from torch.distributed.fsdp._fully_shard._fully_shard import _unimplemented_deepcopy, cls_to_fsdp_cls

    if cls not in cls_to_fsdp_cls:
        own = {"__deepcopy__": _unimplemented_deepcopy}
        cls_to_fsdp_cls[cls] = type(f"FSDP{cls.__name__}", (FSDPModule, cls), own)
    return cls_to_fsdp_cls[cls]


def forget_parameters(module: Any) -> None:
    """FSDP no longer gathers parameters that modules have no more: there is no way to say so. torch 2.13."""
    groups = module._get_fsdp_state()._fsdp_param_groups
    for group in groups:
        group.fsdp_params[:] = [
            each for each in group.fsdp_params if each._module_info.param_name in each._module_info.module._parameters
        ]
    groups[:] = [group for group in groups if group.fsdp_params]


def is_managed_by_fsdp(module: nn.Module) -> bool:
    """Whether `fully_shard` was called with `module` or one that it is in; this is how Dynamo knows it. torch 2.13."""
    return getattr(module, "_is_fsdp_managed_module", False)


def tensor_parallel_forward(module: nn.Module) -> tuple[Any, Any] | None:
    """(style, mesh) where transformers' tensor parallelism has put a forward of its own on `module`, around that of the
    class; None elsewhere. `style.install_forward(module, mesh)` puts it there again. transformers 5.24.
    """
    forward: Any = vars(module).get("forward")
    if getattr(forward, "__module__", None) != "transformers.distributed.tensor_parallel":
        return None
    held = inspect.getclosurevars(forward).nonlocals
    return (held["self"], held["mesh"]) if held.get("module") is module else None
