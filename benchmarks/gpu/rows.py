"""Results as JSON lines: one file per part, with one line when a case begins and one when it has ended."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]
BEGUN, PASSED, FAILED, SKIPPED, LACKING = "begun", "passed", "failed", "skipped", "lacking"
"""Outcomes of a case. "skipped": it does not apply to this machine; "lacking": something must be installed for it."""


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Appends a line, even after one that was cut off when a process ended."""
    is_cut = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if is_cut else "") + json.dumps(line, ensure_ascii=False) + "\n")


def read(path: Path) -> list[Line]:
    """Returns all complete lines of a file; none if there is no file."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # cut off
            continue
        if isinstance(line, dict) and "case" in line:
            lines.append(line)
    return lines


def latest(lines: Iterable[Line]) -> dict[str, Line]:
    """Returns the last line of each case, in the order in which the cases first appear."""
    return {line["case"]: line for line in lines}
