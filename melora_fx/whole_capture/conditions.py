"""Extracts, simplifies and checks the conditions on input sizes that an export assumed; they are stored as text.

A condition is a Python comparison of numbers, such as `x.shape[1] <= 64` or `batch * sequence % 4 == 0`. Its names are
arguments of a forward, or axes of a graph.
"""

import ast
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.export import ExportedProgram

from melora_fx.errors import MELoRAError

from .private import LargeConditionError, conditions_up_to, export_guards, without_assuming_two

_FUNCTIONS: dict[str, Any] = {"min": min, "max": max, "abs": abs, "float": float, "int": int, "round": round}
_PARTS = (
    ast.Expression, ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator, ast.Compare, ast.cmpop,
    ast.expr_context, ast.Subscript,
)  # fmt: skip
"""Syntax that a condition may use in addition to names, numbers, calls and attributes. All other syntax is refused, as
the text may come from a file."""
_MATH = ("ceil", "floor", "isqrt", "log", "log2", "sqrt", "trunc")
_MOST_CHARACTERS = 10_000
_MOST_POWERS = 4
_LARGEST_NUMBER = 1 << 63


class Shaped(NamedTuple):
    """Stand-in for an array in a condition."""

    shape: tuple[int, ...]


class Condition:
    """One condition on sizes.

    Args:
        text: the comparison.
        is_doubtful: whether the graph may not need the condition. An export also compares sizes to find the memory
            layout of a tensor, and the outputs may not depend on the layout.

    Attributes:
        names: the names in the text.

    Raises:
        MELoRAError: if the text is not a comparison of numbers.
    """

    def __init__(self, text: str, *, is_doubtful: bool = False) -> None:
        if not isinstance(text, str) or len(text) > _MOST_CHARACTERS:
            raise MELoRAError(f"{str(text)[:200]!r} is not a condition on sizes")
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise MELoRAError(f"`{text[:200]}` is not a condition on sizes: {error}") from error
        nodes = [*ast.walk(tree)]
        if not all(map(_is_allowed, nodes)) or sum(isinstance(node, ast.Pow) for node in nodes) > _MOST_POWERS:
            raise MELoRAError(f"`{text[:200]}` is not a condition on sizes")
        functions = {_function_of(node) for node in nodes}
        names = {node.id for node in nodes if isinstance(node, ast.Name) and node not in functions}
        self.text = text
        self.is_doubtful = is_doubtful
        self.names = tuple(sorted(names))
        self._test = eval(f"lambda {', '.join(self.names)}: {text}", {"__builtins__": {}, "math": math, **_FUNCTIONS})

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Returns whether the condition is true for `values` of its names; False if it divides by a size of 0.

        Raises:
            MELoRAError: if the condition cannot be evaluated for the values, such as shapes with fewer axes.
        """
        try:
            return bool(self._test(*[values[name] for name in self.names]))
        except ZeroDivisionError:
            return False
        except (ArithmeticError, AttributeError, IndexError, RecursionError, TypeError, ValueError) as error:
            raise MELoRAError(f"`{self.text}` cannot be evaluated: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return Condition, (self.text,)

    def __repr__(self) -> str:
        return f"Condition({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Condition) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


def _function_of(node: ast.AST) -> ast.AST | None:
    """Returns the name that a call or `math.…` uses as a function or module; an argument may have the same name."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func
    return node.value if isinstance(node, ast.Attribute) and node.attr in _MATH else None


def _is_small(node: ast.expr) -> bool:
    """Returns whether `node` is a number that is allowed as an exponent."""
    number = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(number, ast.Constant) and isinstance(number.value, int | float) and number.value <= 8


def _is_allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        is_math = isinstance(node.func, ast.Attribute) and node.func.attr in _MATH
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        return not node.keywords and (name in _FUNCTIONS or is_math)
    if isinstance(node, ast.Attribute):
        of_math = isinstance(node.value, ast.Name) and node.value.id == "math" and node.attr in _MATH
        return node.attr == "shape" or of_math
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) and abs(node.value) <= _LARGEST_NUMBER
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return isinstance(node.right, ast.Constant | ast.UnaryOp) and _is_small(node.right)
    if isinstance(node, ast.Name):
        return not node.id.startswith("__")
    return isinstance(node, _PARTS)


