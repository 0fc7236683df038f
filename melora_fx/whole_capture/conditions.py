"""Conditions on the sizes of inputs that an export assumed: text that can be read, checked and stored.

A condition is a Python comparison of numbers, such as `x.shape[1] <= 64` or `batch * sequence % 4 == 0`. Its names are
arguments of a forward, or axes of a graph.
"""

import ast
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.export import ExportedProgram

from melora_fx.errors import MELoRAError

from .private import LargeConditionError, conditions_up_to, export_guards, without_assuming_two

_FUNCTIONS: dict[str, Any] = {"min": min, "max": max, "abs": abs, "float": float, "int": int, "round": round}
_PARTS = (
    ast.Expression, ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator, ast.Compare, ast.cmpop,
    ast.Constant, ast.expr_context, ast.Subscript,
)  # fmt: skip
"""What a condition may be made of beside names, calls and attributes: the text may come from a file."""


class Condition:
    """One condition.

    Args:
        text: the comparison.
        is_doubtful: an export also asks whether sizes are equal to know how a tensor lies in memory, and what it
            computes may not depend on that.

    Attributes:
        names: what it asks about.

    Raises:
        MELoRAError: for a text that is no comparison of numbers.
    """

    def __init__(self, text: str, *, is_doubtful: bool = False) -> None:
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, ValueError) as error:
            raise MELoRAError(f"`{text}` is no condition on sizes: {error}") from error
        if not all(_is_allowed(node) for node in ast.walk(tree)):
            raise MELoRAError(f"`{text}` is no condition on sizes")
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        self.text = text
        self.is_doubtful = is_doubtful
        self.names = tuple(sorted(names - _FUNCTIONS.keys() - {"math"}))
        self._test = eval(f"lambda {', '.join(self.names)}: {text}", {"__builtins__": {}, "math": math, **_FUNCTIONS})

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it is true for `values` of its names; a remainder by a size of 0 is not."""
        try:
            return bool(self._test(*[values[name] for name in self.names]))
        except ZeroDivisionError:
            return False

    def __reduce__(self) -> tuple[Any, ...]:
        return Condition, (self.text,)

    def __repr__(self) -> str:
        return f"Condition({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Condition) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


def _is_allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        is_math = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        return not node.keywords and (name in _FUNCTIONS or is_math)
    if isinstance(node, ast.Attribute):
        of_math = isinstance(node.value, ast.Name) and node.value.id == "math" and not node.attr.startswith("_")
        return node.attr == "shape" or of_math
    if isinstance(node, ast.Name):
        return not node.id.startswith("__")
    return isinstance(node, _PARTS)


@contextmanager
def exporting() -> Iterator[None]:
    """For calls of `torch.export`: it notes where it takes an axis to be larger than 1, and an axis that would keep it
    busy for minutes is named.

    Raises:
        MELoRAError: for such an axis.
    """
    try:
        with conditions_up_to(_MOST_OPERATIONS), without_assuming_two():
            yield
    except LargeConditionError as error:
        raise MELoRAError(
            f"the axis {_by_names(error.source)} cannot vary: the model computes sizes from it in conditions of more "
            f"than {_MOST_OPERATIONS} operations. Leave it out of `dynamic_axes`, or name those that may vary there"
        ) from error


_MOST_OPERATIONS = 150
"""Of one condition on sizes. Models of text have up to 20, of images and sound with every axis free up to 100; where
they grow past this, as in Swin's shifted windows of any height and width, `torch.export` takes minutes.
"""


def conditions_of(program: ExportedProgram) -> list[Condition]:
    """What an export assumed of the sizes of its inputs, but for single sizes that it froze."""
    guards: dict[str, list[str]] = {}
    for guard in export_guards(program):
        guards.setdefault(readable(guard), []).append(guard)
    return [
        Condition(text, is_doubtful=all(" == " in guard for guard in found))
        for text, found in guards.items()
        if text and not _FROZEN.fullmatch(text)
    ]


def within(size: str, allowed: Any) -> tuple[Condition, ...]:
    """That a size is in a range of `torch.export`, whose `lower` and `upper` may be infinite."""
    conditions = []
    if allowed.lower > 1:
        conditions.append(Condition(f"{size} >= {allowed.lower}"))
    if allowed.upper.is_Integer:
        conditions.append(Condition(f"{size} <= {allowed.upper}"))
    return tuple(conditions)


def readable(guard: str) -> str:
    """A guard of `torch.export`, such as `(-1)*L['x'].size()[1] > -16`, as one reads it: `x.shape[1] < 16`; "" for one
    that always holds.
    """
    text = _by_names(guard)
    sizes = list(dict.fromkeys(_SIZE.findall(text)))
    short = text
    for number, size in enumerate(sizes):
        short = short.replace(size, f"n{number}")
    if re.search(r"[%/.]|\*\*|\b(?!min|max|or|and)[a-z]{2}", short) or _FROZEN.fullmatch(text):
        return text
    simple = _as_range(short) if len(sizes) == 1 else _canonical(short, len(sizes))
    return text if simple is None else re.sub(r"n(\d+)", lambda name: sizes[int(name[1])], simple)


def _by_names(text: str) -> str:
    text = re.sub(r"L\['(\w+)'\]", r"\1", text).replace(".size()[", ".shape[")
    return text.replace("torch.sym_float(", "float(").replace("torch._sym_sqrt(", "math.sqrt(")


def _canonical(text: str, num_sizes: int) -> str | None:
    """A comparison of sums and products of `n0`, `n1`, … in sympy's order; None for another."""
    match = re.fullmatch(r"([^<>=!a-z]+) (<|<=|>|>=) ([^<>=!a-z]+)", text.replace("n", "N"))
    if match is None:
        return None
    import sympy  # heavy: only where it is used

    known = {"__builtins__": {}} | {
        f"N{number}": sympy.Symbol(f"n{number}", integer=True) for number in range(num_sizes)
    }
    left, comparison, right = match.groups()
    simple = sympy.Rel(eval(left, known), eval(right, known), comparison).canonical
    return str(simple) if isinstance(simple, sympy.core.relational.Relational) else None


def _as_range(text: str) -> str | None:
    """A comparison of sums, products, minima and maxima of the size `n0`, as the smallest and the largest for which it
    is true; None where these are no range.
    """
    condition = Condition(text)
    end = 2 * sum(map(int, re.findall(r"\b\d+", text))) + 4
    if end > _MOST_SIZES:
        return None
    fits = [condition.holds({"n0": size}) for size in range(end)]
    last = fits[-1]  # one as large changes nothing any more, or it is not for us
    if True not in fits or any(condition.holds({"n0": end << power}) != last for power in range(24)):
        return None
    smallest, number = fits.index(True), sum(fits)
    if not all(fits[smallest : smallest + number]):
        return None
    parts = [f"n0 > {smallest - 1}"] if smallest else []
    parts += [f"n0 <= {smallest + number - 1}"] if not last else []
    return " and ".join(parts)


_MOST_SIZES = 2**19
"""Beyond this many a comparison is left as it is."""

_SIZE = re.compile(r"\w+(?:\[[^][]+\])*\.shape\[\d+\]")
"""The size of an axis of an argument, or of a tensor within one."""

UPPER_BOUND = re.compile(rf"({_SIZE.pattern}) <= (\d+)")
"""A condition that is the largest size of an axis."""

_FROZEN = re.compile(rf"{_SIZE.pattern} == \d+")
