"""Refuses whole models, before anything in them is searched."""

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
    """Raises MELoRAError if `model` has been rewritten."""
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
    """Raises MELoRAError if parameters or buffers of `model` have no shape yet."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    names = [f"`{name}`" for name, value in tensors if is_lazy(value)]
    if names:
        raise MELoRAError(f"{first_of(names)}: lazy modules have no shapes yet: call the model once, then `rewrite`")


def refuse_distributed(model: nn.Module) -> None:
    """Raises MELoRAError if DDP, FSDP, DataParallel or DeepSpeed is in `model`, or around it."""
    path, name = next(wrapped_modules(model), ("", None))
    name = name or wrapper_around(model)
    if name is None:
        return
    where = f"`{path}`" if path else "the model"
    raise MELoRAError(
        f"{where} is wrapped by {name}, which was set up for the parameters that it found: `rewrite` the plain "
        "model, then wrap it"
    )


def refuse_replaced_linear() -> None:
    """Raises MELoRAError if DeepSpeed's ZeRO-3 has replaced `F.linear`, by which linears are recognised."""
    if str(F.linear.__module__).startswith("deepspeed."):
        raise MELoRAError(
            "ZeRO-3 has replaced `torch.nn.functional.linear` with its own function, so no linear is recognised: "
            "`rewrite` before that, or set `memory_efficient_linear` to false in its `zero_optimization`"
        )


def refuse_opaque(model: nn.Module, action: str) -> None:
    """Raises MELoRAError if `model` has a wrapper below which no adapter can be read."""
    for path, name in wrapped_modules(unwrap(model), is_opaque=True):
        if name == "DistributedDataParallel":
            raise MELoRAError(
                f"`{action}`: `{path}` is wrapped by DistributedDataParallel, which gives its parameters names that no "
                "other model has: wrap the whole model"
            )
        where = f"`{path}`" if path else "the model"
        raise MELoRAError(
            f"`{action}`: {where} is a {name}, which keeps its own parameters: call it with the plain model inside "
            "(`model.module`), or shard with `fully_shard`"
        )


def refuse_partitioned(model: nn.Module, action: str) -> None:
    """Raises MELoRAError if DeepSpeed's ZeRO-3 has left no values of some parameters on this process."""
    if names := absent_parameters(unwrap(model)):
        raise MELoRAError(
            f"`{action}`: ZeRO-3 has partitioned {len(names)} parameters (the first is `{names[0]}`), and their values "
            "are not on this process: call it on every process, inside "
            "`with deepspeed.zero.GatheredParameters(list(model.parameters())):`"
        )


def refuse_change_under_zero3(model: nn.Module, action: str) -> None:
    """Raises MELoRAError if DeepSpeed's ZeRO-3 would lose what is written into parameters."""
    if is_partitioned(model):
        raise MELoRAError(
            f"`{action}`: ZeRO-3 partitions the model's parameters, and would lose what is written into them: "
            "call `save_adapter`, then load and fold the adapter without DeepSpeed"
        )


def refuse_copies_in_optimizer(trained: Iterable[nn.Parameter], action: str) -> None:
    """Raises MELoRAError if an optimizer of DeepSpeed would overwrite the parameters with its own copies."""
    if have_copies_in_optimizer(trained):
        raise MELoRAError(
            f"`{action}`: DeepSpeed's optimizer holds copies of the model's parameters, and would write them back in "
            f"its next step: call `{action}` before `deepspeed.initialize`"
        )
