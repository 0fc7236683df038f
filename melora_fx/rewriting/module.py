"""A module that runs a rewritten graph, and remembers what its sites are.

The module keeps its identity: its class is exchanged for a subclass that is also a `torch.fx.GraphModule`, as
`torch.nn.utils.parametrize` and FSDP2 do, so parameters, hooks, attributes, `isinstance` and whoever else holds the
module go on as before, and `uninstall` gives the class back. GraphModule's own copying and pickling drop attributes,
metadata and hooks (they rebuild the module from its code); here both keep everything.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, cast
from weakref import WeakValueDictionary

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from melora_fx.adapter.site import SiteRecord, owner_of
from melora_fx.adapter.tensors import new_adapter, num_matrices, scaling_tensor
from melora_fx.capture.graphs import copy_graph
from melora_fx.errors import MELoRAError
from melora_fx.lowering.grouped_blocks import grouped_blocks
from melora_fx.lowering.lower import lower
from melora_fx.lowering.quantized_gradient import call_base
from melora_fx.names import unwrap, without_wrappers
from melora_fx.patterns.node import weight_of
from melora_fx.torch_private import GRAPH_SPECS, MADE_FROM_GRAPH, put_graph, registered

from .graph_pickle import dump_graph, load_graph
from .running import choosing_forward, forward_of, uses, without_adapters

BASE, FOLDED = "melora_adapted_graph", "melora_folded"
"""Attributes of a rewritten module while its base runs (the graph put aside) and while its weights are folded."""


_CLASSES: WeakValueDictionary[Any, type] = WeakValueDictionary()
"""Classes in use, by the code and the operators of their graph and what its sites are."""


_GRAPH = "melora_graph"
"""Key of the pickled graph in a pickled module's state."""


