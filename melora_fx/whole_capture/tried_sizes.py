"""Finds by trials which conditions on sizes a graph needs: an export states more of them, and misses a few.

An export assumes that axes have at least two entries. It also states bounds that only affect the memory layout of a
tensor as if the computation needed them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from melora_fx.torch_private import tree_flatten, tree_leaves, tree_unflatten

from .assumed_inputs import AssumedInputs
from .conditions import UPPER_BOUND, Condition

_Trials = dict[tuple[str, ...], Mapping[str, Any]]
"""Axes that have one entry in the same trial → the arguments of the trial, by name."""

IsRight = Callable[[Any, Any], bool | None]
"""Takes positional and keyword arguments, and returns whether the graph computes what the model does; None if the model
does not accept the arguments."""


def try_sizes(assumed: AssumedInputs, args: tuple[Any, ...], kwargs: dict[str, Any], is_right: IsRight) -> None:
    """Tries the graph with one entry along each free axis, along axes that belong together, and along all that passed a
    trial. Also tries sizes beyond doubtful bounds. Afterwards the conditions of `assumed` allow the sizes that are
    correct.
    """
    conditions, assumed.conditions = assumed.conditions, ()  # so that the trials are not refused
    right, wrong = _Trials(), _Trials()

    def try_together(sizes: Sequence[str]) -> None:
        inputs = _resized(args, kwargs, [place for size in sizes for place in assumed.free_axes[size]], 1)
        found = right if is_right(*inputs) else wrong
        found[tuple(sizes)] = assumed.by_name(*inputs)

    def is_needless(condition: Condition) -> bool:
        size, tried = beyond(condition) or ("", ())
        places = [place for sizes in together if size in sizes for each in sizes for place in assumed.free_axes[each]]
        return bool(tried) and all(is_right(*_resized(args, kwargs, places, number)) for number in tried)

    together = _axes_together(assumed, tree_leaves((args, kwargs)))
    for sizes in ([size] for size in assumed.free_axes):
        try_together(sizes)
    for sizes in together:
        if len(sizes) > 1:
            try_together(sizes)
    if len(each := [size for size in assumed.free_axes if any(size in sizes for sizes in right)]) > 1:
        try_together(each)
    for allowed, values in right.items():
        conditions = tuple(with_single_entries(conditions, allowed, values))
    for refused, values in wrong.items():
        if all(condition.holds(values) for condition in conditions):
            conditions = (*conditions, _without(refused, right))
    assumed.conditions = tuple(condition for condition in conditions if not is_needless(condition))


def _without(sizes: tuple[str, ...], right: Iterable[tuple[str, ...]]) -> Condition:
    """Returns the condition that not all `sizes` are 1, unless further axes are 1 with which the graph is correct."""
    further = [{*others} - {*sizes} for others in right if {*others} > {*sizes}]
    fewest = [others for others in further if not any(fewer < others for fewer in further)]
    ones = [" and ".join(f"{size} == 1" for size in sorted(others)) for others in fewest]
    return Condition(" or ".join([*(f"{size} > 1" for size in sizes), *ones]))


def _axes_together(assumed: AssumedInputs, leaves: list[Any]) -> list[list[str]]:
    """Returns groups of the same axis of several inputs with the same size in the example, such as the batch of tokens
    and of their mask: many models accept one entry only in both.
    """
    groups: dict[tuple[int, int], list[str]] = {}
    for size, ((number, axis), *_) in assumed.free_axes.items():
        groups.setdefault((axis, leaves[number].size(axis)), []).append(size)
    return list(groups.values())


def _resized(args: Any, kwargs: Any, places: Iterable[tuple[int, int]], size: int) -> tuple[Any, Any]:
    """Returns the arguments, cut or repeated to `size` entries along `places`: (number of the input, axis)."""
    leaves, structure = tree_flatten((args, kwargs))
    resized = list(leaves)
    for number, axis in places:
        entries = torch.arange(size, device=resized[number].device) % resized[number].size(axis)
        resized[number] = resized[number].index_select(axis, entries)
    made: tuple[Any, Any] = tree_unflatten(resized, structure)
    return made


def with_single_entries(
    conditions: Iterable[Condition], sizes: Sequence[str], values: Mapping[str, Any]
) -> list[Condition]:
    """Returns the conditions, relaxed to allow one entry along `sizes`: an export requires two entries for more axes
    than need it.

    Args:
        conditions: the conditions that the export assumed.
        sizes: the axes, such as `x.shape[1]`, that have one entry together.
        values: inputs with one entry along these axes for which the graph is correct, by the names in the conditions.
    """
    relaxed = []
    for condition in conditions:
        if condition.holds(values):
            relaxed.append(condition)
        elif not any(condition.text in (f"{size} > 1", f"{size} != 1") for size in sizes):
            relaxed.append(Condition(f"({condition.text}) or ({' and '.join(f'{size} == 1' for size in sizes)})"))
    return relaxed


def beyond(condition: Condition) -> tuple[str, tuple[int, int]] | None:
    """Returns the axis that a doubtful condition bounds, and the sizes to try: one more than the bound, and twice the
    bound. None for other conditions and for bounds above `_MOST_TRIED`.
    """
    bound = UPPER_BOUND.fullmatch(condition.text) if condition.is_doubtful else None
    if bound is None or int(bound[2]) > _MOST_TRIED:
        return None
    return bound[1], (int(bound[2]) + 1, 2 * int(bound[2]))


_MOST_TRIED = 2**11
"""Larger bounds are not tried: the memory of attention grows with the square of the number of tokens."""
