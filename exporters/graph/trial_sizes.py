"""Chooses the sizes of dynamic axes at which a graph is compared with its model."""

from collections.abc import Iterator, Mapping

from .ranges import AxisRange

Sizes = dict[str, int]
"""Dynamic axis → size."""
_LARGEST_TRIAL = 2**12
"""A range that ends later is not tried at its end: the memory of attention grows with the square of the tokens."""


def in_words(sizes: Sizes) -> str:
    """Returns the sizes in words, such as `batch=2 sequence=5`."""
    return " ".join(f"{axis}={size}" for axis, size in sizes.items()) or "the example"


def trial_sizes(example: Sizes, ranges: Mapping[str, AxisRange]) -> Iterator[Sizes]:
    """Yields one step more than the example along all axes; four times the example along each axis; and the smallest
    and the largest size of each axis, the largest with the others as small as possible.

    Skips sizes outside of `ranges`, the example, and repeated sizes.
    """
    least = {axis: min(size, ranges[axis].smallest) for axis, size in example.items()}
    candidates = [{axis: size + ranges[axis].step for axis, size in example.items()}]
    candidates += [{**example, axis: 4 * size} for axis, size in example.items()]
    for axis, found in ranges.items():
        candidates.append({**example, axis: found.smallest})
        if found.largest is not None and found.largest <= _LARGEST_TRIAL:
            candidates.append({**least, axis: found.largest})
    tried = [example]
    for sizes in candidates:
        if sizes not in tried and all(_is_in(ranges[axis], size) for axis, size in sizes.items()):
            tried.append(sizes)
            yield sizes


def _is_in(found: AxisRange, size: int) -> bool:
    return found.smallest <= size <= (size if found.largest is None else found.largest)
