"""What modules whose class is exchanged have in common: the root, and those with adapters, which run a graph of ours or
their own forward.
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
    """A module whose class has been exchanged for a subclass of it that is made here.

    Attributes:
        melora_replaced: the class before; of the exchanged class itself, and not of those that a user makes below it.
    """

    melora_replaced: ClassVar[type]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Whoever calls an exchanged class makes a plain module; of a class below it one of that."""
        replaced = vars(cls).get("melora_replaced")
        return super().__new__(cls) if replaced is None else replaced(*args, **kwargs)

    def __init_subclass__(cls) -> None:
        """Keeps what a user's class does for each of its subclasses from those that are made here."""

    def _replicate_for_data_parallel(self) -> Any:
        """What `nn.DataParallel` runs on another device: torch's own way would call the class."""
        replica: Any = object.__new__(type(self))
        _, buffers, modules = registered(self)
        own = {"_parameters": {}, "_buffers": dict(buffers), "_modules": dict(modules), "_is_replica": True}
        vars(replica).update(vars(self) | own)
        return replica


class AdaptedModule(ExchangedModule):
    """The part of a rewritten module's class that is ours.

    Attributes:
        melora_mark: its sites, and what it does for a while instead.
        melora_class: the class that the module has without adapters.
        melora_products: the products with its weights that Python of the user's computes.
        melora_usual: those of them that are calls as `live.products.call_again` takes, by their keys.
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
        """Whoever shards a linear puts DTensors into the place of its parameters: the adapter follows the weight."""
        mark: ModuleMark | None = vars(self).get(MODULE_MARK)  # none on a module of a class below this one
        record = next((each for each in mark.records if name in own_names(each)), None) if mark else None
        was_sharded = is_sharded(registered(self)[0].get(name))  # then others put a loaded one into its place
        if mark is None or record is None or not is_sharded(param) or was_sharded or is_called_by_fsdp():
            super().register_parameter(name, param)
            return
        if name != record.parameter:  # cut as the style cuts the weight, or whole
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
            dropout = vars(self).get(record.attribute(DROPOUT))  # of a sharded linear, which holds it as no child
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
    """What the class of rewritten modules has that were of the class `original`."""
    return {"melora_replaced": original, "melora_class": original, "melora_products": {}, "melora_usual": {}}


def subclass_of(half: type, original: type, own: dict[str, Any]) -> type:
    """A new class with the name of `original`, of `half`, an ExchangedModule, and `original`; `own`: its attributes."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    bases = (original,) if issubclass(original, half) else (half, original)
    return type(original.__name__, bases, names | {"melora_replaced": original} | own)


def with_blank(reduced: Any, module: nn.Module, blank: Callable[[type], Any], cls: type) -> tuple[Any, ...]:
    """What `__reduce_ex__` has given for `module`, with `blank(cls)` in the place of its class, which no file can name;
    what a user's own `__reduce__` has given stays.
    """
    made, arguments, *state = reduced
    return (blank, (cls,), *state) if arguments[:1] == (type(module),) else (made, arguments, *state)


def refuse_copy_inside_folded(module: AdaptedModule) -> None:
    """Raises MELoRAError while the weights of `module` are folded for a while."""
    if module.melora_mark.is_folded:
        raise MELoRAError("a copy made inside `folded` would hold the adapter twice: copy the model outside of it")


def code_of(module: AdaptedModule) -> str:
    """The Python code that computes its sites: of its graph, or of the products with its weights that are known."""
    if isinstance(module, fx.GraphModule):
        return module.code
    return "\n".join(product.code for product in module.melora_products.values())


def rewritten_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedModule]]:
    """Every rewritten module of `model` with its path."""
    for path, module in unwrap(model).named_modules():
        if isinstance(module, AdaptedModule) and MODULE_MARK in vars(module):
            yield without_wrappers(path), module
