"""One part in a process of its own: `python -m benchmarks.gpu.worker JSON`, a `Recorder` as JSON."""

import sys
import warnings

from .parts import PARTS
from .recorder import Recorder

NOT_BEGUN = 4
"""Exit code where there was no time for some cases."""


def main(argument: str) -> int:
    record = Recorder.from_json(argument)
    part = next(part for part in PARTS if part.name == record.part)
    warnings.simplefilter("ignore")
    part.run(record)
    return NOT_BEGUN if record.num_not_begun else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
