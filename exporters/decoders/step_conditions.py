"""What holds of the sizes of a step's inputs: what an export assumed of its example, said of tokens and mask alone."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from exporters.onnx_files.cache_names import ENCODER_MASK, MASK, POSITIONS, TOKENS, is_past
from melora_fx.whole_capture.conditions import Condition, Shaped, readable

from .flat_cache import identifier

_SIZE = re.compile(r"(\w+)\.shape\[(\d)\]")
_TOKENS, _TOTAL, _BATCH = f"{TOKENS}.shape[1]", f"{MASK}.shape[1]", f"{TOKENS}.shape[0]"

_HAS_TOKENS, _HAS_TEXTS = Condition(f"{_TOKENS} > 0"), Condition(f"{_BATCH} > 0")
_HAS_MASKS_BESIDE = Condition(f"{ENCODER_MASK}.shape[0] == {_BATCH}")

STEP_CONDITIONS = (
    _HAS_TOKENS,
    _HAS_TEXTS,
    Condition(f"{MASK}.shape[0] == {_BATCH}"),
    Condition(f"{_TOTAL} >= {_TOKENS}"),
)
"""Of every step: the mask is that of the past and the new tokens."""

ONE_TOKEN_OR_TEXT = Condition(f"{_BATCH} == 1 or {_TOKENS} == 1 or {_TOTAL} == {_TOKENS}")
"""Of ONNX Runtime's attention over a cache: after a past it takes several tokens of one text, or one of each."""


def step_conditions(conditions: Iterable[Condition], inputs: Collection[str]) -> list[Condition]:
    """What an export assumed, without the sizes of the cache: these follow from those of tokens and mask.

    Args:
        conditions: as the export has them, by the names of arguments.
        inputs: those of the step; the cache's are of (batch, heads, past, head_dim). A decoder beside an encoder has no
            mask of its own tokens: nothing is said of its past.
    """
    names = {identifier(name) for name in inputs if is_past(name)}
    if MASK not in inputs:
        return [_HAS_TOKENS, _HAS_TEXTS, Condition(f"{ENCODER_MASK}.shape[1] > 0"), _HAS_MASKS_BESIDE]

    def of_tokens(found: re.Match[str]) -> str:
        if found[1] == POSITIONS:
            return (_BATCH, _TOKENS)[int(found[2])]
        if found[1] not in names:
            return _BATCH if found[0] == f"{MASK}.shape[0]" else found[0]
        return {"0": _BATCH, "2": f"({_TOTAL} - {_TOKENS})"}.get(found[2], found[0])

    texts = dict.fromkeys(readable(_SIZE.sub(of_tokens, condition.text)) for condition in conditions)
    return [*STEP_CONDITIONS, *_without_repeats(map(Condition, filter(None, texts)))]


def _without_repeats(conditions: Iterable[Condition]) -> list[Condition]:
    """The conditions that exclude any of `_STEPS`, the shortest of those that exclude the same ones.

    An export takes every size to be 2 or more, and says so where it is asked: that excludes none of these.
    """
    found: dict[tuple[bool, ...], Condition] = {}
    for condition in sorted(conditions, key=lambda condition: len(condition.text)):
        if {*condition.names} <= {TOKENS, MASK}:
            found.setdefault(tuple(condition.holds(step) for step in _STEPS), condition)
    return [condition for truths, condition in found.items() if not all(truths)]


_STEPS = [
    {TOKENS: Shaped((batch, new)), MASK: Shaped((batch, past + new))}
    for batch in (2, 3, 7)
    for past in (2, 3, 5, 12, *(2**power + more for power in range(4, 18) for more in (-1, 0)))
    for new in (2, 3, 4, 17)
]
"""Steps with pasts up to the most tokens that models have positions for, and around their usual numbers."""


def without_refuted(conditions: Iterable[Condition], tried: Sequence[Mapping[str, Sequence[int]]]) -> list[Condition]:
    """The conditions but for those that shapes at which the graph is right do not fulfil."""
    shapes = [{name: Shaped(tuple(shape)) for name, shape in each.items() if not is_past(name)} for each in tried]
    return [condition for condition in conditions if all(condition.holds(shape) for shape in shapes)]
