"""Fixtures of this room's tests."""

from pathlib import Path

import pytest
from support.fold_folders import (
    Folders,
)


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)
