"""Describes the place of a parameter in a graph: the initializer, or columns of one, and the orientation."""

from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightPlace:
    """The place of a parameter in a graph.

    Attributes:
        initializer: the name of the initializer that stores it.
        is_transposed: whether it is stored transposed, as a product x Wᵀ needs it.
        columns: (start, stop) in an initializer that stores several parameters side by side; None if it stores one.
    """

    initializer: str
    is_transposed: bool
    columns: tuple[int, int] | None = None


def find_tensor(initializers: Container[str], name: str) -> WeightPlace | None:
    """Returns the place of the parameter `name` among initializers that `name_weights` has renamed, or None."""
    if name in initializers:
        return WeightPlace(name, False)
    transposed = f"{name}.T"
    return WeightPlace(transposed, True) if transposed in initializers else None
