"""The cases of a long product."""

from collections.abc import Iterable
from typing import Any

import pytest


def a_fifth_slow(values: Iterable[Any], ids: Iterable[str]) -> list[Any]:
    """Returns the parameters of a test: every fifth value is marked slow, the others full."""
    return [
        pytest.param(value, id=name, marks=pytest.mark.full if number % 5 else pytest.mark.slow)
        for number, (value, name) in enumerate(zip(values, ids, strict=True))
    ]
