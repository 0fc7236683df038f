"""Changes settings of a model inside a block (train or eval mode, float32, no key-value cache), and restores its
attributes and the random state after one.
"""

import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from melora_fx.names import join_path
from melora_fx.torch_private import tree_leaves


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Puts the model in train or eval mode; afterwards restores the mode of every module."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Converts the model from half precision to float32, tensor by tensor: it is never in memory twice. Afterwards
    restores the dtypes of the tensors, with the same bits unless the block has changed them.

    Two half-precision parameters that share memory no longer share it afterwards.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype in HALF}
    dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
    try:
        for tensor in tensors.values():
            tensor.data = tensor.data.float()
        yield
    finally:
        for key, tensor in tensors.items():
            tensor.data = tensor.data.to(dtypes[key])


HALF = (torch.float16, torch.bfloat16)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Turns `config.use_cache` off inside the block, so that the graph returns no key-value cache."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    caching = [config for config in configs.values() if getattr(config, "use_cache", None)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextmanager
def own_attributes(model: nn.Module) -> Iterator[None]:
    """Restores the attributes of every module after the block: the same objects with the same contents.

    `torch.export` replaces lists, dicts and tuples by equal copies, and does not undo what a forward has put into the
    originals.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    contents = [(each, list(_items(each))) for _, attributes in before for each in _containers(attributes.values())]
    try:
        yield
    finally:
        for container, items in contents:
            container.clear()
            if isinstance(container, list | deque):
                container.extend(items)
            else:
                container.update(items)
        for module, attributes in before:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)


def changed_attributes(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Returns the attributes, such as `layers.0.calls`, that `run` changes every time; buffers are left out.

    Calls `run` a second time if the first call has changed any: an attribute that the second call leaves unchanged is a
    cache, not state.
    """
    before = _values(model)
    run()
    after = _values(model)
    if _same(before, after) == after.keys():
        return []
    run()
    return sorted(after.keys() - _same(after, _values(model)))


def _values(model: nn.Module) -> dict[str, list[Any]]:
    """Returns name → leaves of each attribute that is not a module, parameter or buffer; tensors are copied."""
    found = {}
    for path, module in model.named_modules():
        for name in vars(module).keys() - _OF_ANY_MODULE:
            leaves = tree_leaves(vars(module)[name])
            found[join_path(path, name)] = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return found


_OF_ANY_MODULE = vars(nn.Module()).keys()


def _same(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> set[str]:
    """Returns the names of unchanged attributes. Leaves other than tensors and plain values must be the same object."""
    return {name for name in before.keys() & after.keys() if _are_same(before[name], after[name])}


def _are_same(before: list[Any], after: list[Any]) -> bool:
    if len(before) != len(after):
        return False
    return all(
        new is old
        or (isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and torch.equal(old, new))
        or (isinstance(old, int | float | str) and new == old)
        for old, new in zip(before, after, strict=True)
    )


def _containers(values: Iterable[Any]) -> Iterator[Any]:
    """Yields the lists, deques, dicts and sets among `values`, and those within them."""
    pending = list(values)
    seen = set[int]()
    while pending:
        value = pending.pop()
        if type(value) not in (list, dict, set, deque, OrderedDict, defaultdict, tuple) or id(value) in seen:
            continue
        seen.add(id(value))
        pending += value.values() if isinstance(value, dict) else value
        if not isinstance(value, tuple):
            yield value


def _items(container: Any) -> Iterable[Any]:
    return container.items() if isinstance(container, dict) else container


@contextmanager
def same_random_state(module: nn.Module) -> Iterator[None]:
    """Restores the random state after the block, on the CPU and on the GPUs that `module` is on. Reading the state of
    another GPU would initialise it.
    """
    tensors = (*module.parameters(), *module.buffers())
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(state)
