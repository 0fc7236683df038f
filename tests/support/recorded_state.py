"""Records what a dry run or a failed call must not change: the state of a model, and the state of the process."""

import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import fx, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Same:
    """Equal only to the record of the same object; keeps it alive, so that its id is not reused."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __repr__(self) -> str:
        return f"{type(self.value).__name__} at {id(self.value):#x}"

    __hash__ = None  # type: ignore[assignment]  # compared, never looked up


def recorded_state(model: nn.Module, also: Iterable[Any] = ()) -> dict[str, Any]:
    """Maps paths to the values to compare, for everything in `model`, in the containers `also` and in the process.

    Modules: class, graph and all attributes, including parameters, buffers, children, hooks and training flags.
    Tensors: identity, bits, version, `requires_grad` and gradient. Lists, dicts and sets: identity and contents,
    recursively. Numbers and strings: type and value. Any other object: only its identity.
    """
    record = dict(_process_state())
    for path, module in model.named_modules():
        record[f"class of `{path}`"] = type(module)
        record |= _recorded(f"`{path}`", vars(module))
        if isinstance(module, fx.GraphModule):
            record[f"graph of `{path}`"] = str(module.graph)
    for index, container in enumerate(also):
        record |= _recorded(f"also[{index}]", container)
    return record


def _process_state() -> Iterator[tuple[str, Any]]:
    """Yields random states, grad mode, autocast and default dtype."""
    yield "torch's random state", torch.get_rng_state().numpy().tobytes()
    if torch.cuda.is_initialized():
        yield "CUDA's random states", [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
    yield "Python's random state", random.getstate()
    name, keys, *rest = np.random.get_state()
    yield "NumPy's random state", (name, keys.tobytes(), *rest)
    yield "default dtype", torch.get_default_dtype()
    yield "grad mode", (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    for device in ("cpu", "cuda"):
        yield f"autocast on {device}", (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    yield "autocast's cache", torch.is_autocast_cache_enabled()


def _recorded(path: str, value: Any) -> dict[str, Any]:
    """Records `value` at `path` and, if it is a container, everything in it."""
    record: dict[str, Any] = {}
    pending = [(path, value)]
    opened = set[int]()  # a container in two places, or within itself, is read once
    while pending:
        path, value = pending.pop()
        if isinstance(value, torch.Tensor):
            record[path] = _of_tensor(value)
        elif isinstance(value, Set):
            record[path] = (Same(value), set(value))
        elif isinstance(value, Mapping | list | tuple | deque):
            items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
            record[path] = (Same(value), [key for key, _ in items])
            if id(value) not in opened:
                opened.add(id(value))
                pending += [(f"{path}[{key!r}]", item) for key, item in items]
        elif isinstance(value, _PLAIN):
            record[path] = (type(value), value)
        else:
            record[path] = Same(value)
    return record


def _of_tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else tensor._version
    gradient = tensor.grad if tensor.is_leaf else None
    return (
        Same(tensor),
        tensor.requires_grad,
        version,
        _bits(tensor),
        None if gradient is None else (Same(gradient), _bits(gradient)),
    )


def _bits(tensor: torch.Tensor) -> Any:
    """Returns shape, dtype, device and bits; of a tensor that wraps others, theirs."""
    if hasattr(tensor, "__tensor_flatten__"):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return [_bits(each) for each in inner if isinstance(each, torch.Tensor)]
    described = (tuple(tensor.shape), tensor.dtype, tensor.device)
    if tensor.is_meta:
        return described
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return (*described, values.numpy().tobytes())


def assert_recorded(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Checks that two records are equal; the error lists the paths that differ."""
    changed = [path for path in before | after if path not in before or before[path] != after.get(path)]
    assert not changed, f"changed: {', '.join(changed)}"
