"""Versions of installed packages."""

import importlib.metadata


def package_version(name: str) -> str:
    """The installed version of a package; "not installed" of what runs from its source folder."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
