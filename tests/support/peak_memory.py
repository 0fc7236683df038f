"""Measures the memory of a process from one of its threads, for programs that tests start."""

import threading
from pathlib import Path

STATUS = Path("/proc/self/status")


class PeakMemory:
    """`with PeakMemory() as memory: …` sets `memory.growth`: the peak memory in bytes above the memory held before.

    Pages of files, which the system can reclaim, are not counted.
    """

    growth = 0

    def __init__(self, interval_s: float = 0.002) -> None:
        self._interval_s = interval_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "PeakMemory":
        self._before = _resident()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._interval_s):
            self.growth = max(self.growth, _resident() - self._before)


def _resident() -> int:
    return sum(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
