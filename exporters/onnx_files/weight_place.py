"""Where a parameter lives in a graph: which initializer, or which columns of one, and whether transposed."""

from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightPlace:
    """Where a parameter lives in a graph.

    Attributes:
        initializer: the name of the initializer that holds it.
        is_transposed: whether it is held transposed, as a product x Wᵀ takes it.
        columns: (start, stop) in an initializer that holds several parameters side by side; None where it holds one.
    """

    initializer: str
    is_transposed: bool
    columns: tuple[int, int] | None = None


def find_tensor(initializers: Container[str], name: str) -> WeightPlace | None:
    """Where the parameter `name` lives in a graph with these initializers, whose weights have been named, or None."""
    if name in initializers:
        return WeightPlace(name, False)
    transposed = f"{name}.T"
    return WeightPlace(transposed, True) if transposed in initializers else None
