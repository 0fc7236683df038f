"""Flattens a model's outputs, attributes and random state into dicts, and compares them."""

import dataclasses
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from support.models import randn

_OF_ANY_MODULE = set(vars(nn.Module()))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path, leaf) of nested containers; containers, modules and callables are leaves too, as their kind."""
    if isinstance(value, torch.Tensor | int | float | complex | str) or value is None:
        yield path, value
    elif isinstance(value, nn.Module):
        yield path, "a module"
    elif callable(value):
        yield path, "a callable"
    else:
        yield path, type(value).__name__
        for key, item in _items(value):
            yield from leaves(item, f"{path}.{key}")


def _items(container: Any) -> Iterable[tuple[Any, Any]]:
    """Returns the keys and items of a container; nothing for other objects."""
    if isinstance(container, Mapping):
        return ((key if isinstance(key, str | int) else "…", item) for key, item in container.items())
    if dataclasses.is_dataclass(container):
        return ((field.name, getattr(container, field.name)) for field in dataclasses.fields(container))
    return enumerate(container) if isinstance(container, list | tuple | set) else ()


def state_of(model: nn.Module) -> dict[str, Any]:
    """Returns the buffers and attributes of all modules, and whether they are in training mode."""
    found = dict[str, Any]()
    for name, module in model.named_modules():
        for key, value in (dict(module.named_buffers(recurse=False)) | vars(module)).items():
            if key == "training" or key not in _OF_ANY_MODULE:
                found.update(leaves(value, f"{name}.{key}"))
    return found


def random_state() -> dict[str, Any]:
    return {"torch": torch.get_rng_state().clone(), "random": str(random.getstate())}


def assert_same(actual: Mapping[str, Any], expected: Mapping[str, Any], what: str, tolerance: float | None) -> None:
    """Checks each leaf of `expected`: the same bits if `tolerance` is None, otherwise close to it, in any dtype.

    Types must be equal too: none of the library's types may stay in an output or an attribute.
    """
    missing = expected.keys() - actual.keys()
    assert not missing, f"{what}: {sorted(missing)} are missing"
    for path, leaf in expected.items():
        _assert_leaf(actual[path], leaf, f"{what} {path}", tolerance)


def assert_same_state(actual: nn.Module, expected: nn.Module, what: str, tolerance: float | None) -> None:
    """Checks that buffers and attributes are the same, except those of modules that the user traced."""
    traced = tuple(f"{name}." for name, module in expected.named_modules() if isinstance(module, fx.GraphModule))
    wanted = {path: leaf for path, leaf in state_of(expected).items() if not path.startswith(traced)}
    assert_same(state_of(actual), wanted, f"{what}: state", tolerance)


def _assert_leaf(actual: Any, expected: Any, what: str, tolerance: float | None) -> None:
    assert type(actual) is type(expected), f"{what}: a {type(actual).__name__}, not a {type(expected).__name__}"
    if not isinstance(expected, torch.Tensor | float):
        assert actual == expected, f"{what}: {actual!r}, not {expected!r}"
        return
    options: dict[str, Any] = {"rtol": 0, "atol": 0, "check_stride": True}
    if tolerance is not None:
        options = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
        if isinstance(actual, torch.Tensor) and actual.is_floating_point():
            actual, expected = actual.double(), expected.double()
    torch.testing.assert_close(actual, expected, **options, equal_nan=True, msg=lambda text: f"{what}: {text}")


def loss_of(output: Mapping[str, Any]) -> torch.Tensor | None:
    """Returns the sum of all outputs that require gradients, each value with its own factor; None if there are none."""
    terms = [
        (leaf * randn(leaf.numel(), seed=100 + number, dtype=leaf.dtype).view(leaf.shape)).sum().double()
        for number, leaf in enumerate(output.values())
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    ]
    return torch.stack(terms).sum() if terms else None
