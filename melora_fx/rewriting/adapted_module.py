"""The common part of modules whose class is exchanged: the root, and modules with adapters, which run either a graph of
`rewrite` or their own forward.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import fx, nn

from melora_fx.adapter.site import MODULE_MARK, own_names
from melora_fx.adapter.tensors import DROPOUT
from melora_fx.distributed.placement import lay, lay_adapter, misfit_of_sharded
from melora_fx.distributed.tensors import as_parameter, is_sharded
from melora_fx.distributed.wrappers import is_called_by_fsdp
from melora_fx.errors import MELoRAError
from melora_fx.live.products import Product
from melora_fx.names import unwrap, without_wrappers
from melora_fx.torch_private import registered

from .marks import ModuleMark
from .meta_device import on_meta_device, renew_adapters


class ExchangedModule(nn.Module):
    """A module whose class has been exchanged for a subclass that is created here.

    Attributes:
        melora_replaced: the class before the exchange. It is in `vars` of the exchanged class itself, but not of
            classes that a user derives from it.
    """

    melora_replaced: ClassVar[type]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Creates a plain module if `cls` is an exchanged class, and an instance of `cls` if a user has derived it."""
        replaced = vars(cls).get("melora_replaced")
        return super().__new__(cls) if replaced is None else replaced(*args, **kwargs)

    def __init_subclass__(cls) -> None:
        """Keeps a user's `__init_subclass__` from running for the subclasses that are created here."""

    def _replicate_for_data_parallel(self) -> Any:
        """Returns the replica that `nn.DataParallel` runs on another device. Torch's method would call the class."""
        replica: Any = object.__new__(type(self))
        _, buffers, modules = registered(self)
        own = {"_parameters": {}, "_buffers": dict(buffers), "_modules": dict(modules), "_is_replica": True}
        vars(replica).update(vars(self) | own)
        return replica


class AdaptedModule(ExchangedModule):
    """The part of a rewritten module's class that melora_fx adds.

    Attributes:
        melora_mark: the module's sites and its temporary state.
        melora_class: the class of the module without adapters.
        melora_products: the products with its weights that the user's Python code computes, by key.
        melora_usual: the products among them that `live.products.call_again` accepts, by the key of the call.
    """

    melora_mark: ModuleMark
    melora_class: ClassVar[type]
    melora_products: ClassVar[dict[str, Product]]
    melora_usual: ClassVar[dict[tuple[Any, ...], Product]]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "AdaptedModule":
        moved = on_meta_device(self, self.melora_mark.records)
        super()._apply(fn, recurse)
        renew_adapters(self, self.melora_mark.records, moved)
        return self

    def register_parameter(self, name: str, param: Any) -> None:
        """Registers `param`, and shards the adapter too if sharding replaces the linear's parameters with DTensors.

        Raises:
            MELoRAError: if the adapter cannot follow the sharded weight.
        """
        mark: ModuleMark | None = vars(self).get(MODULE_MARK)  # None if a user derived the module's class
        record = next((each for each in mark.records if name in own_names(each)), None) if mark else None
        was_sharded = is_sharded(registered(self)[0].get(name))  # then a loaded DTensor replaces the old one
        if mark is None or record is None or not is_sharded(param) or was_sharded or is_called_by_fsdp():
            super().register_parameter(name, param)
            return
        if name != record.parameter:  # A or B: sharded as its blocks allow, otherwise replicated
            super().register_parameter(name, as_parameter(lay(param.detach(), param), param))
            return
        is_linear = param.dim() == 2 and not record.weight_is_transposed and record.row_dims is None
        if reason := misfit_of_sharded(param, record.config, record.lowering, is_linear=is_linear):
            raise MELoRAError(f"`{record.site_name(mark.path)}`: {reason}")
        super().register_parameter(name, param)
        lay_adapter(self, record, param)

    def train(self, mode: bool = True) -> "AdaptedModule":
        super().train(mode)
        mark: ModuleMark | None = vars(self).get(MODULE_MARK)
        for record in mark.records if mark else ():
            dropout = vars(self).get(record.attribute(DROPOUT))  # a sharded linear does not hold it as a child
            if dropout is not None:
                dropout.train(mode)
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        renew_adapters(self, self.melora_mark.records)
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        renew_adapters(self, self.melora_mark.records)


def attributes_of_class(original: type) -> dict[str, Any]:
    """Returns the attributes for the class of rewritten modules that were of the class `original`."""
    return {"melora_replaced": original, "melora_class": original, "melora_products": {}, "melora_usual": {}}


def subclass_of(half: type, original: type, own: dict[str, Any]) -> type:
    """Returns a new class named like `original`, derived from `half`, an ExchangedModule, and from `original`.

    `own`: further attributes of the class.
    """
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    bases = (original,) if issubclass(original, half) else (half, original)
    return type(original.__name__, bases, names | {"melora_replaced": original} | own)


def with_blank(reduced: Any, module: nn.Module, blank: Callable[[type], Any], cls: type) -> tuple[Any, ...]:
    """Returns the result `reduced` of `__reduce_ex__` for `module`, with its class, which no pickle can name, replaced
    by `blank(cls)`. The result of a user-defined `__reduce__` is returned unchanged.
    """
    made, arguments, *state = reduced
    return (blank, (cls,), *state) if arguments[:1] == (type(module),) else (made, arguments, *state)


def refuse_copy_inside_folded(module: AdaptedModule) -> None:
    """Raises MELoRAError while the weights of `module` are temporarily folded."""
    if module.melora_mark.is_folded:
        raise MELoRAError("a copy made inside `folded` would contain the adapter twice: copy the model outside of it")


def code_of(module: AdaptedModule) -> str:
    """Returns the Python code that computes the sites of `module`: its graph's, or that of the known products."""
    if isinstance(module, fx.GraphModule):
        return module.code
    return "\n".join(product.code for product in module.melora_products.values())


def rewritten_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedModule]]:
    """Yields (path, module) for every rewritten module of `model`."""
    for path, module in unwrap(model).named_modules():
        if isinstance(module, AdaptedModule) and MODULE_MARK in vars(module):
            yield without_wrappers(path), module
