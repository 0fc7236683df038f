"""Files that benchmarks make once and keep in --cache, and the programs that make them."""

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
    """Returns the folder; if it is missing, creates it with `make`, either complete or not at all."""
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
    """Runs another program in a folder, with the Hugging Face Hub offline.

    Raises:
        MELoRAError: if it fails; contains the end of its standard error.
    """
    given = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", **(environment or {})}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=given)
    if result.returncode:
        raise MELoRAError(f"`{' '.join(command)}` failed: {result.stderr.strip()[-500:]}")


def digest(*texts: str) -> str:
    return hashlib.sha256(" ".join(texts).encode()).hexdigest()[:12]


def digest_of_files(paths: Iterable[Path]) -> str:
    """Returns the digest of the contents of the files, in this order."""
    return digest(*(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths))


class MeasuringProcesses:
    """The results of separate processes, stored in --cache as soon as each process ends.

    A stopped run continues with the next process. With other code or packages, or on another machine, all run again.
    """

    def __init__(self, options: Namespace, script: str, settings: str, timeout_s: float) -> None:
        """`script`: the module that each process runs. `settings`: what else its results depend on."""
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
        """Returns what each process printed, after running those that have not run yet.

        Args:
            name: a name for what is measured, used in file names.
            job: returns the argument of a process, given its index; called only for processes that run.
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
