"""Runs one part in its own process: `python -m benchmarks.gpu.worker JSON`, with a `Recorder` as JSON."""

import os
import signal
import sys
import threading
import time
import warnings

from .parts import part_named
from .recorder import Recorder

NOT_BEGUN = 4
"""Exit code if there was no time for some cases."""


def main(argument: str) -> int:
    record = Recorder.from_json(argument)
    warnings.simplefilter("ignore")
    part_named(record.part).run(record)
    return NOT_BEGUN if record.num_not_begun else 0


def end_with(parent: int) -> None:
    """Ends this process and everything that it started when the process `parent` is gone, for example killed.

    They would otherwise continue to use the device.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    sys.exit(main(sys.argv[1]))
