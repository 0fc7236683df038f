"""What benchmarks make once and keep in --cache, and the programs that make it."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from melora_fx import MELoRAError


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
