"""Computes where a view begins in the memory of the viewed tensor: Dynamo does not follow `Tensor.storage_offset`."""

from typing import Any

from torch import Tensor


def first_elements(name: str, viewed: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], parts: Any) -> list[int]:
    """Returns for each view how many elements of memory after the start of `viewed` it begins.

    Args:
        name: the operator that creates the views.
        viewed: its first argument.
        args: its other positional arguments.
        kwargs: its keyword arguments.
        parts: the views.

    Raises:
        NotImplementedError: if an index is not a known number.
    """
    if name in ("split", "split_with_sizes", "chunk", "unbind"):
        position = 0 if name == "unbind" else 1
        dim = _argument(args, kwargs, position, "dim", 0)
        starts = [0]
        for part in parts[:-1]:
            starts.append(starts[-1] + (1 if name == "unbind" else part.size(dim)))
        return [start * viewed.stride(dim) for start in starts]
    if name in ("narrow", "select", "slice"):
        dim = _argument(args, kwargs, 0, "dim", 0)
        start = _argument(args, kwargs, 1, "index" if name == "select" else "start", 0)
        return [_first(start, viewed.size(dim)) * viewed.stride(dim)]
    if name == "getitem":
        return [_of_index(viewed, args[0])]
    return [0]


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    return args[position] if position < len(args) else kwargs.get(name, default)


def _of_index(viewed: Tensor, index: Any) -> int:
    """Returns the first element of `viewed[index]`; the index consists of numbers, slices, None and `…`."""
    items = list(index) if isinstance(index, tuple) else [index]
    cut = [item for item in items if item is not None]
    if any(item is Ellipsis for item in cut):
        position = [item is Ellipsis for item in cut].index(True)
        whole = [slice(None)] * (viewed.dim() - len(cut) + 1)
        cut = cut[:position] + whole + cut[position + 1 :]
    total = 0
    for dim, item in enumerate(cut):
        start = item.start if isinstance(item, slice) else item
        total += _first(start, viewed.size(dim)) * viewed.stride(dim)
    return total


def _first(start: Any, size: int) -> int:
    """Returns the index of the first element that remains of a dimension."""
    if start is None:
        return 0
    if not isinstance(start, int):
        raise NotImplementedError
    return max(start + size, 0) if start < 0 else min(start, size)
