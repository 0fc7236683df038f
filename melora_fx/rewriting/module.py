"""The class of modules that run a rewritten graph and record its sites.

A module keeps its identity: its class is exchanged for a subclass that is also a `torch.fx.GraphModule`.
`torch.nn.utils.parametrize` and FSDP2 exchange classes too. So parameters, hooks, attributes, `isinstance` and other
references to the module keep working, and `uninstall` restores the class. GraphModule's own copying and pickling drop
attributes, metadata and hooks, because they rebuild the module from its code; the methods here keep everything.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from melora_fx.adapter.site import MODULE_MARK, SiteRecord
from melora_fx.capture.graphs import copy_graph
from melora_fx.distributed.private import tensor_parallel_forward
from melora_fx.distributed.wrappers import class_inside, put_class, without_fsdp_class
from melora_fx.errors import MELoRAError
from melora_fx.live.weight_property import add_weight_properties
from melora_fx.lowering.quantized_gradient import call_base
from melora_fx.names import unwrap
from melora_fx.torch_private import GRAPH_SPECS, MADE_FROM_GRAPH

from .adapted_module import AdaptedModule, attributes_of_class, refuse_copy_inside_folded
from .graph_device import devices_of, put_module_on_device
from .graph_pickle import dump_graph, load_graph
from .marks import ModuleMark
from .module_class import class_key, class_of
from .running import adapted_graph, run_adapted, run_base, weights_behind_properties, without_adapters

_PICKLED_GRAPH = "melora_graph"
"""The key of the pickled graph in a pickled module's state."""

_PICKLED_DEVICES = "melora_devices"
"""The key of the devices that the module's tensors were on; `torch.load` may put them on others."""


