"""Fixtures of this room's tests."""

from typing import Any

import pytest
from torch import Tensor

import melora_fx.lowering.adapted_linear as implementation


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Collects one item for each adapted linear that ran as one call."""
    made: list[bool] = []
    original = implementation.compute_output

    def counting(*args: Any) -> Tensor:
        made.append(True)
        return original(*args)

    monkeypatch.setattr(implementation, "compute_output", counting)
    return made
