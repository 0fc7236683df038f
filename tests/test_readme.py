"""README.md is short, and CONTRIBUTING.md complete."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_readme_is_read_in_a_minute() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert lines.index("```python") < 20, "the first code is on the first screen"
    assert sum(line.startswith("![") for line in lines) == 1


def test_contributing_names_every_room() -> None:
    named = set(re.findall(r"`((?:melora_fx|exporters)/\w+)/`", (ROOT / "CONTRIBUTING.md").read_text()))
    inits = [path for package in ("melora_fx", "exporters") for path in (ROOT / package).glob("*/__init__.py")]
    assert named == {str(path.parent.relative_to(ROOT)) for path in inits}
