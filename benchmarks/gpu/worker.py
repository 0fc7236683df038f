"""One part in a process of its own: `python -m benchmarks.gpu.worker JSON`, a `Recorder` as JSON."""

import os
import signal
import sys
import threading
import time
import warnings

from .parts import part_named
from .recorder import Recorder

NOT_BEGUN = 4
"""Exit code where there was no time for some cases."""


def main(argument: str) -> int:
    record = Recorder.from_json(argument)
    warnings.simplefilter("ignore")
    part_named(record.part).run(record)
    return NOT_BEGUN if record.num_not_begun else 0


def end_with(parent: int) -> None:
    """Ends this process, and all that it has started, when the process `parent` is gone, killed perhaps: else they
    would go on using the device.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    sys.exit(main(sys.argv[1]))
