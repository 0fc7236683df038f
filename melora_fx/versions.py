"""Versions of installed packages, and the commit of this source."""

import importlib.metadata
import subprocess
from pathlib import Path


def package_version(name: str) -> str:
    """The installed version of a package; "not installed" of what runs from its source folder."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def source_commit() -> str:
    """The commit of this source, with "-dirty" after it where files have changed; empty outside of a checkout."""
    file = Path(__file__)
    git = ["git", "-C", str(file.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, check=True)
        described = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return described.stdout.strip()
