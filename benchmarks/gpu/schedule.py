"""The parts one after another, each in its share of the minutes and in processes of its own, which can be lost."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

from benchmarks.checkout import DONE, LEFT_OUT, ROOT
from benchmarks.checkout import FAILED as A_CASE_FAILED

from .options import OUT, RESULTS
from .parts import PARTS, Part
from .recorder import Recorder
from .rows import BEGUN, FAILED, LACKING, append, latest, read
from .worker import NOT_BEGUN

GRACE_S = 15
"""How long a case may go on after its part's share of the time."""
OUT_OF_TIME = 124
"""The code of a process that was ended after its time, as that of `timeout`."""
WORKER = ["-m", "benchmarks.gpu.worker"]
DRY_RUN_VARIABLE = "MELORA_FX_DRY_RUN"
"""Tells the tests of part *correct* to run on the CPU."""

Say = Callable[[str], None]


def run(options: argparse.Namespace) -> int:
    """An exit status: 0, or 1 where a case failed, 3 where something is missing or not begun."""
    if options.report:
        from .report import write_report  # draws: heavy

        return write_report(options.report, options.out or RESULTS)
    if not options.dry_run and not _has_device():
        print("there is no CUDA device: --dry-run builds every case on the CPU", file=sys.stderr)
        return LEFT_OUT
    folder = options.out or OUT
    folder.mkdir(parents=True, exist_ok=True)
    parts = [part for part in PARTS if options.part in (None, part.name)]
    end = time.time() + 60 * options.minutes
    statuses = []
    with (folder / "log.txt").open("a") as log:

        def say(text: str) -> None:
            print(text, flush=True)
            print(text, file=log, flush=True)

        for index, part in enumerate(parts):
            left = max(end - time.time(), 0)
            share = left * part.minutes / sum(each.minutes for each in parts[index:])
            say(f"{part.name}: {part.question} ({share:.0f} s of {left:.0f} s)")
            record = Recorder(part.name, folder, time.time() + share, options.dry_run, options.again, options.only)
            statuses.append(_run_part(part, record, say))
        say(f"see {folder}")
    return max(statuses, key=(DONE, LEFT_OUT, A_CASE_FAILED).index)


def _has_device() -> bool:
    import torch  # heavy

    return torch.cuda.is_available()


def _run_part(part: Part, record: Recorder, say: Say) -> int:
    """Runs a part until nothing of it is left to be tried, or its time is over; gives an exit status."""
    if part.missing:
        say(f"  left out: {part.missing}")
        return LEFT_OUT
    num_before = len(read(record.path))
    while True:
        code = _work(record, say)
        tried = latest(read(record.path)[num_before:])
        for case, line in tried.items():
            if line["outcome"] == BEGUN:  # and never ended
                is_late = code == OUT_OF_TIME
                reason = "its part's time was over" if is_late else f"its process ended with {code}, see the log"
                append(record.path, line | {"outcome": FAILED, "reason": reason})
                say(f"  {case}: failed, {reason}")
        has_gone_on = len(tried) > len(record.tried)
        record.tried = list(tried)
        if code in (0, NOT_BEGUN) or not has_gone_on or time.time() > record.deadline:
            break
    outcomes = Counter(line["outcome"] for line in latest(read(record.path)[num_before:]).values())
    say(f"  {', '.join(f'{count} {outcome}' for outcome, count in sorted(outcomes.items())) or 'nothing run'}")
    if outcomes[FAILED] or code not in (0, NOT_BEGUN):
        return A_CASE_FAILED
    return LEFT_OUT if code or outcomes[LACKING] else DONE


def _work(record: Recorder, say: Say) -> int:
    """The exit code of one process of a part; ends it, and all that it has started, when its time is over."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    if record.dry:
        environment |= {DRY_RUN_VARIABLE: "1"}
    command = [sys.executable, *WORKER, record.to_json()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes) as process:

        def watch() -> None:
            try:
                process.wait(max(record.deadline - time.time(), 0) + GRACE_S)
            except subprocess.TimeoutExpired:
                say(f"  stopped {GRACE_S} s after the part's time")
                is_late.set()
            _end_group(process)  # also what a lost process has started: it holds the output open

        is_late = threading.Event()
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            for text in process.stdout:
                say(text.rstrip("\n"))
        except BaseException:  # this process is being stopped
            _end_group(process)
            raise
        finally:
            watcher.join()
        return OUT_OF_TIME if is_late.is_set() else process.wait()


def _end_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
