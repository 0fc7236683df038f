"""Parses the letters of an `einsum` of two factors, and finds those of a linear.

`bsd,de->bes` contracts d and adds e; b and s stay. With x ordered as `bsd`, the linear returns `bse`, which is then
reordered to `bes`. Dots are one letter, ".".
"""

import string
from typing import Any, NamedTuple

_DOTS = "."


class Orders(NamedTuple):
    """How an `einsum` orders dimensions around a linear: equations of one operand, None if the order is unchanged.

    Attributes:
        of_input: from the input of the `einsum` to the linear's, whose features are last.
        from_output: from the linear's output to that of the `einsum`.
        to_output: the inverse of `from_output`.
    """

    of_input: str | None
    from_output: str | None
    to_output: str | None


class Einsum(NamedTuple):
    """The arguments of an `einsum`.

    Attributes:
        terms: the letters of each operand.
        output: the letters of the result.
        operands: the factors.
    """

    terms: tuple[str, ...]
    output: str
    operands: tuple[Any, ...]


def read_einsum(args: tuple[Any, ...]) -> Einsum | None:
    """Parses the arguments of an `einsum` in either of its forms; returns None if its letters are not constants."""
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
    """Returns torch's letter for a dimension that is passed as a number."""
    return _DOTS if number is Ellipsis else (string.ascii_uppercase + string.ascii_lowercase)[number]


def _implicit_output(terms: tuple[str, ...]) -> str:
    """Returns the output's letters if there is no `->`: dots, then the letters that occur once, sorted."""
    letters = "".join(terms)
    once = sorted(letter for letter in set(letters) - {_DOTS} if letters.count(letter) == 1)
    return (_DOTS if _DOTS in letters else "") + "".join(once)


def orders_of_linear(x_term: str, contracted: str, new: str, output: str) -> Orders | None:
    """Returns the orders around a linear that replaces the letters `contracted` of x with the letters `new`.

    None if the letters are those of another product.
    """
    kept = "".join(letter for letter in x_term if letter not in contracted)
    letters = x_term + new
    are_distinct = len(set(letters)) == len(letters)
    if not are_distinct or not set(contracted) <= set(x_term) or sorted(output) != sorted(kept + new):
        return None
    return Orders(_equation(x_term, kept + contracted), _equation(kept + new, output), _equation(output, kept + new))


def _equation(before: str, after: str) -> str | None:
    return None if before == after else f"{before}->{after}".replace(_DOTS, "...")
