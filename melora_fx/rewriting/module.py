"""A module that runs a rewritten graph, and remembers what its sites are.

The module keeps its identity: its class is exchanged for a subclass that is also a `torch.fx.GraphModule`, as
`torch.nn.utils.parametrize` and FSDP2 do, so parameters, hooks, attributes, `isinstance` and whoever else holds the
module go on as before, and `uninstall` gives the class back. GraphModule's own copying and pickling drop attributes,
metadata and hooks (they rebuild the module from its code); here both keep everything.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from melora_fx.adapter.site import MODULE_MARK, SiteRecord
from melora_fx.capture.graphs import copy_graph
from melora_fx.errors import MELoRAError
from melora_fx.lowering.quantized_gradient import call_base
from melora_fx.names import unwrap, without_wrappers
from melora_fx.torch_private import GRAPH_SPECS, MADE_FROM_GRAPH

from .graph_device import devices_of, put_module_on_device
from .graph_pickle import dump_graph, load_graph
from .marks import ModuleMark
from .meta_device import on_meta_device, renew_adapters
from .module_class import class_key, class_of
from .running import adapted_graph, run_adapted, run_base, without_adapters

_PICKLED_GRAPH = "melora_graph"
"""Key of the pickled graph in a pickled module's state."""

_PICKLED_DEVICES = "melora_devices"
"""Key of the devices that its tensors were on; `torch.load` may bring them to others."""