class RewrittenModule(AdaptedModule, fx.GraphModule):
    """The GraphModule half of a module that `install` has changed.

    `running.choosing_forward` builds the forward of the class; `module_class.py` says which modules share a class.

    Attributes:
        melora_class: the class of the module without adapters; GraphModule instead of its per-instance classes.
        base_code, base_function, base_graph: the adapted code from which the first `run_base` has built the base, and
            the base's function and graph.
    """

    base_code: ClassVar[str] = ""
    base_function: ClassVar[Callable[..., Any]]
    base_graph: ClassVar[fx.Graph]

    def recompile(self) -> fx.graph.PythonCode:
        """Generates the code from the graph, and puts the module into the class of all modules that run that code."""
        if "forward" in vars(type(self)):  # GraphModule sets the class's forward, but others may share this class
            self.__class__ = _rewritten_class(self.melora_class)
        for parameter in weights_behind_properties(self):
            add_weight_properties(type(self), parameter)
        code = super().recompile()
        self.graph.owning_module = None  # otherwise the graph and the module keep each other alive
        key = class_key(self, self.melora_class, self.melora_mark.records, code)
        self.__class__ = class_of(key, self, self.melora_mark.records)
        return code

    def base_forward(self, *inputs: Any) -> torch.Tensor:
        """Runs the forward that the module had before `rewrite`, for a graph that calls it as its base."""
        original: Any = self.melora_class
        return call_base(self, original.forward, *inputs)

    def __copy__(self) -> "RewrittenModule":
        copied = _blank(self.melora_class)
        vars(copied).update(self._own_state())
        copied.graph = copy_graph(adapted_graph(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "RewrittenModule":
        copied = _blank(self.melora_class)
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(self._own_state(), memo))
        copied.graph = copy_graph(adapted_graph(self))
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self._own_state() | {
            _PICKLED_GRAPH: dump_graph(adapted_graph(self)),
            _PICKLED_DEVICES: devices_of(self),
        }
        return _blank, (self.melora_class,), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph = load_graph(state.pop(_PICKLED_GRAPH))
        devices = state.pop(_PICKLED_DEVICES, set())  # earlier commits wrote none
        super().__setstate__(state)
        if self.melora_class is fx.GraphModule:
            put_module_on_device(self, graph, devices, devices_of(self))
        self.graph = graph

    def _own_state(self) -> dict[str, Any]:
        """Returns the attributes that a copy takes over. They exclude the graph, everything generated from it, and
        the temporary switch to the base.
        """
        refuse_copy_inside_folded(self)
        if parametrize.is_parametrized(self):
            raise MELoRAError(
                f"a {self.melora_class.__name__} that was parametrized after `rewrite` cannot be copied: call "
                "`torch.nn.utils.parametrize.remove_parametrizations` first"
            )
        own = {key: value for key, value in vars(self).items() if key not in MADE_FROM_GRAPH}
        return own | {MODULE_MARK: ModuleMark(self.melora_mark.records, self.melora_mark.path)}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "RewrittenModule":
        with self._followed_by_graph():
            super()._apply(fn, recurse)
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        with self._followed_by_graph():
            return super().load_state_dict(*args, **kwargs)

    @contextmanager
    def _followed_by_graph(self) -> Iterator[None]:
        """Updates the devices in the graph of a whole model if the block moves the tensors. A graph traced in place
        names no devices except those in the user's code, so it stays.
        """
        before = devices_of(self) if self.melora_class is fx.GraphModule else set[torch.device]()
        yield
        if not before or not put_module_on_device(self, adapted_graph(self), before, devices_of(self)):
            return
        runs_base = self.melora_mark.runs_base
        run_adapted(self)
        self.recompile()
        if runs_base:
            run_base(self)


def install(module: nn.Module, graph: fx.Graph, records: list[SiteRecord], path: str) -> RewrittenModule:
    """Makes `module`, at `path` of its model, run `graph` from now on, and returns the same object."""
    defaults = vars(fx.GraphModule(nn.Module(), fx.Graph()))
    vars(module).update({key: value for key, value in defaults.items() if key not in vars(module)})
    module.__class__ = _rewritten_class(_restored_class(module))
    assert isinstance(module, RewrittenModule)
    vars(module)[MODULE_MARK] = ModuleMark(records, path)
    with _put_around_again(module):
        module.graph = graph
    return module


@contextmanager
def _put_around_again(module: nn.Module) -> Iterator[None]:
    """Removes the forward that transformers' tensor parallelism has put on `module`, and puts it back afterwards."""
    around = tensor_parallel_forward(module)
    if around:
        del vars(module)["forward"]
    yield
    if around:
        style, mesh = around
        style.install_forward(module, mesh)


def uninstall(module: AdaptedModule) -> None:
    """Restores the class of `module`. A module that was a GraphModule keeps its graph without the adapters."""
    with _put_around_again(module):
        _uninstall(module)


def _uninstall(module: AdaptedModule) -> None:
    own = vars(module)
    original = module.melora_class
    if not isinstance(module, RewrittenModule):
        del own[MODULE_MARK]
        put_class(module, original)
        return
    graph = adapted_graph(module)
    if not replaced_forward(module):
        own.pop("forward", None)
    del own[MODULE_MARK]
    if original is fx.GraphModule:
        plain = type(fx.GraphModule(nn.Module(), fx.Graph()))  # a fresh class, which gets the graph's forward
        with without_fsdp_class(module):
            put_class(module, plain)
            module.graph = without_adapters(graph)
        return
    for key in _graph_module_attributes():
        own.pop(key, None)
    put_class(module, original)


@functools.cache
def _graph_module_attributes() -> tuple[str, ...]:
    """Returns the names of the attributes that a GraphModule has and a plain module lacks."""
    plain = fx.GraphModule(nn.Module(), fx.Graph())
    return *(vars(plain).keys() - vars(nn.Module()).keys()), *GRAPH_SPECS


def replaced_forward(module: AdaptedModule) -> bool:
    """Returns whether someone has put another `forward` on the instance, around the one that we put on the class.

    The `forward` of transformers' tensor parallelism does not count.
    """
    if not isinstance(module, RewrittenModule) or tensor_parallel_forward(module):
        return False
    return "forward" in vars(module) and getattr(module.forward, "__func__", None) is not type(module).forward


def class_name(model: nn.Module) -> str:
    """Returns the name of the class that `model` has when it is not rewritten."""
    inner = unwrap(model)
    return vars(inner).get("model_class", _restored_class(inner).__name__)


def _restored_class(module: nn.Module) -> type:
    """Returns the class of `module` without adapters; GraphModule instead of its per-instance classes."""
    if isinstance(module, AdaptedModule):
        return module.melora_class
    return fx.GraphModule if isinstance(module, fx.GraphModule) else class_inside(module)


def _rewritten_class(original: type) -> type:
    """Returns a new class for rewritten modules of the class `original`, still without a forward."""
    bases = (RewrittenModule,) if original is fx.GraphModule else (RewrittenModule, original)
    return type(f"MELoRA{original.__name__}", bases, attributes_of_class(original))


def _blank(original: type) -> Any:
    """Returns an object without attributes, which becomes a rewritten module."""
    return object.__new__(_rewritten_class(original))
