"""Hypothesis strategies for JSON and tensors with a few errors that nobody makes on purpose."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st

_LEAVES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 10**9, 10**30, 1.5, -0.0, 1e308, "", "x", "up", "norm", "a" * 5000, "\0",
    "float32", "int8", "float8_e4m3fn", "imported", [], {}, [1], [[]], {"a": 1}, [1] * 64, ["x"] * 64, [10**12] * 2,
]  # fmt: skip
_DTYPES = [
    torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.complex64, torch.uint16,
]  # fmt: skip
_NAMES = ["", "up", "up.weight", "up.lora_c", "word_embeddings.weight", "norm.weight", "norm.extra", "conv.lora_a"]

junk = st.one_of(
    st.sampled_from(_LEAVES),
    st.integers(min_value=-(10**40), max_value=10**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.recursive(st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=8),
)


@st.composite
def mutated_json(draw: st.DrawFn, content: dict[str, Any]) -> dict[str, Any]:
    """Draws JSON in which one to three values are replaced, removed, added, or put under another key."""
    changed = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(_paths(changed))))
        holder: Any = changed
        for key in path[:-1]:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "replace":
            holder[path[-1]] = draw(junk)
        elif action == "remove":
            del holder[path[-1]]
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from([*holder, *_NAMES]))] = holder[path[-1]]
        else:
            holder.append(draw(junk))
        if not changed:
            break
    return changed


@st.composite
def mutated_tensors(draw: st.DrawFn, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Draws tensors of which one has another dtype, shape, name or values, is missing, or is there twice."""
    changed = dict(tensors)
    name = draw(st.sampled_from(sorted(changed)))
    tensor = changed[name]
    action = draw(st.sampled_from(["dtype", "remove", "rename", "add", "values", "flatten", "cut", "empty", "double"]))
    if action == "dtype":
        changed[name] = tensor.to(draw(st.sampled_from(_DTYPES)))
    elif action in ("remove", "rename"):
        del changed[name]
    elif action == "values":
        changed[name] = tensor.clone()
        changed[name].view(-1)[0] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]))
    elif action == "flatten":
        changed[name] = tensor.reshape(-1)
    elif action == "cut":
        changed[name] = tensor[..., :-1].contiguous()
    elif action == "empty":
        changed[name] = tensor[:0].contiguous()
    elif action == "double":
        changed[name] = torch.cat([tensor, tensor])
    if action in ("rename", "add"):
        changed[draw(st.sampled_from(_NAMES))] = tensor.clone()
    return changed


def _paths(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the paths of values in JSON; in lists only of the first three items."""
    if path:
        yield path
    items = (
        content.items() if isinstance(content, dict) else enumerate(content[:3]) if isinstance(content, list) else ()
    )
    for key, value in items:
        yield from _paths(value, (*path, key))
