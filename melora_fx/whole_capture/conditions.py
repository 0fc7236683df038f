"""Conditions on the sizes of inputs that an export assumed: text that can be read, checked and stored.

A condition is a Python comparison of numbers, such as `x.shape[1] <= 64` or `batch * sequence % 4 == 0`. Its names are
arguments of a forward, or axes of a graph.
"""

import ast
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import sympy
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

    Attributes:
        text: the comparison.
        names: what it asks about.

    Raises:
        MELoRAError: for a text that is no comparison of numbers.
    """

    def __init__(self, text: str) -> None:
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, ValueError) as error:
            raise MELoRAError(f"`{text}` is no condition on sizes: {error}") from error
        if not all(_is_allowed(node) for node in ast.walk(tree)):
            raise MELoRAError(f"`{text}` is no condition on sizes")
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        self.text = text
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
def exporting(*, tries_ones: bool) -> Iterator[None]:
    """For calls of `torch.export`: names an axis that it cannot handle, where it would be busy for minutes.

    Args:
        tries_ones: whether axes of one entry will be tried afterwards. Otherwise the export itself must note where it
            takes an axis to be larger; it notes some that the model would serve with one.

    Raises:
        MELoRAError: for such an axis.
    """
    try:
        with conditions_up_to(_MOST_OPERATIONS), nullcontext() if tries_ones else without_assuming_two():
            yield
    except LargeConditionError as error:
        size = readable(error.source)
        raise MELoRAError(
            f"the axis {size} cannot vary: the model computes sizes from it in conditions of more than "
            f"{_MOST_OPERATIONS} operations. Leave it out of `dynamic_axes`, or name those that may vary there"
        ) from error


_MOST_OPERATIONS = 150
"""Of one condition on sizes. Models of text have up to 20, of images and sound with every axis free up to 100; where
they grow past this, as in Swin's shifted windows of any height and width, `torch.export` takes minutes.
"""


def conditions_of(program: ExportedProgram) -> list[Condition]:
    """What an export assumed of the sizes of its inputs, but for single sizes that it froze."""
    texts = dict.fromkeys(readable(guard) for guard in export_guards(program))
    return [Condition(text) for text in texts if not _FROZEN.fullmatch(text)]


def readable(guard: str) -> str:
    """A guard of `torch.export`, such as `(-1)*L['x'].size()[1] > -16`, as one reads it: `x.shape[1] < 16`."""
    text = re.sub(r"L\['(\w+)'\]", r"\1", guard).replace(".size()[", ".shape[")
    sizes = list(dict.fromkeys(_SIZE.findall(text)))
    symbols = {f"n{index}": sympy.Symbol(f"n{index}", integer=True) for index in range(len(sizes))}
    short = text
    for name, size in zip(symbols, sizes, strict=True):
        short = short.replace(size, name)
    match = re.fullmatch(r"([^<>=!]+) (<|<=|>|>=) ([^<>=!]+)", short)
    if match is None or re.search(r"[%/]|[a-z]{2}", short):
        return text
    left, comparison, right = match.groups()
    known = {"__builtins__": {}, **symbols}
    simple = sympy.Rel(eval(left, known), eval(right, known), comparison).canonical
    if not isinstance(simple, sympy.core.relational.Relational):
        return text
    written = dict(zip(symbols, sizes, strict=True))
    return re.sub(r"n\d+", lambda name: written[name[0]], str(simple))


_SIZE = re.compile(r"\w+(?:\[[^][]+\])*\.shape\[\d+\]")
"""The size of an axis of an argument, or of a tensor within one."""

_FROZEN = re.compile(rf"{_SIZE.pattern} == \d+")
