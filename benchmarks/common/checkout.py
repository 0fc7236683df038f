"""The checkout that is measured, and the exit statuses of a benchmark. Imports only the standard library."""

import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DONE, FAILED, MISUSED, LEFT_OUT = 0, 1, 2, 3
"""Exit statuses: all measured; a case failed; the arguments are wrong; none failed, but something needed is missing."""


def source_digest(*others: str) -> str:
    """Returns twelve hexadecimal digits that change with the code of both packages, the benchmarks and `others`.

    `others`: further folders.
    """
    return digest_of("melora_fx", "exporters", "benchmarks", *others)


@functools.cache
def digest_of(*folders: str) -> str:
    """Returns twelve hexadecimal digits that change with the Python files in these folders of the checkout."""
    digest = hashlib.sha256()
    for file in sorted(file for folder in folders for file in ROOT.glob(f"{folder}/**/*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
