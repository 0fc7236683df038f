"""The settings of a part's process, and how it records its results."""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .parts import part_named
from .rows import BEGUN, PASSED, SKIPPED, append, latest, read

SAME = ("settings", "device", "versions", "source")
"""A case is done if a line written now would have the same values as its line in these fields."""


@dataclass
class Recorder:
    """The settings of a part's process, and where it records its results.

    Attributes:
        part: the name of the part.
        folder: the folder of the results.
        deadline: seconds since the epoch; no case begins that would end later.
        dry: builds everything with small models on the CPU, and times nothing.
        again: also runs what an earlier run has done.
        only: runs only cases whose name contains this.
        num_before: the number of lines before this run.
        tried: cases that this run has already tried, in an earlier process.
        num_not_begun: the number of cases for which there was no time.
    """

    part: str
    folder: Path
    deadline: float
    dry: bool = False
    again: bool = False
    only: str = ""
    num_before: int = 0
    tried: list[str] = field(default_factory=list)
    num_not_begun: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"folder": str(self.folder)})

    @classmethod
    def from_json(cls, text: str) -> "Recorder":
        fields = json.loads(text)
        return cls(**fields | {"folder": Path(fields["folder"])})

    @property
    def path(self) -> Path:
        return self.folder / f"{self.part}.jsonl"

    @property
    def origin(self) -> dict[str, str]:
        """The origin of a line written now."""
        from .origin import origin  # slow to import, and not needed in the process that starts the parts

        return origin(part_named(self.part).digest, dry=self.dry)

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Returns the cases of `names` to run, starting with those that no earlier run has tried."""
        now = self.origin
        earlier = {} if self.again else latest(read(self.path))
        found = {
            case: line["outcome"] for case, line in earlier.items() if all(line.get(key) == now[key] for key in SAME)
        }
        wanted = [name for name in names if name not in self.tried and self.only in name]
        return sorted(
            (name for name in wanted if found.get(name) not in (PASSED, SKIPPED)), key=lambda name: name in found
        )

    def begins(self, case: str, seconds: float = 0) -> bool:
        """Returns whether there is time for a case; if so, records that it has begun."""
        left = max(self.deadline - time.time(), 0)
        if seconds >= left:
            self.num_not_begun += 1
            say(f"  {case}: not begun, takes about {seconds:.0f} s, and {left:.0f} s are left")
            return False
        self.ends(case, BEGUN)
        return True

    def ends(self, case: str, outcome: str, **facts: Any) -> None:
        """Records how a case has ended. `facts`: `reason`, `seconds`, `sides`."""
        append(self.path, {"part": self.part, "case": case, "outcome": outcome, **facts, **self.origin})
        if outcome != BEGUN:
            say(f"  {case}: {outcome}" + (f", {facts['reason']}" if facts.get("reason") else ""))


def in_a_line(error: BaseException) -> str:
    """Returns an error as one line, for the field `reason`."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 600 else f"{text[:400]} … {text[-200:]}"


def say(text: str) -> None:
    print(text, flush=True)