class RewrittenModule(fx.GraphModule):
    """The GraphModule half of a module that `install` has changed."""

    melora_records: list[SiteRecord]
    restored_class: ClassVar[type]
    melora_adapted_graph: fx.Graph | None = None  # `BASE`
    base_code: ClassVar[str] = ""
    base_function: ClassVar[Callable[..., Any]]
    base_graph: ClassVar[fx.Graph]

    def __deepcopy__(self, memo: dict[int, Any]) -> "RewrittenModule":
        copied = _blank(_restored_class(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(self._own_state(), memo))
        copied.graph = copy_graph(self.adapted_graph)
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (_restored_class(self),), self._own_state() | {_GRAPH: dump_graph(self.adapted_graph)}

    def _own_state(self) -> dict[str, Any]:
        """What a copy takes over: all but the graph, what is made from it, and a base that runs for a while."""
        if FOLDED in vars(self):
            raise MELoRAError("a copy made inside `folded` would hold the adapter twice: copy the model outside of it")
        if parametrize.is_parametrized(self):
            raise MELoRAError(
                f"a {self.restored_class.__name__} that was parametrized after `rewrite` cannot be copied: call "
                "`torch.nn.utils.parametrize.remove_parametrizations` first"
            )
        passing = [*MADE_FROM_GRAPH, BASE]
        return {key: value for key, value in vars(self).items() if key not in passing}

    @property
    def adapted_graph(self) -> fx.Graph:
        """The graph with its adapters, also while the base runs in its place."""
        return self.melora_adapted_graph or self.graph

    def base_forward(self, *inputs: Any) -> torch.Tensor:
        """The forward that the module had before, for a graph that calls it as its base."""
        original: Any = self.restored_class
        return call_base(self, original.forward, *inputs)

    def recompile(self) -> fx.graph.PythonCode:
        """Makes the forward from the graph: the lowered one, and the plain one for where its nodes are needed.

        Modules of one code get one class, as layers have: code that Dynamo has compiled for one serves all.
        """
        if "forward" in vars(type(self)):
            self.__class__ = _rewritten_class(self.restored_class)  # the class that it had may be others' too
        code = super().recompile()
        self.graph.owning_module = None  # else the two keep each other alive
        sites = [(record.lowering, weight_of(self, record.parameter).shape) for record in self.melora_records]
        operators = [(name, id(value)) for name, value in code.globals.items()]
        key = self.restored_class, code.src, *operators, *sites
        if key in _CLASSES:
            self.__class__ = _CLASSES[key]
            return code
        plain = lowered = type(self).forward
        if any(record.lowering != "plain" for record in self.melora_records):
            lowered = forward_of(self, lower(self.graph, self, self.melora_records))
        type(self).forward = choosing_forward(plain, lowered, has_forward_mode=not uses(self.graph, grouped_blocks))
        _CLASSES[key] = type(self)
        return code

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "RewrittenModule":
        late = [
            record
            for record in self.melora_records
            if getattr(owner_of(self, record), record.attribute("lora_a")).is_meta
        ]
        super()._apply(fn, recurse)
        self._renew(late)
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        self._renew()
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._renew()

    def _renew(self, late: Iterable[SiteRecord] = ()) -> None:
        """Writes what is mere memory after a move from the meta device: the adapters of `late`, where they have left
        it, those that are still there although their weight is loaded, and the scalings, which no state holds.
        """
        for record in self.melora_records:
            owner, names = owner_of(self, record), [record.attribute(kind) for kind in ("lora_a", "lora_b")]
            old, weight = getattr(owner, names[0]), weight_of(self, record.parameter)
            if record in late and not old.is_meta:
                device = old.device
            elif old.is_meta and not weight.is_meta:
                device = weight.device
            else:
                continue
            rows, columns = weight.shape[-2:]
            shape = (rows, columns) if record.weight_is_transposed else (columns, rows)
            number = num_matrices(weight)
            tensors = new_adapter(record.config, *shape, num_experts=number, device=device, dtype=old.dtype)
            for name, fresh in zip(names, tensors, strict=True):
                setattr(owner, name, nn.Parameter(fresh, getattr(owner, name).requires_grad))
        self._refill_scalings()

    def _refill_scalings(self) -> None:
        for record in self.melora_records:
            owner, name = owner_of(self, record), record.attribute("lora_scaling")
            lora_b = getattr(owner, record.attribute("lora_b"))
            scaling = scaling_tensor(record.config, lora_b)
            buffers = registered(owner)[1]
            buffer = buffers[name]
            if buffer is not None and buffer.device == lora_b.device:
                buffer.data.copy_(scaling)
            else:
                buffers[name] = scaling

    def __copy__(self) -> "RewrittenModule":
        copied = _blank(_restored_class(self))
        copied.__dict__.update(self._own_state())
        copied.graph = copy_graph(self.adapted_graph)
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph = load_graph(state.pop(_GRAPH))
        super().__setstate__(state)
        self.graph = graph


def install(module: nn.Module, graph: fx.Graph, records: list[SiteRecord]) -> RewrittenModule:
    """Makes `module` run `graph` from now on; the same object comes back."""
    defaults = vars(fx.GraphModule(nn.Module(), fx.Graph()))
    module.__dict__.update({key: value for key, value in defaults.items() if key not in module.__dict__})
    module.__class__ = _rewritten_class(_restored_class(module))
    assert isinstance(module, RewrittenModule)
    module.melora_records = records
    module.graph = graph
    return module


def uninstall(module: RewrittenModule) -> None:
    """Gives `module` its class back. A module that was a GraphModule keeps its graph without the adapters."""
    original = _restored_class(module)
    if not replaced_forward(module):
        vars(module).pop("forward", None)
    graph = without_adapters(module.adapted_graph) if original is fx.GraphModule else None
    module.__dict__.pop(BASE, None)
    del module.__dict__["melora_records"]
    if graph is not None:
        plain = fx.GraphModule(nn.Module(), fx.Graph())
        module.__class__ = cast("type[RewrittenModule]", type(plain))
        module.graph = graph
        return
    for key in _graph_module_attributes():
        module.__dict__.pop(key, None)
    module.__class__ = cast("type[RewrittenModule]", original)


def replaced_forward(module: RewrittenModule) -> bool:
    """Whether someone has put another `forward` on the instance, around the one that the class has."""
    return "forward" in vars(module) and getattr(module.forward, "__func__", None) is not type(module).forward


@functools.cache
def _graph_module_attributes() -> tuple[str, ...]:
    """What a GraphModule has and a plain module has not."""
    plain = fx.GraphModule(nn.Module(), fx.Graph())
    return *(vars(plain).keys() - vars(nn.Module()).keys()), *GRAPH_SPECS


def rewritten_modules(model: nn.Module) -> Iterator[tuple[str, RewrittenModule]]:
    """Every rewritten module of `model` with its path."""
    for path, module in unwrap(model).named_modules():
        if isinstance(module, RewrittenModule):
            yield without_wrappers(path), module


def class_name(model: nn.Module) -> str:
    """Name of the class that `model` has when it is not rewritten."""
    inner = unwrap(model)
    return inner.__dict__.get("model_class", _restored_class(inner).__name__)


def run_base(module: RewrittenModule) -> None:
    """`module` runs its base until `run_adapted`: its forward, and its graph, which `torch.export` interprets.

    Function and graph are the same each time, so that compiled code stays valid.
    """
    cls = type(module)
    if cls.base_code != module.code:
        cls.base_graph, cls.base_code = without_adapters(module.adapted_graph), module.code
        cls.base_function = forward_of(module, cls.base_graph)
    vars(module)[BASE] = module.graph
    put_graph(module, cls.base_graph)


def run_adapted(module: RewrittenModule) -> None:
    """Undoes `run_base`."""
    graph = vars(module).pop(BASE, None)
    if graph is not None:  # else it has been folded meanwhile
        put_graph(module, graph)


def _rewritten_class(original: type) -> type:
    bases = (RewrittenModule,) if original is fx.GraphModule else (RewrittenModule, original)
    return type(f"MELoRA{original.__name__}", bases, {"restored_class": original})


def _restored_class(module: nn.Module) -> type:
    """The class that `module` had, or has, when it is not rewritten; GraphModule for all its per-instance classes."""
    if isinstance(module, RewrittenModule):
        return module.restored_class
    return fx.GraphModule if isinstance(module, fx.GraphModule) else type(module)


def _blank(original: type) -> Any:
    cls: Any = _rewritten_class(original)
    return object.__new__(cls)
