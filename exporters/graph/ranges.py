"""Computes the range of each dynamic axis of a graph: the sizes for which the export's conditions are true."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from melora_fx.whole_capture.conditions import Condition, Shaped

_LARGEST = 2**31
"""A range that reaches this size is taken to have no end."""


class AxisRange(NamedTuple):
    """The sizes of an axis: the smallest, the largest (None for no end), and the step between them."""

    smallest: int
    largest: int | None
    step: int = 1

    def __str__(self) -> str:
        sizes = f"{self.smallest} to {self.largest}" if self.largest is not None else f"{self.smallest} and more"
        return sizes if self.step == 1 else f"{sizes}, in steps of {self.step}"


def holds(conditions: Iterable[Condition], shapes: Mapping[str, Sequence[int]]) -> bool:
    """Returns whether all conditions are true for inputs of these shapes."""
    inputs = {name: Shaped(tuple(shape)) for name, shape in shapes.items()}
    return all(condition.holds(inputs) for condition in conditions)


def without_empty_axes(axes: Mapping[str, Sequence[Any]]) -> list[Condition]:
    """Returns the conditions that no dynamic axis is empty: a graph's Reshape reads 0 as "keep the size"."""
    return [
        Condition(f"{name}.shape[{index}] > 0")
        for name, shape in axes.items()
        for index, axis in enumerate(shape)
        if isinstance(axis, str)
    ]


def axis_ranges(
    conditions: Sequence[Condition],
    axes: Mapping[str, Sequence[Any]],
    shapes: Mapping[str, Sequence[int]],
    sums: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, AxisRange]:
    """Returns the range of each dynamic axis while the others have their sizes in the example.

    Args:
        conditions: the conditions that the export assumed.
        axes: input → its axes: a number for a fixed size, a name for a dynamic axis.
        shapes: input → its shape in the example, for which the conditions are true.
        sums: axis → the axes whose sizes add up to its size; it gets no range.
    """

    def fits(size: int, *, axis: str) -> bool:
        sizes = _sizes(axes, shapes) | {axis: size}
        sizes |= {total: sum(sizes[part] for part in parts) for total, parts in sums.items()}
        resized = {name: [sizes[label] if isinstance(label, str) else label for label in axes[name]] for name in shapes}
        return holds(conditions, resized)

    ranges = {}
    for name, shape in shapes.items():
        for axis, size in zip(axes[name], shape, strict=True):
            if isinstance(axis, str) and axis not in ranges and axis not in sums:
                ranges[axis] = _range_around(size, partial(fits, axis=axis))
    return ranges


def _sizes(axes: Mapping[str, Sequence[Any]], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Returns the size of each dynamic axis in the example."""
    sized = [pair for name, shape in shapes.items() for pair in zip(axes[name], shape, strict=True)]
    return {axis: size for axis, size in sized if isinstance(axis, str)}


def _range_around(size: int, fits: Callable[[int], bool]) -> AxisRange:
    step = next((step for step in range(1, size + 1) if fits(size + step) or fits(size - step)), 1)
    smallest = next(other for other in range(size % step, size + 1, step) if fits(other))
    if not fits(size + step):
        return AxisRange(smallest, size, step)
    good, bad = 1, 2  # steps above the example's size
    while fits(size + bad * step):
        good, bad = bad, 2 * bad
        if size + bad * step > _LARGEST:
            return AxisRange(smallest, None, step)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(size + middle * step) else (good, middle)
    return AxisRange(smallest, size + good * step, step)
