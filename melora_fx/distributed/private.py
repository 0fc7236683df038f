"""Undocumented functions of torch and transformers that models on several processes need.

An upgrade that removes one breaks this file and `tests/test_private.py`, which calls all of them.
"""

import inspect
from typing import Any

from torch import nn


def shard_size_and_offset(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the size of this process's part of a DTensor in each dimension, and its offset in the full tensor; torch
    has no public function for this. torch 2.13.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # slow to import, so only here

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def class_below_fsdp(cls: type) -> type | None:
    """Returns the class that a module had before `fully_shard` exchanged it for `cls`, or None if `cls` is not from
    `fully_shard`. torch 2.13.
    """
    is_on_top = len(cls.__mro__) > 2 and cls.__mro__[1].__name__ == "FSDPModule"
    return cls.__mro__[2] if is_on_top else None


def fsdp_class(cls: type) -> type:
    """Returns the class that `fully_shard` derives from `cls`; `fully_shard` itself would shard parameters too. torch
    2.13.
    """
    from torch.distributed.fsdp import FSDPModule  # slow to import, so only here
    from torch.distributed.fsdp._fully_shard._fully_shard import _unimplemented_deepcopy, cls_to_fsdp_cls

    if cls not in cls_to_fsdp_cls:
        own = {"__deepcopy__": _unimplemented_deepcopy}
        cls_to_fsdp_cls[cls] = type(f"FSDP{cls.__name__}", (FSDPModule, cls), own)
    return cls_to_fsdp_cls[cls]


def forget_parameters(module: Any) -> None:
    """Stops FSDP from gathering parameters that have been removed from their modules; FSDP has no public way. torch
    2.13 and 2.15.
    """
    groups = module._get_fsdp_state()._fsdp_param_groups
    for group in groups:
        group.fsdp_params[:] = [
            each for each in group.fsdp_params if each._module_info.param_name in each._module_info.module._parameters
        ]
        if getattr(group, "_reduce_scatter_param_indices", None):  # in torch 2.15: places in `fsdp_params`
            group._init_reduce_scatter_param_order()
            group._fsdp_params_with_wider_grad_dtype = [
                each for each in group._fsdp_params_with_wider_grad_dtype if each in group.fsdp_params
            ]
    groups[:] = [group for group in groups if group.fsdp_params]


def is_managed_by_fsdp(module: nn.Module) -> bool:
    """Returns whether `fully_shard` was called with `module` or with a module above it, by the flag that Dynamo reads.
    torch 2.13.
    """
    return getattr(module, "_is_fsdp_managed_module", False)


def tensor_parallel_forward(module: nn.Module) -> tuple[Any, Any] | None:
    """Returns (style, mesh) if transformers' tensor parallelism has put its own forward on `module`, around that of the
    class; otherwise None. `style.install_forward(module, mesh)` puts it back. transformers 5.24.
    """
    forward: Any = vars(module).get("forward")
    if getattr(forward, "__module__", None) != "transformers.distributed.tensor_parallel":
        return None
    held = inspect.getclosurevars(forward).nonlocals
    return (held["self"], held["mesh"]) if held.get("module") is module else None
