"""Models that are refused whole, before anything is looked for in them."""

from collections.abc import Iterable

import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import is_lazy

from melora_fx.adapter.site import MODULE_MARK
from melora_fx.distributed.wrappers import wrapped_modules, wrapper_around
from melora_fx.distributed.zero import absent_parameters, have_copies_in_optimizer, is_partitioned
from melora_fx.errors import MELoRAError
from melora_fx.names import first_of, unwrap, without_wrappers


def refuse_rewritten(model: nn.Module) -> None:
    """Raises MELoRAError where `model` has been rewritten."""
    names = [
        without_wrappers(path) or type(module).__name__
        for path, module in unwrap(model).named_modules()
        if MODULE_MARK in vars(module)
    ]
    if names:
        raise MELoRAError(
            f"the model is already rewritten ({len(names)} modules, the first `{names[0]}`): `fold` it first, or "
            "`load_adapter` to change the adapter's values"
        )


def refuse_lazy(model: nn.Module) -> None:
    """Raises MELoRAError where parameters of `model` have no shape yet."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    names = [f"`{name}`" for name, value in tensors if is_lazy(value)]
    if names:
        raise MELoRAError(
            f"{first_of(names)}: of a lazy module that has no shape yet: call the model once, then `rewrite`"
        )


def refuse_distributed(model: nn.Module) -> None:
    """Raises MELoRAError where DDP, FSDP, DataParallel or DeepSpeed is in `model`, or around it."""
    path, name = next(wrapped_modules(model), ("", None))
    name = name or wrapper_around(model)
    if name is None:
        return
    where = f"`{path}`" if path else "the model"
    raise MELoRAError(
        f"{where} is wrapped by {name}, which has prepared for the parameters that it found: `rewrite` the plain "
        "model, then wrap it"
    )


def refuse_replaced_linear() -> None:
    """Raises MELoRAError where DeepSpeed's ZeRO-3 has replaced the function that all linears are told by."""
    if str(F.linear.__module__).startswith("deepspeed."):
        raise MELoRAError(
            "ZeRO-3 has put a function of its own into the place of `torch.nn.functional.linear`, so that no linear is "
            "recognised: `rewrite` before, or set `memory_efficient_linear` to false in its `zero_optimization`"
        )


def refuse_opaque(model: nn.Module, action: str) -> None:
    """Raises MELoRAError for wrappers below which no adapter can be read."""
    for path, name in wrapped_modules(unwrap(model), is_opaque=True):
        if name == "DistributedDataParallel":
            raise MELoRAError(
                f"`{action}`: `{path}` is wrapped by DistributedDataParallel, whose names no other model has: wrap the "
                "whole model"
            )
        where = f"`{path}`" if path else "the model"
        raise MELoRAError(
            f"`{action}`: {where} is a {name}, which keeps parameters of its own: call it with the plain model inside "
            "(`model.module`), or shard by `fully_shard`"
        )


def refuse_partitioned(model: nn.Module, action: str) -> None:
    """Raises MELoRAError where DeepSpeed's ZeRO-3 has left no values of parameters here to be read."""
    if names := absent_parameters(unwrap(model)):
        raise MELoRAError(
            f"`{action}`: ZeRO-3 has partitioned {len(names)} parameters (the first is `{names[0]}`), and their values "
            "are not here: on every process, call it inside "
            "`with deepspeed.zero.GatheredParameters(list(model.parameters())):`"
        )


def refuse_change_under_zero3(model: nn.Module, action: str) -> None:
    """Raises MELoRAError where DeepSpeed's ZeRO-3 would lose what is written into parameters."""
    if is_partitioned(model):
        raise MELoRAError(
            f"`{action}`: ZeRO-3 partitions the model's parameters, and would lose what is written into them: "
            "`save_adapter`, then load and fold it where DeepSpeed is not"
        )


def refuse_copies_in_optimizer(trained: Iterable[nn.Parameter], action: str) -> None:
    """Raises MELoRAError where an optimizer of DeepSpeed's would write values of its own over the parameters."""
    if have_copies_in_optimizer(trained):
        raise MELoRAError(
            f"`{action}`: DeepSpeed's optimizer holds copies of the model's parameters, and would write them back in "
            f"its next step: call `{action}` before `deepspeed.initialize`"
        )
