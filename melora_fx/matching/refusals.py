"""Models that are refused whole, before anything is looked for in them."""

import itertools
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from melora_fx.adapter.site import MODULE_MARK
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


_DISTRIBUTED = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule", "DTensor"}


def refuse_distributed(model: nn.Module, action: str) -> None:
    """Raises MELoRAError where `model` is wrapped by DDP, FSDP or DataParallel, or has a DTensor."""
    plain = set[type]()  # each class is looked at once: `disabled` comes here in every step of some trainings
    for path, value in itertools.chain[tuple[str, Any]](model.named_modules(), model.named_parameters()):
        if type(value) in plain:
            continue
        kinds = [cls.__name__ for cls in type(value).__mro__ if cls.__module__.startswith("torch.")]
        kind = next((name for name in kinds if name in _DISTRIBUTED), None)
        if kind is None:
            plain.add(type(value))
            continue
        where = f"`{path}`" if path else "the model"
        raise MELoRAError(
            f"`{action}`: {where} is a {kind}: models that are wrapped for several devices, or sharded, are not "
            "supported; call it with the plain model inside (`model.module`), before wrapping or sharding"
        )
