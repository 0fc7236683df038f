"""The letters of an `einsum` of two factors, and which of them are those of a linear.

`bsd,de->bes` contracts d and brings e; b and s stay. Once x is ordered as `bsd`, the linear gives `bse`, which is
ordered as `bes`. Dots are one letter, ".".
"""

import string
from typing import Any, NamedTuple

_DOTS = "."


class Orders(NamedTuple):
    """How an `einsum` orders dimensions around a linear: equations of one operand, None where the order is the same.

    `of_input`: from its input to the linear's, whose features come last. `from_output`: from the linear's output to its
    own. `to_output`: the inverse of that.
    """

    of_input: str | None
    from_output: str | None
    to_output: str | None


class Einsum(NamedTuple):
    """`terms`: the letters of each operand. `output`: those of what comes out."""

    terms: tuple[str, ...]
    output: str
    operands: tuple[Any, ...]


def read_einsum(args: tuple[Any, ...]) -> Einsum | None:
    """What the arguments of an `einsum` say, in either of its forms; None for what is none of constants."""
    if args and isinstance(args[0], str):
        inputs, arrow, output = args[0].replace(" ", "").replace("...", _DOTS).partition("->")
        operands: Any = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
        terms = tuple(inputs.split(","))
        return Einsum(terms, output if arrow else _implicit_output(terms), tuple(operands))
    lists = [*args[1::2], *args[-1:]] if len(args) % 2 else list(args[1::2])
    if not lists or not all(isinstance(numbers, list | tuple) for numbers in lists):
        return None
    try:
        terms = tuple("".join(map(_letter, numbers)) for numbers in lists)
    except (TypeError, IndexError):
        return None
    if len(args) % 2:
        return Einsum(terms[:-1], terms[-1], tuple(args[0:-1:2]))
    return Einsum(terms, _implicit_output(terms), tuple(args[0::2]))


def _letter(number: Any) -> str:
    """What torch calls a dimension that is given by its number."""
    return _DOTS if number is Ellipsis else (string.ascii_uppercase + string.ascii_lowercase)[number]


def _implicit_output(terms: tuple[str, ...]) -> str:
    """Dots, then in their order the letters that stand once."""
    letters = "".join(terms)
    once = sorted(letter for letter in set(letters) - {_DOTS} if letters.count(letter) == 1)
    return (_DOTS if _DOTS in letters else "") + "".join(once)


def orders_of_linear(x_term: str, contracted: str, new: str, output: str) -> Orders | None:
    """The orders around a linear that contracts some letters of x and brings new ones in their place; None where the
    letters are those of another product.
    """
    kept = "".join(letter for letter in x_term if letter not in contracted)
    letters = x_term + new
    are_distinct = len(set(letters)) == len(letters)
    if not are_distinct or not set(contracted) <= set(x_term) or sorted(output) != sorted(kept + new):
        return None
    return Orders(_equation(x_term, kept + contracted), _equation(kept + new, output), _equation(output, kept + new))


def _equation(before: str, after: str) -> str | None:
    return None if before == after else f"{before}->{after}".replace(_DOTS, "...")
