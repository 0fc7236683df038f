"""What benchmarks make once and keep in --cache, and the programs that make it."""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exporters.measuring.machine import origin_columns
from melora_fx import MELoRAError

from .cases import run_apart
from .checkout import source_digest


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made where it is not there yet: all of it or nothing."""
    if not folder.is_dir():
        print(f"    making {folder.name} …", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
        try:
            make(staging)
            staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return folder


def run_offline(command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> None:
    """Runs another program, offline, in a folder.

    Raises:
        MELoRAError: where it fails; has the end of what it printed.
    """
    given = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", **(environment or {})}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=given)
    if result.returncode:
        raise MELoRAError(f"`{' '.join(command)}` failed: {result.stderr.strip()[-500:]}")


def digest(*texts: str) -> str:
    return hashlib.sha256(" ".join(texts).encode()).hexdigest()[:12]


def digest_of_files(paths: Iterable[Path]) -> str:
    """Of their contents, in this order."""
    return digest(*(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths))


class MeasuringProcesses:
    """What processes of their own have measured, in --cache as soon as it is there: a run that was stopped goes on with
    the next process. Other code, other packages or another machine begin anew.
    """

    def __init__(self, options: Namespace, script: str, settings: str, timeout_s: float) -> None:
        """`script`: the file that each process runs. `settings`: all that its results depend on beside the code."""
        self._script = script
        self._timeout_s = timeout_s
        self._number = options.processes
        origin = origin_columns("cpu", "peft")
        self._folder = (
            options.cache / f"{script}-{digest(settings, source_digest(), origin['versions'], origin['device'])}"
        )
        if options.again and not options.report_only:
            shutil.rmtree(self._folder, ignore_errors=True)

    def measured(self, name: str, job: Callable[[int], Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What each process printed; those that have not run yet run now.

        Args:
            name: of what they measure.
            job: gives the argument of a process, by its index; called where it runs.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        files = [self._folder / f"{name}-{index}.json" for index in range(self._number)]
        for index, file in enumerate(files):
            if not file.is_file():
                given = json.dumps(job(index))
                print(f"    process {index + 1} of {len(files)} …", flush=True)
                found = run_apart(self._script, given, timeout_s=self._timeout_s)
                partial = file.with_suffix(".partial")
                partial.write_text(json.dumps(found))
                partial.replace(file)
        return [json.loads(file.read_text()) for file in files]
