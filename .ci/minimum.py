"""Prints pip constraints that pin each dependency to the minimum version that pyproject.toml declares.

`name<=minimum`, together with the project's own `name>=minimum`, leaves pip one release. Development tools stay free.
"""

import re
import tomllib
from pathlib import Path

TOOLS = {"pytest", "pytest-xdist", "hypothesis", "ruff", "mypy"}

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in [
    *project["dependencies"],
    *(each for extra in ("cpu", "train", "demo", "test") for each in extras[extra]),
]:
    declared = re.fullmatch(r"([\w-]+)>=([\d.]+)( *;.*)?", requirement)
    if declared is None and ">=" in requirement:
        raise SystemExit(f"cannot read the minimum version that {requirement!r} declares")
    if declared and declared[1] not in TOOLS:
        print(f"{declared[1]}<={declared[2]}{declared[3] or ''}")
