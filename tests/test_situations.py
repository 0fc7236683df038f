"""docs/SITUATIONS.md lists what the tests assert."""

from pathlib import Path

import pytest
from support.situation_table import by_area, documented


def test_the_table_has_every_marked_test(request: pytest.FixtureRequest) -> None:
    found = request.config.pluginmanager.get_plugin("situations")
    if not set(Path(__file__).parent.rglob("test_*.py")) <= found.files:
        pytest.skip("the table covers all test files, but not all were collected")
    assert documented() == by_area(found.rows.values())
