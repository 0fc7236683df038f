"""docs/SITUATIONS.md is what the tests assert."""

import subprocess
import sys
from pathlib import Path

from support.situation_table import documented

_LIST = """
from support.situation_table import collected
for row in collected("--collect-only").rows.values():
    print(*row, sep="\\t")
"""


def test_the_table_has_every_marked_test() -> None:
    """In a process of its own: pytest collects once in each."""
    listed = subprocess.run(
        [sys.executable, "-c", _LIST], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert documented() == [tuple(line.split("\t")) for line in listed.stdout.splitlines()]
