"""Models that are refused whole, before anything is looked for in them."""

from torch import nn
from torch.nn.parameter import is_lazy

from melora_fx.adapter.site import MODULE_MARK
from melora_fx.distributed.wrappers import wrapped_modules, wrapper_around
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
    """Raises MELoRAError where DDP, FSDP or DataParallel is in `model`, or around it."""
    path, name = next(wrapped_modules(model), ("", None))
    name = name or wrapper_around(model)
    if name is None:
        return
    where = f"`{path}`" if path else "the model"
    raise MELoRAError(
        f"{where} is wrapped by {name}, which has prepared for the parameters that it found: `rewrite` the plain "
        "model, then wrap it"
    )


def refuse_opaque(model: nn.Module, action: str) -> None:
    """Raises MELoRAError for wrappers below which no adapter can be read."""
    for path, name in wrapped_modules(model, is_opaque=True):
        where = f"`{path}`" if path else "the model"
        raise MELoRAError(
            f"`{action}`: {where} is a {name}, which keeps parameters of its own: call it with the plain model inside "
            "(`model.module`), or shard by `fully_shard`"
        )
