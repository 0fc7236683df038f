"""Cross products of parameters, of which the default tests run a few cases that were chosen by hand."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def thinned(*values: Iterable[Any], default: Iterable[Any]) -> list[Any]:
    """All combinations of the values, those that are not in `default` marked slow; of one list, its values.

    Raises:
        ValueError: a case of `default` is no combination, or a value stands in none of them.
    """
    columns = [list(column) for column in values]
    cases = list(itertools.product(*columns)) if len(columns) > 1 else columns[0]
    chosen = list(default)
    if unknown := [case for case in chosen if case not in cases]:
        raise ValueError(f"no combinations of the values: {unknown}")
    if len(columns) > 1:
        for index, column in enumerate(columns):
            if missing := set(column) - {case[index] for case in chosen}:
                raise ValueError(f"in no default case: {missing}")
    return [
        pytest.param(*(case if len(columns) > 1 else (case,)), marks=() if case in chosen else pytest.mark.slow)
        for case in cases
    ]
