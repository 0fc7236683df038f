"""Warns about optimizers created before `rewrite`: they hold frozen weights and no adapters, so they train nothing.

Only the optimizer knows its parameters, so the first step of each optimizer is checked, with PyTorch's hook for steps.
The hook exists as long as a rewritten model exists.
"""

import warnings
import weakref
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from melora_fx.adapter.site import owner_of, tensors_of
from melora_fx.distributed.tensors import is_sharded
from melora_fx.matching.keep_trainable import is_within
from melora_fx.names import first_of, without_wrappers
from melora_fx.torch_private import registered

from .adapted_module import rewritten_modules
from .marks import ROOT_MARK, RootMark
from .sites import adapter_parameters


class _Watch:
    """The rewritten models that exist, by `id`, the optimizers that have been checked, and the hook."""

    def __init__(self) -> None:
        self.models: dict[int, weakref.ref[nn.Module]] = {}
        self.checked: WeakSet[Optimizer] = WeakSet()
        self.hook: RemovableHandle | None = None

    def add(self, model: nn.Module) -> None:
        self.models[id(model)] = weakref.ref(model)
        self.checked.clear()  # an optimizer that has stepped before may hold this model's parameters
        self.hook = self.hook or register_optimizer_step_pre_hook(self.check)
        weakref.finalize(model, self.forget, id(model)).atexit = False

    def discard(self, model: nn.Module) -> None:
        self.models.pop(id(model), None)
        self.remove_unused_hook()

    def remove_unused_hook(self) -> None:
        if self.hook and not self.models:
            self.hook.remove()
            self.hook = None

    def forget(self, key: int) -> None:
        """Drops a model that has been garbage-collected, which can happen at any time.

        PyTorch may be iterating over its hooks, and fails if one of several disappears: ours is removed only if it is
        the only one. Dynamo may be compiling with `fullgraph=True`, and raises at any generator, such as those of a
        WeakSet: this method runs none.
        """
        self.models.pop(key, None)
        if self.hook and list(self.hook.hooks_dict_ref() or ()) == [self.hook.id]:
            self.remove_unused_hook()

    def check(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or optimizer in self.checked:
            return
        self.checked.add(optimizer)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for names in filter(None, [_unfrozen_norms(model, held) for model in self._alive()]):
            warnings.warn(
                f"this {type(optimizer).__name__} trains {first_of(names)}, which `rewrite` has frozen and no adapter "
                "folder will contain (`SequenceParallel` makes its norms trainable): name them in "
                "`keep_trainable`, or call `requires_grad_(False)` on them after `parallelize_module`",
                stacklevel=3,  # where `step` is called
            )
        for stale in filter(None, [_stale_linears(model, held) for model in self._alive()]):
            warnings.warn(
                f"this {type(optimizer).__name__} holds the weights of {stale} linears, which `rewrite` has frozen, "
                "but not their adapters: make the optimizer after `rewrite`",
                stacklevel=3,  # where `step` is called
            )

    def _alive(self) -> list[nn.Module]:
        return [model for reference in self.models.values() if (model := reference()) is not None]


_watch = _Watch()


def watch_optimizers(model: nn.Module) -> None:
    """Makes the first step of an optimizer warn if it holds parameters of `model` from before `rewrite`."""
    _watch.add(model)


def stop_watching(model: nn.Module) -> None:
    """Undoes `watch_optimizers`."""
    _watch.discard(model)


def _unfrozen_norms(model: nn.Module, held: set[int]) -> list[str]:
    """Returns the names of parameters that tensor parallelism replicates and that should be frozen, but whose id is in
    `held`.
    """
    mark: RootMark | None = vars(model).get(ROOT_MARK)
    if mark is None:
        return []
    own = {id(parameter) for parameter in adapter_parameters(model).values()}
    named = [(without_wrappers(name), parameter) for name, parameter in model.named_parameters()]
    return [
        f"`{name}`"
        for name, parameter in named
        if is_sharded(parameter)
        and parameter.placements[-1].is_replicate()
        and id(parameter) in held - own
        and not any(is_within(name, kept) for kept in mark.kept)
    ]


def _stale_linears(model: nn.Module, held: set[int]) -> int:
    """Returns how many linears have the id of their weight in `held`, but not that of their adapter."""
    stale = 0
    for _, module in rewritten_modules(model):
        for record in module.melora_mark.records:
            owner = owner_of(module, record)
            weight = registered(owner)[0].get(record.parameter_name)
            lora_a = tensors_of(module, record).lora_a
            stale += weight is not None and id(weight) in held and id(lora_a) not in held
    return stale
