"""States what an export assumed of the sizes of a step's inputs, as conditions on only tokens and mask."""

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
"""Conditions of every step: the mask is for the past and the new tokens."""

ONE_TOKEN_OR_TEXT = Condition(f"{_BATCH} == 1 or {_TOKENS} == 1 or {_TOTAL} == {_TOKENS}")
"""The condition of ONNX Runtime's attention over a cache: after a past, several tokens of one text, or one of each."""


def step_conditions(conditions: Iterable[Condition], inputs: Collection[str]) -> list[Condition]:
    """Returns an export's conditions, with the sizes of the cache expressed in those of tokens and mask.

    Args:
        conditions: the conditions of the export, which use the names of arguments.
        inputs: the names of the step's inputs; the cache's are (batch, heads, past, head_dim). The decoder of an
            encoder-decoder model has no mask of its own tokens, so no condition concerns its past.
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
    """Returns the conditions on tokens and mask that exclude some of `_STEPS`; the shortest of those that exclude the
    same steps.

    An export assumes that every size is 2 or more, and records conditions that say so: they exclude no such step.
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
"""Steps with pasts up to the largest number of positions that models have, and around the usual numbers."""


def without_refuted(conditions: Iterable[Condition], tried: Sequence[Mapping[str, Sequence[int]]]) -> list[Condition]:
    """Returns the conditions without those that are false for shapes at which the graph is correct."""
    shapes = [{name: Shaped(tuple(shape)) for name, shape in each.items() if not is_past(name)} for each in tried]
    return [condition for condition in conditions if all(condition.holds(shape) for shape in shapes)]