class RewrittenModule(fx.GraphModule):
    """The GraphModule half of a module that `install` has changed.

    Its forward, on the class, is made by `running.choosing_forward`; `module_class.py` says which modules share one.

    Attributes:
        melora_mark: its sites, and what it does for a while instead.
        restored_class: the class that the module has without adapters; GraphModule for all of the per-instance classes.
        base_code, base_function, base_graph: the base of this class, made by the first `run_base`, and the adapted code
            that it was made from.
    """

    melora_mark: ModuleMark
    restored_class: ClassVar[type]
    base_code: ClassVar[str] = ""
    base_function: ClassVar[Callable[..., Any]]
    base_graph: ClassVar[fx.Graph]

    def recompile(self) -> fx.graph.PythonCode:
        """Makes the code from the graph, and puts the module into the class of all modules that run that code."""
        if "forward" in vars(type(self)):  # others may have this class too, and GraphModule writes the forward on it
            self.__class__ = _rewritten_class(self.restored_class)
        code = super().recompile()
        self.graph.owning_module = None  # else the two keep each other alive
        key = class_key(self, self.restored_class, self.melora_mark.records, code)
        self.__class__ = class_of(key, self, self.melora_mark.records)
        return code

    def base_forward(self, *inputs: Any) -> torch.Tensor:
        """The forward that the module had before, for a graph that calls it as its base."""
        original: Any = self.restored_class
        return call_base(self, original.forward, *inputs)

    def __copy__(self) -> "RewrittenModule":
        copied = _blank(self.restored_class)
        vars(copied).update(self._own_state())
        copied.graph = copy_graph(adapted_graph(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "RewrittenModule":
        copied = _blank(self.restored_class)
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(self._own_state(), memo))
        copied.graph = copy_graph(adapted_graph(self))
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self._own_state() | {
            _PICKLED_GRAPH: dump_graph(adapted_graph(self)),
            _PICKLED_DEVICES: devices_of(self),
        }
        return _blank, (self.restored_class,), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph = load_graph(state.pop(_PICKLED_GRAPH))
        devices = state.pop(_PICKLED_DEVICES, set())  # earlier commits wrote none
        super().__setstate__(state)
        if self.restored_class is fx.GraphModule:
            put_module_on_device(self, graph, devices, devices_of(self))
        self.graph = graph

    def _own_state(self) -> dict[str, Any]:
        """What a copy takes over: all but the graph, what is made from it, and a base that runs for a while."""
        if self.melora_mark.is_folded:
            raise MELoRAError("a copy made inside `folded` would hold the adapter twice: copy the model outside of it")
        if parametrize.is_parametrized(self):
            raise MELoRAError(
                f"a {self.restored_class.__name__} that was parametrized after `rewrite` cannot be copied: call "
                "`torch.nn.utils.parametrize.remove_parametrizations` first"
            )
        own = {key: value for key, value in vars(self).items() if key not in MADE_FROM_GRAPH}
        return own | {MODULE_MARK: ModuleMark(self.melora_mark.records)}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "RewrittenModule":
        moved = on_meta_device(self, self.melora_mark.records)
        with self._followed_by_graph():
            super()._apply(fn, recurse)
            renew_adapters(self, self.melora_mark.records, moved)
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        with self._followed_by_graph():
            result = super().load_state_dict(*args, **kwargs)
            renew_adapters(self, self.melora_mark.records)
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        renew_adapters(self, self.melora_mark.records)

    @contextmanager
    def _followed_by_graph(self) -> Iterator[None]:
        """If the block moves the tensors, the graph of a whole model follows; one traced in place names no devices
        but those that the user's code does.
        """
        before = devices_of(self) if self.restored_class is fx.GraphModule else set[torch.device]()
        yield
        if not before or not put_module_on_device(self, adapted_graph(self), before, devices_of(self)):
            return
        runs_base = self.melora_mark.adapted_graph is not None
        run_adapted(self)
        self.recompile()
        if runs_base:
            run_base(self)


def install(module: nn.Module, graph: fx.Graph, records: list[SiteRecord]) -> RewrittenModule:
    """Makes `module` run `graph` from now on; the same object comes back."""
    defaults = vars(fx.GraphModule(nn.Module(), fx.Graph()))
    vars(module).update({key: value for key, value in defaults.items() if key not in vars(module)})
    module.__class__ = _rewritten_class(_restored_class(module))
    assert isinstance(module, RewrittenModule)
    module.melora_mark = ModuleMark(records)
    module.graph = graph
    return module


def uninstall(module: RewrittenModule) -> None:
    """Gives `module` its class back. A module that was a GraphModule keeps its graph without the adapters."""
    own = vars(module)
    original = module.restored_class
    graph = adapted_graph(module)
    if not replaced_forward(module):
        own.pop("forward", None)
    del own[MODULE_MARK]
    if original is fx.GraphModule:
        plain = fx.GraphModule(nn.Module(), fx.Graph())  # has a class of its own
        module.__class__ = cast("type[RewrittenModule]", type(plain))
        module.graph = without_adapters(graph)
        return
    for key in _graph_module_attributes():
        own.pop(key, None)
    module.__class__ = cast("type[RewrittenModule]", original)


@functools.cache
def _graph_module_attributes() -> tuple[str, ...]:
    """What a GraphModule has and a plain module has not."""
    plain = fx.GraphModule(nn.Module(), fx.Graph())
    return *(vars(plain).keys() - vars(nn.Module()).keys()), *GRAPH_SPECS


def replaced_forward(module: RewrittenModule) -> bool:
    """Whether someone has put another `forward` on the instance, around the one that the class has."""
    return "forward" in vars(module) and getattr(module.forward, "__func__", None) is not type(module).forward


def rewritten_modules(model: nn.Module) -> Iterator[tuple[str, RewrittenModule]]:
    """Every rewritten module of `model` with its path."""
    for path, module in unwrap(model).named_modules():
        if isinstance(module, RewrittenModule):
            yield without_wrappers(path), module


def class_name(model: nn.Module) -> str:
    """Name of the class that `model` has when it is not rewritten."""
    inner = unwrap(model)
    return vars(inner).get("model_class", _restored_class(inner).__name__)


def _restored_class(module: nn.Module) -> type:
    """The class that `module` had, or has, when it is not rewritten; GraphModule for all its per-instance classes."""
    if isinstance(module, RewrittenModule):
        return module.restored_class
    return fx.GraphModule if isinstance(module, fx.GraphModule) else type(module)


def _rewritten_class(original: type) -> type:
    """A new class for modules of the class `original`, without a forward yet."""
    bases = (RewrittenModule,) if original is fx.GraphModule else (RewrittenModule, original)
    return type(f"MELoRA{original.__name__}", bases, {"restored_class": original})


def _blank(original: type) -> Any:
    """An object without attributes that will be a rewritten module."""
    return object.__new__(_rewritten_class(original))
