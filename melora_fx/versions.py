"""Reads the versions of installed packages and the commit of this source."""

import importlib.metadata
import subprocess
from pathlib import Path


def package_version(name: str) -> str:
    """Returns the installed version of a package; "not installed" for a package that runs from its source folder."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def source_commit() -> str:
    """Returns the commit of this source, followed by "-dirty" if files have changed; empty outside a checkout."""
    file = Path(__file__)
    git = ["git", "-C", str(file.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, check=True)
        described = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return described.stdout.strip()