@contextmanager
def exporting() -> Iterator[None]:
    """Makes `torch.export` record each assumption that an axis is larger than 1, and stop at an axis that would keep it
    busy for minutes.

    Raises:
        MELoRAError: if there is such an axis; the text names it.
    """
    try:
        with conditions_up_to(_MOST_OPERATIONS), without_assuming_two():
            yield
    except LargeConditionError as error:
        raise MELoRAError(
            f"the axis {_by_names(error.source)} cannot vary: the model computes sizes from it in conditions of more "
            f"than {_MOST_OPERATIONS} operations. Leave it out of `dynamic_axes`, or list the axes that may vary there"
        ) from error


_MOST_OPERATIONS = 150
"""Largest number of operations in one condition on sizes. Text models have up to 20; image and sound models with every
axis free, up to 100. If conditions grow past this limit, as in Swin's shifted windows of any height and width,
`torch.export` takes minutes.
"""


def conditions_of(program: ExportedProgram) -> list[Condition]:
    """Returns the conditions that an export assumed for the sizes of its inputs, without single sizes that it froze."""
    guards: dict[str, list[str]] = {}
    for guard in export_guards(program):
        guards.setdefault(readable(guard), []).append(guard)
    return [
        Condition(text, is_doubtful=all(" == " in guard for guard in found))
        for text, found in guards.items()
        if text and not _FROZEN.fullmatch(text)
    ]


def within(size: str, allowed: Any) -> tuple[Condition, ...]:
    """Returns the conditions that put a size in a range of `torch.export`, whose bounds may be infinite."""
    conditions = []
    if allowed.lower > 1:
        conditions.append(Condition(f"{size} >= {allowed.lower}"))
    if allowed.upper.is_Integer:
        conditions.append(Condition(f"{size} <= {allowed.upper}"))
    return tuple(conditions)


def readable(guard: str) -> str:
    """Returns a guard of `torch.export`, such as `(-1)*L['x'].size()[1] > -16`, in readable form: `x.shape[1] <= 15`.

    Returns "" for a guard that is always true.
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
    for of_torch, function in _TORCH_FUNCTIONS.items():
        text = text.replace(f"{of_torch}(", f"{function}(")
    return text


_TORCH_FUNCTIONS = {
    "torch.sym_float": "float",
    "torch._sym_sqrt": "math.sqrt",
    "torch.sym_min": "min",  # torch 2.15; earlier, guards have Python's own `min` and `max`
    "torch.sym_max": "max",
}


def _canonical(text: str, num_sizes: int) -> str | None:
    """Returns a comparison of sums and products of `n0`, `n1`, … in sympy's canonical form; None for other text."""
    match = re.fullmatch(r"([^<>=!a-z]+) (<|<=|>|>=) ([^<>=!a-z]+)", text.replace("n", "N"))
    if match is None:
        return None
    import sympy  # slow to import, so only here

    known = {"__builtins__": {}} | {
        f"N{number}": sympy.Symbol(f"n{number}", integer=True) for number in range(num_sizes)
    }
    left, comparison, right = match.groups()
    simple = sympy.Rel(eval(left, known), eval(right, known), comparison).canonical
    return str(simple) if isinstance(simple, sympy.core.relational.Relational) else None


def _as_range(text: str) -> str | None:
    """Returns a comparison of sums, products, minima and maxima of the size `n0` as bounds: the smallest and the
    largest size for which it is true. None if these sizes are not a range.
    """
    condition = Condition(text)
    end = 2 * sum(map(int, re.findall(r"\b\d+", text))) + 4
    if end > _MOST_SIZES:
        return None
    fits = [condition.holds({"n0": size}) for size in range(end)]
    last = fits[-1]  # must also be the answer for all larger sizes
    if True not in fits or any(condition.holds({"n0": end << power}) != last for power in range(24)):
        return None
    smallest, number = fits.index(True), sum(fits)
    if not all(fits[smallest : smallest + number]):
        return None
    parts = [f"n0 > {smallest - 1}"] if smallest else []
    parts += [f"n0 <= {smallest + number - 1}"] if not last else []
    return " and ".join(parts)


_MOST_SIZES = 2**19
"""A comparison that would need more trials than this is left unchanged."""

_SIZE = re.compile(r"\w+(?:\[[^][]+\])*\.shape\[\d+\]")
"""The size of an axis of an argument, or of a tensor within one."""

UPPER_BOUND = re.compile(rf"({_SIZE.pattern}) <= (\d+)")
"""A condition that bounds the size of an axis from above."""

_FROZEN = re.compile(rf"{_SIZE.pattern} == \d+")
