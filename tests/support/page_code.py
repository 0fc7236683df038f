"""The code blocks and commands of README.md and docs/, and how to run them."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .command_line import run

ROOT = Path(__file__).parent.parent.parent
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$|^(#+) (.*?)$", re.MULTILINE | re.DOTALL)


class Code(NamedTuple):
    """A fenced block of a page, below a heading."""

    page: str
    heading: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands of a bash block without comments, one for each line or part of an `&&`."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [shlex.join(part) for line in lines for part in _parts(shlex.split(line, comments=True))]


def _parts(words: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for word in [*words, "&&"]:
        if word != "&&":
            part.append(word)
        elif part:
            yield part
            part = []


def blocks_of(page: str) -> list[Code]:
    """Returns the fenced blocks of a page in order."""
    found, heading = [], ""
    for match in _FENCE.finditer((ROOT / page).read_text()):
        if match[3]:
            heading = match[4]
        else:
            found.append(Code(page, heading, match[1], match[2]))
    return found


def run_command(command: str) -> None:
    """Runs a command in the current folder; `melora-fx` in this process, which has imported torch."""
    program, *arguments = shlex.split(command)
    if program == "melora-fx":
        result: Any = run(*arguments)
    else:
        path = Path(sys.executable).with_name(program)
        result = subprocess.run([str(path), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


def run_blocks(
    blocks: list[Code], stages: dict[str, Callable[[dict[str, Any]], None]], skipped: dict[str, str]
) -> None:
    """Runs a page's blocks in order, in the current folder and with one namespace.

    stages: heading → a function that prepares the folder and the namespace for the blocks below it.
    skipped: command → why it does not run here.
    """
    namespace: dict[str, Any] = {"__name__": "page"}
    heading = None
    for block in blocks:
        if block.heading != heading:
            heading = block.heading
            stages.get(heading, lambda _: None)(namespace)
        if block.language == "python":
            exec(compile(block.text, f"{block.page}, {heading}", "exec"), namespace)
        for command in block.commands if block.language == "bash" else ():
            if command not in skipped:
                run_command(command)
