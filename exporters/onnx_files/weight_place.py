"""Where a parameter lives in a graph."""

from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightPlace:
    """Where a parameter lives in a graph.

    Attributes:
        initializer: its name.
        is_transposed: it holds the transpose.
        columns: (start, stop) of the parameter, in an initializer that holds several side by side.
    """

    initializer: str
    is_transposed: bool
    columns: tuple[int, int] | None = None


def find_tensor(initializers: Container[str], name: str) -> WeightPlace | None:
    """Where the parameter `name` lives in a graph with these initializers, whose weights have been named, or None."""
    if name in initializers:
        return WeightPlace(name, False)
    return WeightPlace(f"{name}.T", True) if f"{name}.T" in initializers else None
