"""What must hold of sizes, by trials: an export says more than its graph needs, and a little less.

It takes axes to have two entries and more, and bounds that only tell how a tensor lies in memory to be those of what is
computed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from melora_fx.torch_private import tree_flatten, tree_leaves, tree_unflatten

from .assumed_inputs import AssumedInputs
from .conditions import UPPER_BOUND, Condition

_Trials = dict[tuple[str, ...], Mapping[str, Any]]
"""Axes that have one entry together → the arguments, by name."""

IsRight = Callable[[Any, Any], bool | None]
"""Of positional and keyword arguments: whether the graph computes what the model does; None where the model takes no
such inputs."""


def try_sizes(assumed: AssumedInputs, args: tuple[Any, ...], kwargs: dict[str, Any], is_right: IsRight) -> None:
    """Tries the graph with one entry along each free axis, along axes that belong together, and along all; and beyond
    doubtful bounds. Afterwards the conditions of `assumed` allow what is right.
    """
    conditions, assumed.conditions = assumed.conditions, ()  # the trials are not to be refused
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
    """That not all these axes have one entry, unless further axes have, together with which it is right."""
    further = [{*others} - {*sizes} for others in right if {*others} > {*sizes}]
    fewest = [others for others in further if not any(fewer < others for fewer in further)]
    ones = [" and ".join(f"{size} == 1" for size in sorted(others)) for others in fewest]
    return Condition(" or ".join([*(f"{size} > 1" for size in sizes), *ones]))


def _axes_together(assumed: AssumedInputs, leaves: list[Any]) -> list[list[str]]:
    """The same axis of several inputs where it is as long in the example, such as the batches of tokens and of their
    mask: many models take one entry of both, and not of one.
    """
    groups: dict[tuple[int, int], list[str]] = {}
    for size, ((number, axis), *_) in assumed.free_axes.items():
        groups.setdefault((axis, leaves[number].size(axis)), []).append(size)
    return list(groups.values())


def _resized(args: Any, kwargs: Any, places: Iterable[tuple[int, int]], size: int) -> tuple[Any, Any]:
    """The arguments cut or repeated to `size` entries along these axes: (number of the input, axis)."""
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
    """The conditions where one entry along axes is known to be right: an export takes more of them to have two than
    need it.

    Args:
        conditions: what the export assumed.
        sizes: the axes, such as `x.shape[1]`, that have one entry together.
        values: inputs of which the graph is right, with one entry along these, by the names in the conditions.
    """
    relaxed = []
    for condition in conditions:
        if condition.holds(values):
            relaxed.append(condition)
        elif not any(condition.text in (f"{size} > 1", f"{size} != 1") for size in sizes):
            relaxed.append(Condition(f"({condition.text}) or ({' and '.join(f'{size} == 1' for size in sizes)})"))
    return relaxed


def beyond(condition: Condition) -> tuple[str, tuple[int, int]] | None:
    """The axis that a doubtful condition bounds, and the sizes at which to try it: one more, and twice as many."""
    bound = UPPER_BOUND.fullmatch(condition.text) if condition.is_doubtful else None
    if bound is None or int(bound[2]) > _MOST_TRIED:
        return None
    return bound[1], (int(bound[2]) + 1, 2 * int(bound[2]))


_MOST_TRIED = 2**11
"""Bounds above this are believed: attention takes memory with the square of the tokens."""
