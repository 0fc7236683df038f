"""The sizes of dynamic axes at which a graph is compared with its model."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .ranges import AxisRange

_MOST_ENTRIES = 2**16
"""Of the example's entries times this, over the example: larger trials are left out."""


class TrialSizes(NamedTuple):
    """One size for each dynamic axis; `ones`: the axes that have one entry here, and more in the example."""

    sizes: dict[str, int]
    ones: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join(f"{axis}={size}" for axis, size in self.sizes.items()) or "the example"


def trial_sizes(example: Mapping[str, int], ranges: Mapping[str, AxisRange]) -> Iterator[TrialSizes]:
    """The example's sizes; one entry along each axis, and along all; a step more along all; four times as many along
    each; and the most that the axis may have, with one entry along the others.

    Sizes outside of `ranges` are left out, and those that are there already.
    """
    ones = {axis: 1 for axis, size in example.items() if size > 1 and ranges[axis].smallest <= 1}
    yield TrialSizes(dict(example))
    tried = [dict(example)]
    candidates = [TrialSizes({**example, axis: 1}, (axis,)) for axis in ones]
    candidates.append(TrialSizes({**example, **ones}, tuple(ones)))
    candidates.append(TrialSizes({axis: size + ranges[axis].step for axis, size in example.items()}))
    candidates += [TrialSizes({**example, axis: 4 * size}) for axis, size in example.items()]
    for axis, found in ranges.items():
        if found.largest is not None and found.largest <= _MOST_ENTRIES:
            candidates.append(TrialSizes({**example, **ones, axis: found.largest}))
    for candidate in candidates:
        if candidate.sizes not in tried and all(_is_in(ranges[axis], size) for axis, size in candidate.sizes.items()):
            tried.append(candidate.sizes)
            yield candidate


def _is_in(found: AxisRange, size: int) -> bool:
    return found.smallest <= size <= (size if found.largest is None else found.largest)
